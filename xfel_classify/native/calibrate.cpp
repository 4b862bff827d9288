// Calibration of raw frames: whole frames, windows, and max-pooled windows, each in one pass.
//
// Arithmetic is float32 in the order ((value - pedestal) * factor) * scale, without fused
// multiply-add, so that every variant gives the bits of the numpy reference and of psana.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "variants.h"

namespace py = pybind11;

namespace {

constexpr int kGroup = 32;          // pixels looked at together for gain switching
constexpr int kBlock = 1024;        // window pixels gathered at a time
constexpr size_t kAhead = 12;       // pieces of a window fetched ahead
constexpr float kBarred = -std::numeric_limits<float>::infinity();

enum Bits { none = 0, top2 = 1, bit14 = 2 };

// Constants of `n` neighbouring pixels; stage g of pixel i is at [g * stride + i].
struct Tables {
    const float *pedestal, *factor;             // stage 0: pedestal + offset, 1 / gain or 0
    const float *pedestals, *gains, *offsets;   // all stages; offsets may be null
    size_t stride;

    Tables at(size_t i) const {
        Tables moved = *this;
        moved.pedestal += i;
        moved.factor += i;
        if (pedestals) moved.pedestals += i;
        if (gains) moved.gains += i;
        if (offsets) moved.offsets += i;
        return moved;
    }
};

// Where the constants of a pixel that left stage 0 are.
template <int BITS>
INLINE size_t stage_at(uint16_t word, const Tables &t, size_t i) {
    return (BITS == top2 && word >> 15 ? 2 * t.stride : t.stride) + i;
}

// A pixel that left stage 0; rare, so it divides here instead of keeping 1 / gain of all stages.
template <int BITS>
INLINE float switched(uint16_t word, const Tables &t, size_t i) {
    const size_t at = stage_at<BITS>(word, t, i);
    float pedestal = t.pedestals[at];
    if (t.offsets) pedestal += t.offsets[at];
    const float value = (static_cast<float>(word & 0x3fff) - pedestal) * (1.0f / t.gains[at]);
    return BITS == top2 && word >> 14 == 2 ? 0.0f : value;
}

template <int BITS>
INLINE uint32_t switched_mask(const uint16_t *raw) {
    constexpr uint16_t bits = BITS == top2 ? 0xc000 : 0x4000;
#if XC_X86
    const __m128i want = _mm_set1_epi16(static_cast<short>(bits)), zero = _mm_setzero_si128();
    const __m128i *p = reinterpret_cast<const __m128i *>(raw);
    __m128i in0[4];
    for (int k = 0; k < 4; ++k)
        in0[k] = _mm_cmpeq_epi16(_mm_and_si128(_mm_loadu_si128(p + k), want), zero);
    const uint32_t low = _mm_movemask_epi8(_mm_packs_epi16(in0[0], in0[1]));
    const uint32_t high = _mm_movemask_epi8(_mm_packs_epi16(in0[2], in0[3]));
    return ~(low | high << 16);
#else
    uint32_t found = 0;
    for (int k = 0; k < kGroup; ++k) found |= static_cast<uint32_t>((raw[k] & bits) != 0) << k;
    return found;
#endif
}

// Stage 0 for everybody; pixels that left it are listed, their constants fetched ahead, and done
// again afterwards, so that their cache misses overlap instead of stalling one by one.
template <int BITS>
INLINE void block_of_words(const uint16_t *raw, const Tables &t, size_t n, float *out) {
    constexpr int mask = BITS == none ? 0xffff : 0x3fff;
    uint16_t again[kBlock + 4];
    float values[kBlock];
    int n_again = 0;
    size_t i = 0;
    for (; i + kGroup <= n; i += kGroup) {
        for (int k = 0; k < kGroup; ++k)
            out[i + k] = (static_cast<float>(raw[i + k] & mask) - t.pedestal[i + k]) *
                         t.factor[i + k];
        if (BITS == none) continue;
        uint32_t left = switched_mask<BITS>(raw + i);
        if (!left) continue;
        // How many there are is random: writing four places every time is cheaper than a
        // mispredicted loop end.
        int found = 0;
        do {
            for (int k = 0; k < 4; ++k, left &= left - 1) {
                again[n_again + k] = static_cast<uint16_t>(i + __builtin_ctz(left | 1u << 31));
                found += left != 0;
            }
            n_again += found;
            found = 0;
        } while (left);
    }
    for (; i < n; ++i) {
        out[i] = (static_cast<float>(raw[i] & mask) - t.pedestal[i]) * t.factor[i];
        if (BITS != none && (raw[i] >> 14 & (BITS == top2 ? 3 : 1)))
            again[n_again++] = static_cast<uint16_t>(i);
    }
    for (int k = 0; k < n_again; ++k) {
        const size_t at = stage_at<BITS>(raw[again[k]], t, again[k]);
        __builtin_prefetch(t.pedestals + at);
        __builtin_prefetch(t.gains + at);
    }
    for (int k = 0; k < n_again; ++k) {
        const size_t j = again[k];
        const bool used = (t.factor[j] != 0.0f) & (t.pedestal[j] <= FLT_MAX);
        const float value = switched<BITS>(raw[j], t, j);
        values[k] = used ? value : out[j];
    }
    for (int k = 0; k < n_again; ++k) out[again[k]] = values[k];
}

template <int BITS>
INLINE void words_body(const uint16_t *raw, const Tables &t, size_t n, float *out) {
    for (size_t i = 0; i < n; i += kBlock)
        block_of_words<BITS>(raw + i, t.at(i), std::min<size_t>(kBlock, n - i), out + i);
}

// One gain, any type.  What is not finite becomes `fill`: 0, or the neutral element of pooling.
template <class T>
INLINE void values_body(const T *raw, const Tables &t, size_t n, float *out, float fill) {
    for (size_t i = 0; i < n; ++i) {
        const float value = (static_cast<float>(raw[i]) - t.pedestal[i]) * t.factor[i];
        if (std::is_floating_point<T>::value)
            out[i] = t.factor[i] != 0.0f ? (std::fabs(value) <= FLT_MAX ? value : fill) : 0.0f;
        else
            out[i] = t.factor[i] != 0.0f ? value : 0.0f;
    }
}

template <class T>
INLINE void any_body(const T *raw, const Tables &t, size_t n, float *out, int bits, float fill) {
    if constexpr (std::is_same<T, uint16_t>::value) {
        if (bits == top2) return words_body<top2>(raw, t, n, out);
        if (bits == bit14) return words_body<bit14>(raw, t, n, out);
        return words_body<none>(raw, t, n, out);
    } else {
        values_body<T>(raw, t, n, out, fill);
    }
}

enum Normalize { as_is = 0, clip = 1, sqrt_floor = 2 };

INLINE void normalize_body(float *v, size_t n, float scale, int mode, float limit) {
    if (mode == clip)
        for (size_t i = 0; i < n; ++i)
            v[i] = std::min(std::max(v[i] * scale, -limit), limit);
    else if (mode == sqrt_floor)
        for (size_t i = 0; i < n; ++i)
            v[i] = std::floor(std::sqrt(std::min(std::max(v[i] * scale, 0.0f), limit)));
    else
        for (size_t i = 0; i < n; ++i) v[i] *= scale;
}

struct Finish {
    float scale, limit;
    int mode;
};

// Pieces of a window's row or column that lie side by side in the frame, either way round.
struct Segments {
    const int32_t *segments;        // (n, 4) window pixel, step there, frame pixel, length (< 0: back)
    size_t count;
};

template <class T>
INLINE void gather_segments(const T *raw, const Segments &s, T *gathered) {
    for (size_t j = 0; j < s.count; ++j) {
        const int32_t *one = s.segments + 4 * j;
        // Pieces are too short for the hardware to fetch ahead.
        if (j + kAhead < s.count) {
            const int32_t *soon = one + 4 * kAhead;
            const int length = std::abs(soon[3]);
            const T *first = raw + (soon[3] > 0 ? soon[2] : soon[2] + soon[3] + 1);
            for (int k = 0; k < length; k += 64 / static_cast<int>(sizeof(T)))
                __builtin_prefetch(first + k);
            __builtin_prefetch(first + length - 1);
        }
        T *__restrict to = gathered + one[0];
        const T *__restrict from = raw + one[2];
        const int step = one[1], length = one[3];
        if (length > 0 && step == 1)
            std::memcpy(to, from, length * sizeof(T));
        else if (length > 0)
            for (int k = 0; k < length; ++k) to[k * step] = from[k];
        else if (step == 1)
            for (int k = 0; k < -length; ++k) to[k] = from[-k];
        else
            for (int k = 0; k < -length; ++k) to[k * step] = from[-k];
    }
}

// `scratch` holds a window when there are segments; in gaps it holds anything, their factor is 0.
template <class T>
INLINE void render_body(const T *raw, const int32_t *index, const Segments &segments,
                        const Tables &t, size_t n, int bits, const Finish &finish, T *scratch,
                        float *out) {
    T block[kBlock];
    if (segments.count) gather_segments<T>(raw, segments, scratch);
    for (size_t i = 0; i < n; i += kBlock) {
        const size_t m = std::min<size_t>(kBlock, n - i);
        if (!segments.count)
            for (size_t k = 0; k < m; ++k) block[k] = raw[std::max(index[i + k], 0)];
        any_body<T>(segments.count ? scratch + i : block, t.at(i), m, out + i, bits, 0.0f);
        normalize_body(out + i, m, finish.scale, finish.mode, finish.limit);
    }
}

struct Strips {
    const int32_t *strips;          // (n, 5) first column, runs, pixels per run, target, step
    const int64_t *row_strips;
    const uint8_t *repeats;
    size_t rows, columns;
};

// STEP 0 and LENGTH 0 stand for any; the constant ones become vector code.
template <int LENGTH, int STEP>
INLINE void strip_body(const float *__restrict from, int runs, int length, float *__restrict to,
                       int step) {
    const int each = LENGTH ? LENGTH : length, move = STEP ? STEP : step;
    for (int r = 0; r < runs; ++r) {
        float most = from[r * each];
        for (int k = 1; k < each; ++k) most = std::max(most, from[r * each + k]);
        to[r * move] = std::max(to[r * move], most);
    }
}

template <int LENGTH>
INLINE void runs_body(const float *from, int runs, int length, float *to, int step) {
    if (step == 1) strip_body<LENGTH, 1>(from, runs, length, to, step);
    else if (step == -1) strip_body<LENGTH, -1>(from, runs, length, to, step);
    else strip_body<LENGTH, 0>(from, runs, length, to, step);
}

INLINE void row_to_window(const float *row, const Strips &s, size_t r, float *out) {
    for (int64_t j = s.row_strips[r]; j < s.row_strips[r + 1]; ++j) {
        const int32_t *strip = s.strips + 5 * j;
        const float *from = row + strip[0];
        float *to = out + strip[3];
        switch (strip[2]) {
            case 1: runs_body<1>(from, strip[1], 1, to, strip[4]); break;
            case 2: runs_body<2>(from, strip[1], 2, to, strip[4]); break;
            case 4: runs_body<4>(from, strip[1], 4, to, strip[4]); break;
            default: runs_body<0>(from, strip[1], strip[2], to, strip[4]);
        }
    }
}

// Rows that go to the same window pixels are first reduced among themselves, column by column.
template <class T>
INLINE void pool_body(const T *raw, const Tables &t, const Strips &s, int bits,
                      const Finish &finish, float *row, float *most, float *out, size_t n_out) {
    std::fill(out, out + n_out, kBarred);
    ptrdiff_t pending = -1;
    for (size_t r = 0; r < s.rows; ++r) {
        if (s.row_strips[r] == s.row_strips[r + 1]) continue;
        const int32_t *last = s.strips + 5 * (s.row_strips[r + 1] - 1);
        const size_t first = s.strips[5 * s.row_strips[r]];
        const size_t n = last[0] + last[1] * last[2] - first, at = r * s.columns + first;
        if (pending >= 0 && s.repeats[r]) {
            any_body<T>(raw + at, t.at(at), n, row + first, bits, kBarred);
            for (size_t i = first; i < first + n; ++i) most[i] = std::max(most[i], row[i]);
        } else {
            if (pending >= 0) row_to_window(most, s, pending, out);
            any_body<T>(raw + at, t.at(at), n, most + first, bits, kBarred);
            pending = r;
        }
    }
    if (pending >= 0) row_to_window(most, s, pending, out);
    for (size_t i = 0; i < n_out; ++i) out[i] = out[i] > kBarred ? out[i] : 0.0f;
    normalize_body(out, n_out, finish.scale, finish.mode, finish.limit);
}

// The mean of the pixels that are not barred, in the frame's order and in double precision, so that
// every variant and the numpy reference add the same numbers one after the other.
template <class T>
INLINE void pool_mean_body(const T *raw, const Tables &t, const Strips &s, int bits,
                           const Finish &finish, float *row, double *sums, int32_t *counts,
                           float *out, size_t n_out) {
    std::fill(sums, sums + n_out, 0.0);
    std::fill(counts, counts + n_out, 0);
    for (size_t r = 0; r < s.rows; ++r) {
        if (s.row_strips[r] == s.row_strips[r + 1]) continue;
        const int32_t *last = s.strips + 5 * (s.row_strips[r + 1] - 1);
        const size_t first = s.strips[5 * s.row_strips[r]];
        const size_t n = last[0] + last[1] * last[2] - first, at = r * s.columns + first;
        any_body<T>(raw + at, t.at(at), n, row + first, bits, kBarred);
        for (int64_t j = s.row_strips[r]; j < s.row_strips[r + 1]; ++j) {
            const int32_t *strip = s.strips + 5 * j;
            const float *from = row + strip[0];
            for (int k = 0; k < strip[1]; ++k, from += strip[2]) {
                const int32_t to = strip[3] + k * strip[4];
                double sum = sums[to];
                int32_t good = 0;
                for (int i = 0; i < strip[2]; ++i) {
                    const bool there = from[i] > kBarred;
                    sum += there ? static_cast<double>(from[i]) : 0.0;
                    good += there;
                }
                sums[to] = sum;
                counts[to] += good;
            }
        }
    }
    for (size_t i = 0; i < n_out; ++i)
        out[i] = counts[i] ? static_cast<float>(sums[i] / counts[i]) : 0.0f;
    normalize_body(out, n_out, finish.scale, finish.mode, finish.limit);
}

template <class T>
struct For {
    KERNEL(calibrate, (const T *raw, const Tables &t, size_t n, float *out, int bits, float fill),
           (raw, t, n, out, bits, fill))
    KERNEL(render,
           (const T *raw, const int32_t *index, const Segments &segments, const Tables &t,
            size_t n, int bits, const Finish &finish, T *scratch, float *out),
           (raw, index, segments, t, n, bits, finish, scratch, out))
    KERNEL(pool,
           (const T *raw, const Tables &t, const Strips &s, int bits, const Finish &finish,
            float *row, float *most, float *out, size_t n_out),
           (raw, t, s, bits, finish, row, most, out, n_out))
    KERNEL(pool_mean,
           (const T *raw, const Tables &t, const Strips &s, int bits, const Finish &finish,
            float *row, double *sums, int32_t *counts, float *out, size_t n_out),
           (raw, t, s, bits, finish, row, sums, counts, out, n_out))

