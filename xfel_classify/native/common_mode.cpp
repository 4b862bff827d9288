// Exact masked medians of banks, rows and columns, subtracted in place.
//
// A median is found by bisection over the bits of ordered integer keys: 32 counting passes, each a
// plain vector loop, without sorting or copying back.  Lanes hold neighbouring columns, or rows
// after a transpose of keys into scratch; a bank is one long vector.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "variants.h"

namespace py = pybind11;

namespace {

constexpr int kLanes = 16;
constexpr size_t kAcross = 64;              // columns whose keys are made together
constexpr int32_t kMasked = INT32_MAX;      // above every finite value

// Order-preserving map of finite floats to int32; -0 and +0 become one key.
INLINE int32_t key_of(float value) {
    value += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & INT32_MAX);
}

INLINE float value_of(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

INLINE bool is_good(float value, uint8_t good) { return good && std::fabs(value) <= FLT_MAX; }

INLINE int32_t masked_key(float value, uint8_t good) {
    return is_good(value, good) ? key_of(value) : kMasked;
}

template <int WIDTH>
struct Vector {
    typedef int32_t type __attribute__((vector_size(4 * WIDTH)));
    typedef int16_t halves __attribute__((vector_size(4 * WIDTH)));
};

// Medians of WIDTH of the kLanes columns of keys (n rows).  Comparisons give 0 or -1 per lane;
// vectors live in memory only through memcpy, so that no call passes them.
template <int WIDTH>
INLINE void lane_medians_body(const int32_t *keys, int n, int minimum, float limit,
                              float *median) {
    typedef typename Vector<WIDTH>::type Lanes;
    const Lanes sign = Lanes{} + INT32_MIN, masked = Lanes{} + kMasked;
    Lanes count{}, prefix{}, upto{}, next = masked, key, second;
    for (int i = 0; i < n; ++i) {
        std::memcpy(&key, keys + i * kLanes, sizeof key);
        count -= key != masked;
    }
    const Lanes rank = (count - 1) >> 1;
    for (int bit = 31; bit >= 0; --bit) {
        const Lanes tried = prefix | static_cast<int32_t>(1u << bit);
        const Lanes at = tried ^ sign;
        Lanes below{}, more{};
        int i = 0;
        for (; i + 2 <= n; i += 2) {
            std::memcpy(&key, keys + i * kLanes, sizeof key);
            std::memcpy(&second, keys + (i + 1) * kLanes, sizeof key);
            below -= key < at;
            more -= second < at;
        }
        if (i < n) {
            std::memcpy(&key, keys + i * kLanes, sizeof key);
            below -= key < at;
        }
        const Lanes keep = below + more <= rank;
        prefix = (tried & keep) | (prefix & ~keep);
    }
    prefix ^= sign;
    for (int i = 0; i < n; ++i) {
        std::memcpy(&key, keys + i * kLanes, sizeof key);
        upto -= key <= prefix;
        const Lanes above = key > prefix, candidate = (key & above) | (masked & ~above);
        const Lanes lower = candidate < next;
        next = (candidate & lower) | (next & ~lower);
    }
    for (int l = 0; l < WIDTH; ++l) {
        median[l] = 0.0f;
        if (count[l] < minimum || count[l] < 1) continue;
        const float low = value_of(prefix[l]);
        float middle = low;
        if (count[l] % 2 == 0) {
            const float high = upto[l] > count[l] / 2 ? low : value_of(next[l]);
            middle = (low + high) / 2.0f;
        }
        if (std::fabs(middle) < limit) median[l] = middle;
    }
}

template <int WIDTH>
INLINE void all_lane_medians_body(const int32_t *keys, int n, int minimum, float limit,
                                  float *median) {
    for (int l = 0; l < kLanes; l += WIDTH)
        lane_medians_body<WIDTH>(keys + l, n, minimum, limit, median + l);
}

template <int WIDTH>
INLINE int32_t count_below(const int16_t *keys, int n, int16_t at) {
    typedef typename Vector<WIDTH>::halves Lanes;
    constexpr int lanes = 2 * WIDTH, longest = lanes * 16384;    // then a 16-bit lane might overflow
    const Lanes limit = Lanes{} + at;
    int32_t below = 0;
    int i = 0;
    while (i + 2 * lanes <= n) {
        const int stop = n - i < longest ? n : i + longest;
        Lanes some{}, more{}, key, second;
        for (; i + 2 * lanes <= stop; i += 2 * lanes) {
            std::memcpy(&key, keys + i, sizeof key);
            std::memcpy(&second, keys + i + lanes, sizeof second);
            some -= key < limit;
            more -= second < limit;
        }
        int16_t sums[2 * lanes];
        std::memcpy(sums, &some, sizeof some);
        std::memcpy(sums + lanes, &more, sizeof more);
        for (int l = 0; l < 2 * lanes; ++l) below += sums[l];
    }
    for (; i < n; ++i) below += keys[i] < at;
    return below;
}

// The key of that rank: bisection over its upper half, then over the lower half of the keys that
// share it.  `half` is scratch of n, which first holds the upper and then the lower halves.
template <int WIDTH>
INLINE int32_t long_rank_body(const int32_t *keys, int n, int32_t rank, int16_t *half) {
    for (int i = 0; i < n; ++i) half[i] = static_cast<int16_t>(keys[i] >> 16);
    uint32_t upper = 0, lower = 0;
    int32_t before = 0;
    for (int bit = 15; bit >= 0; --bit) {
        const uint32_t tried = upper | 1u << bit;
        const int32_t below = count_below<WIDTH>(half, n, static_cast<int16_t>(tried ^ 0x8000u));
        if (below <= rank) upper = tried, before = below;
    }
    const int16_t shared = static_cast<int16_t>(upper ^ 0x8000u);
    int m = 0;
    for (int i = 0; i < n; ++i) {
        half[m] = static_cast<int16_t>((keys[i] & 0xffff) ^ 0x8000);
        m += keys[i] >> 16 == shared;
    }
    for (int bit = 15; bit >= 0; --bit) {
        const uint32_t tried = lower | 1u << bit;
        if (before + count_below<WIDTH>(half, m, static_cast<int16_t>(tried ^ 0x8000u)) <= rank)
            lower = tried;
    }
    return static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(shared)) << 16 | lower);
}