   private:
    static INLINE void calibrate_body(const T *raw, const Tables &t, size_t n, float *out, int bits,
                                      float fill) {
        any_body<T>(raw, t, n, out, bits, fill);
    }
    template <class... A>
    static INLINE void render_body(A &&...a) {
        ::render_body<T>(std::forward<A>(a)...);
    }
    template <class... A>
    static INLINE void pool_body(A &&...a) {
        ::pool_body<T>(std::forward<A>(a)...);
    }
    template <class... A>
    static INLINE void pool_mean_body(A &&...a) {
        ::pool_mean_body<T>(std::forward<A>(a)...);
    }
};

// --- Python -----------------------------------------------------------------------------------------

template <class T>
const T *pointer(const py::object &object, const char *name, size_t at_least) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array>(object))
        throw py::type_error(std::string(name) + ": not an array");
    const py::array array = py::reinterpret_borrow<py::array>(object);
    if (!py::dtype::of<T>().equal(array.dtype()) ||
        !(array.flags() & py::array::c_style) || static_cast<size_t>(array.size()) < at_least)
        throw py::value_error(std::string(name) + ": not a contiguous array of the right type and "
                              "size");
    return static_cast<const T *>(array.data());
}

int bits_of(const std::string &name) {
    if (name == "top2") return top2;
    if (name == "bit14") return bit14;
    if (name == "none") return none;
    throw py::value_error("gain_bits " + name + " is none of none, top2, bit14");
}

Tables tables_of(const py::object &pedestal, const py::object &factor, const py::object &pedestals,
                 const py::object &gains, const py::object &offsets, int bits, size_t n) {
    const size_t stages = bits == top2 ? 3 : bits == bit14 ? 2 : 0;
    Tables t{pointer<float>(pedestal, "pedestal", n), pointer<float>(factor, "factor", n),
             pointer<float>(pedestals, "pedestals", stages * n),
             pointer<float>(gains, "gains", stages * n),
             pointer<float>(offsets, "offsets", stages * n), n};
    if (!t.pedestal || !t.factor || (stages && !(t.pedestals && t.gains)))
        throw py::value_error("constants of a gain stage are missing");
    return t;
}

float *writable(const py::array &out, size_t n) {
    py::object object = out;
    const float *data = pointer<float>(object, "out", n);
    if (!out.writeable()) throw py::value_error("out: not writeable");
    return const_cast<float *>(data);
}

// Calls visit(pointer) with the frame's pixels as their own type.
template <class Visit>
void with_pixels(const py::array &raw, Visit visit) {
    if (!(raw.flags() & py::array::c_style)) throw py::value_error("raw: not contiguous");
    const void *data = raw.data();
    const char kind = raw.dtype().kind();
    const auto size = raw.dtype().itemsize();
    if (kind == 'u' && size == 2) return visit(static_cast<const uint16_t *>(data));
    if (kind == 'u' && size == 1) return visit(static_cast<const uint8_t *>(data));
    if (kind == 'u' && size == 4) return visit(static_cast<const uint32_t *>(data));
    if (kind == 'i' && size == 2) return visit(static_cast<const int16_t *>(data));
    if (kind == 'i' && size == 4) return visit(static_cast<const int32_t *>(data));
    if (kind == 'f' && size == 4) return visit(static_cast<const float *>(data));
    if (kind == 'f' && size == 8) return visit(static_cast<const double *>(data));
    throw py::value_error("raw: no kernel for this type");
}