// Median of one long vector of keys.
template <int WIDTH>
INLINE float long_median_body(const int32_t *keys, int n, int minimum, float limit, int16_t *half) {
    int32_t count = 0;
    for (int i = 0; i < n; ++i) count += keys[i] != kMasked;
    if (count < minimum || count < 1) return 0.0f;
    const int32_t found = long_rank_body<WIDTH>(keys, n, (count - 1) / 2, half);
    const float low = value_of(found);
    float middle = low;
    if (count % 2 == 0) {
        int32_t upto = 0, next = kMasked;
        for (int i = 0; i < n; ++i) {
            upto += keys[i] <= found;
            const int32_t above = keys[i] > found ? keys[i] : kMasked;
            next = above < next ? above : next;
        }
        middle = (low + (upto > count / 2 ? low : value_of(next))) / 2.0f;
    }
    return std::fabs(middle) < limit ? middle : 0.0f;
}

struct Frame {
    float *values;
    const uint8_t *good;
    size_t panels, rows, columns;       // of the frame
    size_t bank_rows, bank_columns;
    int minimum;
    float limit;
    int32_t *keys;                      // scratch
    float *medians;
    int16_t *half;
};

INLINE void keys_of(const float *values, const uint8_t *good, size_t n, int32_t *keys) {
    for (size_t k = 0; k < n; ++k) keys[k] = masked_key(values[k], good[k]);
}

template <int WIDTH>
INLINE void banks_body(const Frame &f) {
    const size_t all = f.panels * f.rows;
    for (size_t top = 0; top < all; top += f.bank_rows)
        for (size_t left = 0; left < f.columns; left += f.bank_columns) {
            size_t n = 0;
            for (size_t s = top; s < top + f.bank_rows; ++s, n += f.bank_columns) {
                const size_t at = s * f.columns + left;
                keys_of(f.values + at, f.good + at, f.bank_columns, f.keys + n);
            }
            const float median = long_median_body<WIDTH>(f.keys, static_cast<int>(n), f.minimum, f.limit,
                                                  f.half);
            if (median == 0.0f) continue;
            for (size_t s = top; s < top + f.bank_rows; ++s) {
                const size_t at = s * f.columns + left;
                for (size_t k = at; k < at + f.bank_columns; ++k)
                    f.values[k] = is_good(f.values[k], f.good[k]) ? f.values[k] - median
                                                                  : f.values[k];
            }
        }
}