template <class P>
using Pixel = typename std::remove_const<typename std::remove_pointer<P>::type>::type;

void calibrate(const py::array &raw, const py::object &pedestal, const py::object &factor,
               const py::object &pedestals, const py::object &gains, const py::object &offsets,
               const std::string &gain_bits, const py::array &out) {
    const size_t n = raw.size();
    const int bits = bits_of(gain_bits);
    const Tables t = tables_of(pedestal, factor, pedestals, gains, offsets, bits, n);
    float *to = writable(out, n);
    with_pixels(raw, [&](auto *pixels) {
        py::gil_scoped_release free;
        For<Pixel<decltype(pixels)>>::calibrate(pixels, t, n, to, bits, 0.0f);
    });
}

void render(const py::array &raw, const py::object &index, const py::object &segments,
            const py::object &pedestal, const py::object &factor, const py::object &pedestals, const py::object &gains,
            const std::string &gain_bits, float scale, int mode, float limit,
            const py::array &out) {
    const size_t n = out.size();
    const int bits = bits_of(gain_bits);
    const Tables t = tables_of(pedestal, factor, pedestals, gains, py::none(), bits, n);
    const int32_t *from = pointer<int32_t>(index, "index", n);
    if (!from) throw py::value_error("index is missing");
    float *to = writable(out, n);
    const Finish finish{scale, limit, mode};
    const Segments beside{pointer<int32_t>(segments, "segments", 0),
                          segments.is_none() ? 0 : py::len(segments)};
    with_pixels(raw, [&](auto *pixels) {
        using T = Pixel<decltype(pixels)>;
        static thread_local std::vector<T> scratch;
        if (scratch.size() < n) scratch.resize(n);
        py::gil_scoped_release free;
        For<T>::render(pixels, from, beside, t, n, bits, finish, scratch.data(), to);
    });
}

Strips strips_of(const py::array &raw, const py::object &strips, const py::object &row_strips,
                 const py::object &repeats) {
    if (raw.ndim() < 1) throw py::value_error("raw: no rows");
    const size_t columns = raw.shape(raw.ndim() - 1);
    const size_t rows = columns ? raw.size() / columns : 0;
    return {pointer<int32_t>(strips, "strips", 0),
            pointer<int64_t>(row_strips, "row_strips", rows + 1),
            pointer<uint8_t>(repeats, "repeats", rows), rows, columns};
}

void pool(const py::array &raw, const py::object &pedestal, const py::object &factor,
          const py::object &pedestals, const py::object &gains, const py::object &offsets,
          const std::string &gain_bits, const py::object &strips, const py::object &row_strips,
          const py::object &repeats, float scale, int mode, float limit, const py::array &out) {
    const Strips s = strips_of(raw, strips, row_strips, repeats);
    const int bits = bits_of(gain_bits);
    const Tables t = tables_of(pedestal, factor, pedestals, gains, offsets, bits, raw.size());
    float *to = writable(out, 0);
    const size_t n_out = out.size();
    const Finish finish{scale, limit, mode};
    std::vector<float> row(s.columns), most(s.columns);
    with_pixels(raw, [&](auto *pixels) {
        py::gil_scoped_release free;
        For<Pixel<decltype(pixels)>>::pool(pixels, t, s, bits, finish, row.data(), most.data(), to,
                                           n_out);
    });
}