template <int WIDTH>
INLINE void columns_body(const Frame &f) {
    const size_t all = f.panels * f.rows, n = f.bank_rows;
    for (size_t top = 0; top < all; top += n) {
        for (size_t left = 0; left < f.columns; left += kAcross) {
            const size_t across = std::min<size_t>(kAcross, f.columns - left);
            int32_t row[kAcross];
            std::fill(row, row + kAcross, kMasked);
            for (size_t s = 0; s < n; ++s) {
                const size_t at = (top + s) * f.columns + left;
                keys_of(f.values + at, f.good + at, across, row);
                for (size_t k = 0; k < kAcross / kLanes; ++k)
                    std::memcpy(f.keys + (k * n + s) * kLanes, row + k * kLanes, 4 * kLanes);
            }
            for (size_t k = 0; k * kLanes < across; ++k)
                all_lane_medians_body<WIDTH>(f.keys + k * n * kLanes, static_cast<int>(n),
                                             f.minimum, f.limit, f.medians + left + k * kLanes);
        }
        for (size_t s = top; s < top + n; ++s) {
            float *v = f.values + s * f.columns;
            const uint8_t *good = f.good + s * f.columns;
            for (size_t k = 0; k < f.columns; ++k)
                v[k] = is_good(v[k], good[k]) ? v[k] - f.medians[k] : v[k];
        }
    }
}

template <int WIDTH>
INLINE void rows_body(const Frame &f) {
    const size_t all = f.panels * f.rows, n = f.bank_columns;
    int32_t *rows = f.keys + n * kLanes;
    for (size_t top = 0; top < all; top += kLanes) {
        const size_t lanes = std::min<size_t>(kLanes, all - top);
        for (size_t left = 0; left < f.columns; left += n) {
            for (size_t l = 0; l < kLanes; ++l) {
                const size_t at = (top + std::min(l, lanes - 1)) * f.columns + left;
                keys_of(f.values + at, f.good + at, n, rows + l * n);
            }
            for (size_t k = 0; k < n; ++k)
                for (size_t l = 0; l < kLanes; ++l) f.keys[k * kLanes + l] = rows[l * n + k];
            all_lane_medians_body<WIDTH>(f.keys, static_cast<int>(n), f.minimum, f.limit,
                                         f.medians);
            for (size_t l = 0; l < lanes; ++l) {
                const size_t at = (top + l) * f.columns + left;
                const float median = f.medians[l];
                for (size_t k = at; k < at + n; ++k)
                    f.values[k] = is_good(f.values[k], f.good[k]) ? f.values[k] - median
                                                                  : f.values[k];
            }
        }
    }
}

KERNEL_OF_WIDTH(banks, (const Frame &f), (f))
KERNEL_OF_WIDTH(columns, (const Frame &f), (f))
KERNEL_OF_WIDTH(rows, (const Frame &f), (f))

void subtract(py::array_t<float, py::array::c_style> values,
              py::array_t<bool, py::array::c_style> good,
              const std::vector<std::string> &kinds,
              size_t bank_rows, size_t bank_columns, float limit, int minimum) {
    if (values.ndim() != 3 || good.size() != values.size() || !values.writeable())
        throw py::value_error("values: a writeable (P, S, F) array and its mask are needed");
    Frame f{values.mutable_data(), reinterpret_cast<const uint8_t *>(good.data()),
            static_cast<size_t>(values.shape(0)), static_cast<size_t>(values.shape(1)),
            static_cast<size_t>(values.shape(2)), bank_rows, bank_columns, minimum, limit, nullptr,
            nullptr, nullptr};
    if (!bank_rows || !bank_columns || f.rows % bank_rows || f.columns % bank_columns)
        throw py::value_error("banks do not tile the panel");
    std::vector<int32_t> keys(std::max({bank_rows * bank_columns, bank_rows * kAcross,
                                        2 * bank_columns * kLanes}));
    std::vector<float> medians(f.columns + kAcross);
    f.keys = keys.data();
    f.medians = medians.data();
    std::vector<int16_t> half(bank_rows * bank_columns);
    f.half = half.data();
    for (const auto &kind : kinds)
        if (kind != "banks" && kind != "columns" && kind != "rows")
            throw std::invalid_argument("kind " + kind + " is none of banks, rows, columns");
    py::gil_scoped_release free;
    // One row of banks after the other, all kinds each, while its pixels are in the cache.
    const size_t all = f.panels * f.rows;
    size_t tall = bank_rows;
    while (tall < 64 && all % (2 * tall) == 0) tall *= 2;
    f.panels = 1;
    f.rows = tall;
    for (size_t top = 0; top < all; top += tall) {
        for (const auto &kind : kinds) {
            if (kind == "banks") banks(f);
            else if (kind == "columns") columns(f);
            else rows(f);
        }
        f.values += tall * f.columns;
        f.good += tall * f.columns;
    }
}

}  // namespace

PYBIND11_MODULE(common_mode, m) {
    m.doc() = "Compiled common mode; called through xfel_classify.preprocess.";
    m.def("subtract", &subtract, "values, good, kinds, bank_rows, bank_columns, limit, minimum");
    m.def("variants", &variants::available, "instruction sets of this machine");
    m.def("set_variant", &variants::set_variant, "use this instruction set from now on");
}