void pool_mean(const py::array &raw, const py::object &pedestal, const py::object &factor,
               const py::object &pedestals, const py::object &gains, const py::object &offsets,
               const std::string &gain_bits, const py::object &strips,
               const py::object &row_strips, const py::object &repeats, float scale, int mode,
               float limit, const py::array &out) {
    const Strips s = strips_of(raw, strips, row_strips, repeats);
    const int bits = bits_of(gain_bits);
    const Tables t = tables_of(pedestal, factor, pedestals, gains, offsets, bits, raw.size());
    float *to = writable(out, 0);
    const size_t n_out = out.size();
    const Finish finish{scale, limit, mode};
    std::vector<float> row(s.columns);
    std::vector<double> sums(n_out);
    std::vector<int32_t> counts(n_out);
    with_pixels(raw, [&](auto *pixels) {
        py::gil_scoped_release free;
        For<Pixel<decltype(pixels)>>::pool_mean(pixels, t, s, bits, finish, row.data(),
                                                sums.data(), counts.data(), to, n_out);
    });
}

}  // namespace

PYBIND11_MODULE(calibrate, m) {
    m.doc() = "Compiled calibration; called through xfel_classify.preprocess.";
    m.def("calibrate", &calibrate, "raw, pedestal, factor, pedestals, gains, offsets, bits, out");
    m.def("render", &render,
          "raw, index, segments, pedestal, factor, pedestals, gains, bits, scale, mode, "
          "limit, out");
    m.def("pool", &pool,
          "raw, pedestal, factor, pedestals, gains, offsets, bits, strips, row_strips, repeats, "
          "scale, mode, limit, out");
    m.def("pool_mean", &pool_mean, "as pool; the mean instead of the largest value");
    m.def("variants", &variants::available, "instruction sets of this machine");
    m.def("set_variant", &variants::set_variant, "use this instruction set from now on");
}
