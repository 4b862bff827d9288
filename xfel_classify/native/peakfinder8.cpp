// peakfinder8: Bragg peaks above a radially averaged background.
//
// Written from the published description, A. Barty et al., J. Appl. Cryst. 47 (2014) 1118-1131,
// doi 10.1107/S1600576714007626, section "peak finding", and from what psana's binary answers
// to probe frames.  The rules are listed in analyses/peakfinder8.py, the numpy reference.
//
// Radial statistics.  Pixels are visited ring by ring inside blocks of 65,536 pixels (16-bit
// indices, a block stays in the second-level cache).  A ring knows from a small sample an inner
// interval J that no iteration will ever cut into: pixels inside J are summed once, the few
// others go on a list, and the five iterations (and the search for candidates) look at the list
// only.  Where an iteration does cut into J, the ring is summed again with a narrower J: the
// sample costs time when it misleads, never correctness.
//
// All variants (AVX-512, AVX2, plain) add in the same 16 lanes without contraction: same bits.
#pragma GCC optimize("fp-contract=off")
#include <immintrin.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kLanes = 16;
constexpr uint32_t kBlock = 65536;
constexpr uint16_t kNoBin = 0xFFFF;
constexpr int kIterations = 5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Interval {
    float low, high;  // closed
    float centre;     // values are summed relative to it
};

struct Sums {
    float s[kLanes], s2[kLanes];
};

// Sums of v - centre and its square over the pixels inside `inside`; the others are appended to
// (values, offsets).  Returns how many were appended.
using SumKernel = int (*)(const float* block, const uint16_t* offsets, int n, Interval inside,
                          Sums& sums, float* out_values, uint16_t* out_offsets);

inline int sum_tail(const float* block, const uint16_t* offsets, int from, int n, Interval inside,
                    Sums& sums, float* out_values, uint16_t* out_offsets, int appended) {
    for (int i = from; i < n; i++) {
        const float v = block[offsets[i]];
        const bool in = v >= inside.low && v <= inside.high;
        const float d = in ? v - inside.centre : 0.0f;
        sums.s[i % kLanes] += d;
        sums.s2[i % kLanes] += d * d;
        if (!in) {
            out_values[appended] = v;
            out_offsets[appended++] = offsets[i];
        }
    }
    return appended;
}

int sum_plain(const float* block, const uint16_t* offsets, int n, Interval inside, Sums& sums,
              float* out_values, uint16_t* out_offsets) {
    std::fill_n(sums.s, 2 * kLanes, 0.0f);
    return sum_tail(block, offsets, 0, n, inside, sums, out_values, out_offsets, 0);
}

__attribute__((target("avx2"))) int sum_avx2(const float* block, const uint16_t* offsets, int n,
                                             Interval inside, Sums& sums, float* out_values,
                                             uint16_t* out_offsets) {
    const __m256 low = _mm256_set1_ps(inside.low), high = _mm256_set1_ps(inside.high);
    const __m256 centre = _mm256_set1_ps(inside.centre);
    __m256 s[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256 s2[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int i = 0, appended = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int h = 0; h < 2; h++) {
            const __m128i packed =
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets + i + 8 * h));
            const __m256 v = _mm256_i32gather_ps(block, _mm256_cvtepu16_epi32(packed), 4);
            const __m256 in = _mm256_and_ps(_mm256_cmp_ps(v, low, _CMP_GE_OQ),
                                            _mm256_cmp_ps(v, high, _CMP_LE_OQ));
            const __m256 d = _mm256_and_ps(in, _mm256_sub_ps(v, centre));
            s[h] = _mm256_add_ps(s[h], d);
            s2[h] = _mm256_add_ps(s2[h], _mm256_mul_ps(d, d));
            unsigned outside = 0xFFu & ~static_cast<unsigned>(_mm256_movemask_ps(in));
            while (outside) {
                const int k = i + 8 * h + __builtin_ctz(outside);
                outside &= outside - 1;
                out_values[appended] = block[offsets[k]];
                out_offsets[appended++] = offsets[k];
            }
        }
    }
    for (int h = 0; h < 2; h++) {
        _mm256_storeu_ps(sums.s + 8 * h, s[h]);
        _mm256_storeu_ps(sums.s2 + 8 * h, s2[h]);
    }
    return sum_tail(block, offsets, i, n, inside, sums, out_values, out_offsets, appended);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) int sum_avx512(
    const float* block, const uint16_t* offsets, int n, Interval inside, Sums& sums,
    float* out_values, uint16_t* out_offsets) {
    const __m512 low = _mm512_set1_ps(inside.low), high = _mm512_set1_ps(inside.high);
    const __m512 centre = _mm512_set1_ps(inside.centre);
    __m512 s = _mm512_setzero_ps(), s2 = _mm512_setzero_ps();
    int appended = 0;
    for (int i = 0; i < n; i += kLanes) {
        const int left = n - i;
        const __mmask16 valid = left >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
        const __m256i packed = _mm256_maskz_loadu_epi16(valid, offsets + i);
        const __m512 v = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid,
                                                  _mm512_cvtepu16_epi32(packed), block, 4);
        const __mmask16 in = _mm512_mask_cmp_ps_mask(
            _mm512_mask_cmp_ps_mask(valid, v, low, _CMP_GE_OQ), v, high, _CMP_LE_OQ);
        const __m512 d = _mm512_maskz_sub_ps(in, v, centre);
        s = _mm512_add_ps(s, d);
        s2 = _mm512_add_ps(s2, _mm512_mul_ps(d, d));
        unsigned outside = valid & ~in;
        while (outside) {
            const int k = i + __builtin_ctz(outside);
            outside &= outside - 1;
            out_values[appended] = block[offsets[k]];
            out_offsets[appended++] = offsets[k];
        }
    }
    _mm512_storeu_ps(sums.s, s);
    _mm512_storeu_ps(sums.s2, s2);
    return appended;
}

// Bit i of the answer: values[i] > threshold, for 64 pixels.
using ScreenKernel = uint64_t (*)(const float* values, float threshold);

uint64_t screen_plain(const float* values, float threshold) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++) bits |= static_cast<uint64_t>(values[i] > threshold) << i;
    return bits;
}

__attribute__((target("avx2"))) uint64_t screen_avx2(const float* values, float threshold) {
    const __m256 t = _mm256_set1_ps(threshold);
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) {
        const __m256 above = _mm256_cmp_ps(_mm256_loadu_ps(values + 8 * i), t, _CMP_GT_OQ);
        bits |= static_cast<uint64_t>(_mm256_movemask_ps(above) & 0xFF) << (8 * i);
    }
    return bits;
}

__attribute__((target("avx512f"))) uint64_t screen_avx512(const float* values, float threshold) {
    const __m512 t = _mm512_set1_ps(threshold);
    uint64_t bits = 0;
    for (int i = 0; i < 4; i++) {
        const __mmask16 above =
            _mm512_cmp_ps_mask(_mm512_loadu_ps(values + 16 * i), t, _CMP_GT_OQ);
        bits |= static_cast<uint64_t>(above) << (16 * i);
    }
    return bits;
}

struct Parameters {
    int64_t max_num_peaks, min_pixel_count, max_pixel_count, local_bg_radius;
    float adc_threshold, minimum_snr;
    bool carry_over;
};

struct Peak {
    int64_t panel;
    double fs, ss, total, maximum, sigma, snr, background;
    int64_t npix;
};

struct Position {
    int ss, fs;
};

// Neighbours in the order in which they join a region: it decides the order of the float32 sums.
constexpr int kNeighbourSs[9] = {0, -1, -1, -1, 0, 0, 1, 1, 1};
constexpr int kNeighbourFs[9] = {0, -1, 0, 1, -1, 1, -1, 0, 1};

class PeakFinder {
public:
    PeakFinder(py::array_t<float, py::array::c_style | py::array::forcecast> radius,
               py::array_t<uint8_t, py::array::c_style | py::array::forcecast> good,
               int64_t asics_ss, int64_t asics_fs, int64_t fast_samples, const std::string& isa) {
        if (radius.ndim() != 3 || good.ndim() != 3 ||
            !std::equal(radius.shape(), radius.shape() + 3, good.shape()))
            throw std::invalid_argument("radius and good must be of one shape (P, S, F)");
        panels_ = radius.shape(0), height_ = radius.shape(1), width_ = radius.shape(2);
        pixels_ = panels_ * height_ * width_;
        if (asics_ss < 1 || asics_fs < 1 || height_ % asics_ss || width_ % asics_fs)
            throw std::invalid_argument("the asic grid does not divide the panel");
        asic_height_ = height_ / asics_ss, asic_width_ = width_ / asics_fs;
        fast_samples_ = fast_samples;
        choose_kernels(isa);
        prepare(radius.data(), good.data());
    }

    py::tuple find(py::array_t<float, py::array::c_style> frame, const Parameters& parameters,
                   bool fast) {
        if (frame.size() != pixels_) throw std::invalid_argument("frame has another shape");
        const float* values = frame.data();
        std::vector<Peak> peaks;
        int64_t found = 0;
        {
            py::gil_scoped_release release;
            std::fill(above_.begin(), above_.end(), 0);
            if (fast) {
                sample_statistics(values, parameters, fast_sample_, fast_start_, true);
                screen(values);
            } else {
                sample_statistics(values, parameters, guide_sample_, guide_start_, false);
                full_statistics(values, parameters);
            }
            found = search(values, parameters, peaks);
        }
        const auto n = static_cast<py::ssize_t>(peaks.size());
        py::array_t<int16_t> panel(n), npix(n);
        py::array_t<float> fs(n), ss(n), total(n), maximum(n), sigma(n), snr(n), background(n);
        for (py::ssize_t i = 0; i < n; i++) {
            const Peak& p = peaks[i];
            panel.mutable_at(i) = static_cast<int16_t>(p.panel);
            npix.mutable_at(i) = static_cast<int16_t>(std::min<int64_t>(p.npix, 32767));
            fs.mutable_at(i) = static_cast<float>(p.fs);
            ss.mutable_at(i) = static_cast<float>(p.ss);
            total.mutable_at(i) = static_cast<float>(p.total);
            maximum.mutable_at(i) = static_cast<float>(p.maximum);
            sigma.mutable_at(i) = static_cast<float>(p.sigma);
            snr.mutable_at(i) = static_cast<float>(p.snr);
            background.mutable_at(i) = static_cast<float>(p.background);
        }
        return py::make_tuple(panel, fs, ss, total, maximum, snr, npix, sigma, background, found);
    }

    // Per radial bin: mean, threshold of the latest frame (for tests and display).
    py::tuple radial() const {
        return py::make_tuple(py::array_t<float>(mean_.size(), mean_.data()),
                              py::array_t<float>(threshold_.size(), threshold_.data()));
    }

private:
    int64_t panels_, height_, width_, pixels_, asic_height_, asic_width_, fast_samples_;
    int bins_ = 0;
    SumKernel sum_ = sum_plain;
    ScreenKernel screen_ = screen_plain;
    std::vector<uint16_t> bin_;       // per pixel; kNoBin where masked
    std::vector<uint16_t> offsets_;   // pixels of a block, ordered by bin
    struct Segment {
        uint32_t block, start, length;
        uint16_t bin;
    };
    std::vector<Segment> segments_;             // block by block, bins ascending
    std::vector<uint32_t> by_bin_, by_bin_start_;  // segment numbers of each bin
    std::vector<uint32_t> good_count_;
    std::vector<uint32_t> guide_sample_, guide_start_, fast_sample_, fast_start_;
    std::vector<uint16_t> chunk_low_, chunk_high_;  // bins that occur in 256 pixels
    // of the frame in hand
    std::vector<Interval> inside_;
    std::vector<double> inside_s_, inside_s2_;
    std::vector<uint32_t> inside_n_;
    std::vector<float> mean_, threshold_;
    std::vector<float> list_value_, sorted_value_, ring_value_;
    std::vector<uint16_t> list_offset_;
    std::vector<uint32_t> sorted_position_, ring_position_;
    struct Run {  // what one segment appended to the list
        uint32_t segment, start;
    };
    std::vector<Run> runs_;
    std::vector<uint64_t> above_;
    std::vector<Position> region_;  // outlives a search on purpose, see grow()

    void choose_kernels(const std::string& isa) {
        __builtin_cpu_init();
        const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl");
        const bool has256 = __builtin_cpu_supports("avx2");
        if ((isa == "avx512" && !has512) || (isa == "avx2" && !has256))
            throw std::invalid_argument("this processor has no " + isa);
        if (isa == "avx512" || (isa.empty() && has512)) {
            sum_ = sum_avx512, screen_ = screen_avx512;
        } else if (isa == "avx2" || (isa.empty() && has256)) {
            sum_ = sum_avx2, screen_ = screen_avx2;
        } else if (!isa.empty() && isa != "plain") {
            throw std::invalid_argument("unknown instruction set " + isa);
        }
    }

    void prepare(const float* radius, const uint8_t* good) {
        bin_.assign(pixels_, kNoBin);
        for (int64_t i = 0; i < pixels_; i++) {
            if (!good[i] || !std::isfinite(radius[i])) continue;
            const float r = std::nearbyintf(std::fabs(radius[i]));  // ties to even
            if (r >= kNoBin) throw std::invalid_argument("a radius exceeds 65534 pixels");
            bin_[i] = static_cast<uint16_t>(r);
            bins_ = std::max(bins_, static_cast<int>(r) + 1);
        }
        good_count_.assign(bins_, 0);
        for (uint16_t b : bin_)
            if (b != kNoBin) good_count_[b]++;
        offsets_.reserve(pixels_);
        std::vector<uint32_t> start(bins_ + 1), cursor(bins_);
        for (int64_t from = 0, block = 0; from < pixels_; from += kBlock, block++) {
            const uint32_t n = static_cast<uint32_t>(std::min<int64_t>(kBlock, pixels_ - from));
            std::fill(start.begin(), start.end(), 0);
            for (uint32_t i = 0; i < n; i++)
                if (bin_[from + i] != kNoBin) start[bin_[from + i] + 1]++;
            for (int b = 0; b < bins_; b++) start[b + 1] += start[b];
            const uint32_t first = static_cast<uint32_t>(offsets_.size());
            offsets_.resize(first + start[bins_]);
            std::copy(start.begin(), start.end() - 1, cursor.begin());
            for (uint32_t i = 0; i < n; i++)
                if (bin_[from + i] != kNoBin)
                    offsets_[first + cursor[bin_[from + i]]++] = static_cast<uint16_t>(i);
            for (int b = 0; b < bins_; b++)
                if (start[b + 1] > start[b])
                    segments_.push_back({static_cast<uint32_t>(block), first + start[b],
                                         start[b + 1] - start[b], static_cast<uint16_t>(b)});
        }
        by_bin_start_.assign(bins_ + 1, 0);
        for (const Segment& g : segments_) by_bin_start_[g.bin + 1]++;
        for (int b = 0; b < bins_; b++) by_bin_start_[b + 1] += by_bin_start_[b];
        by_bin_.resize(segments_.size());
        std::vector<uint32_t> fill(by_bin_start_.begin(), by_bin_start_.end() - 1);
        for (uint32_t g = 0; g < segments_.size(); g++) by_bin_[fill[segments_[g].bin]++] = g;
        choose_sample(64, guide_sample_, guide_start_);
        choose_sample(fast_samples_, fast_sample_, fast_start_);
        for (int64_t from = 0; from < pixels_; from += 256) {
            uint16_t low = kNoBin, high = 0;
            for (int64_t i = from; i < std::min(from + 256, pixels_); i++)
                if (bin_[i] != kNoBin) low = std::min(low, bin_[i]), high = std::max(high, bin_[i]);
            chunk_low_.push_back(low), chunk_high_.push_back(high);
        }
        above_.assign((pixels_ + 63) / 64, 0);
        inside_.resize(bins_), inside_s_.resize(bins_), inside_s2_.resize(bins_);
        inside_n_.resize(bins_), mean_.resize(bins_), threshold_.resize(bins_);
        region_.resize(asic_height_ * asic_width_ + 2);
        runs_.reserve(segments_.size() + 1);
    }

    // At most `most` pixels of each bin, evenly spread over the bin's pixels.
    void choose_sample(int64_t most, std::vector<uint32_t>& sample, std::vector<uint32_t>& start) {
        start.assign(1, 0);
        std::vector<uint32_t> ring;
        for (int b = 0; b < bins_; b++) {
            ring.clear();
            for (uint32_t k = by_bin_start_[b]; k < by_bin_start_[b + 1]; k++) {
                const Segment& g = segments_[by_bin_[k]];
                for (uint32_t i = 0; i < g.length; i++)
                    ring.push_back(g.block * kBlock + offsets_[g.start + i]);
            }
            const auto n = static_cast<int64_t>(ring.size());
            const int64_t take = std::min(n, most);
            for (int64_t i = 0; i < take; i++) sample.push_back(ring[(2 * i + 1) * n / (2 * take)]);
            start.push_back(static_cast<uint32_t>(sample.size()));
        }
    }

    struct Moments {
        double s = 0, s2 = 0;
        int64_t n = 0;
        void add(float v, float centre) {
            const double d = static_cast<double>(v) - centre;
            s += d, s2 += d * d, n++;
        }
    };

    struct Cut {
        float mean = 0, low = -kInfinity, high = kInfinity;  // open interval
        double sigma = 0;
        void tighten(const Moments& m, float centre, const Parameters& parameters) {
            float spread = 0;
            mean = 0, sigma = 0, low = 0, high = kInfinity;
            if (m.n == 0) return;  // nothing was left of the ring: start again from what is > 0
            {
                const double shift = m.s / m.n;
                sigma = std::sqrt(std::max(0.0, m.s2 / m.n - shift * shift));
                const double origin = centre;
                const float count = static_cast<float>(m.n);
                const float total = static_cast<float>(m.s + m.n * origin);
                const float squares =
                    static_cast<float>(m.s2 + 2 * origin * m.s + m.n * origin * origin);
                mean = total / count;
                spread = std::sqrt(std::max(0.0f, squares / count - mean * mean));
                if (std::fabs(spread - sigma) > 1e-4 * sigma) spread = static_cast<float>(sigma);
            }
            low = mean - parameters.minimum_snr * spread;
            high = mean + parameters.minimum_snr * spread;
            if (high < parameters.adc_threshold) high = parameters.adc_threshold;
        }
    };

    // Five iterations over a sample of each ring: final statistics (fast mode), or a guess of
    // the interval that the exact iterations will keep.
    void sample_statistics(const float* values, const Parameters& parameters,
                           const std::vector<uint32_t>& sample, const std::vector<uint32_t>& start,
                           bool final) {
        for (int b = 0; b < bins_; b++) {
            ring_value_.clear();
            for (uint32_t k = start[b]; k < start[b + 1]; k++)
                if (std::isfinite(values[sample[k]])) ring_value_.push_back(values[sample[k]]);
            if (ring_value_.empty()) {
                inside_[b] = {1.0f, -1.0f, 0.0f};
                mean_[b] = 0.0f, threshold_[b] = parameters.adc_threshold;
                continue;
            }
            // a value of the sample as origin: differences of photon counts stay exact
            const size_t middle = ring_value_.size() / 2;
            const float centre = ring_value_[middle];
            Cut cut;
            Parameters unfloored = parameters;
            if (!final) unfloored.adc_threshold = -kInfinity;
            for (int k = 0; k < kIterations; k++) {
                Moments m;
                for (float v : ring_value_)
                    if (v > cut.low && v < cut.high) m.add(v, centre);
                cut.tighten(m, centre, unfloored);
            }
            mean_[b] = cut.mean, threshold_[b] = cut.high;
            const float half = static_cast<float>(0.7 * parameters.minimum_snr * cut.sigma);
            inside_[b] = {cut.mean - half, cut.mean + half, centre};
        }
    }

    void full_statistics(const float* values, const Parameters& parameters) {
        std::fill(inside_s_.begin(), inside_s_.end(), 0.0);
        std::fill(inside_s2_.begin(), inside_s2_.end(), 0.0);
        std::copy(good_count_.begin(), good_count_.end(), inside_n_.begin());
        runs_.clear();
        size_t used = 0;
        Sums sums;
        std::vector<uint32_t> outside(bins_ + 1, 0);
        for (uint32_t g = 0; g < segments_.size(); g++) {
            const Segment& segment = segments_[g];
            if (list_value_.size() < used + segment.length + kLanes) {
                list_value_.resize(2 * (used + segment.length + kLanes));
                list_offset_.resize(list_value_.size());
            }
            const int appended = sum_(values + static_cast<size_t>(segment.block) * kBlock,
                                      offsets_.data() + segment.start, segment.length,
                                      inside_[segment.bin], sums, list_value_.data() + used,
                                      list_offset_.data() + used);
            double s = 0, s2 = 0;
            for (int i = 0; i < kLanes; i++) s += sums.s[i], s2 += sums.s2[i];
            inside_s_[segment.bin] += s, inside_s2_[segment.bin] += s2;
            if (appended) {
                runs_.push_back({g, static_cast<uint32_t>(used)});
                inside_n_[segment.bin] -= appended;
                outside[segment.bin + 1] += appended;
                used += appended;
            }
        }
        runs_.push_back({0, static_cast<uint32_t>(used)});
        for (int b = 0; b < bins_; b++) outside[b + 1] += outside[b];
        sorted_value_.resize(used), sorted_position_.resize(used);
        std::vector<uint32_t> cursor(outside.begin(), outside.end() - 1);
        for (size_t r = 0; r + 1 < runs_.size(); r++) {
            const Segment& segment = segments_[runs_[r].segment];
            uint32_t& to = cursor[segment.bin];
            for (uint32_t k = runs_[r].start; k < runs_[r + 1].start; k++, to++) {
                sorted_value_[to] = list_value_[k];
                sorted_position_[to] = segment.block * kBlock + list_offset_[k];
            }
        }
        for (int b = 0; b < bins_; b++)
            finish_ring(values, parameters, b, sorted_value_.data() + outside[b],
                        sorted_position_.data() + outside[b], outside[b + 1] - outside[b]);
    }

    void finish_ring(const float* values, const Parameters& parameters, int b,
                     const float* outside, const uint32_t* position, size_t n) {
        Cut cut;
        for (int k = 0; k < kIterations; k++) {
            const Interval inside = inside_[b];
            const bool cuts = inside.low <= inside.high &&
                              !(cut.low < inside.low && cut.high > inside.high);
            if (cuts) {
                const float half = static_cast<float>(0.5 * parameters.minimum_snr * cut.sigma);
                Interval narrower = {cut.mean - half, cut.mean + half, inside.centre};
                if (!(cut.low < narrower.low && cut.high > narrower.high) || inside_n_[b] == 0)
                    narrower = {1.0f, -1.0f, inside.centre};
                n = sum_again(values, b, narrower);
                outside = ring_value_.data(), position = ring_position_.data();
            }
            Moments m;
            m.s = inside_s_[b], m.s2 = inside_s2_[b], m.n = inside_n_[b];
            for (size_t i = 0; i < n; i++)
                if (outside[i] > cut.low && outside[i] < cut.high)
                    m.add(outside[i], inside_[b].centre);
            cut.tighten(m, inside_[b].centre, parameters);
        }
        mean_[b] = cut.mean, threshold_[b] = cut.high;
        if (inside_[b].low <= inside_[b].high && inside_[b].high > cut.high) {
            n = sum_again(values, b, {1.0f, -1.0f, inside_[b].centre});
            outside = ring_value_.data(), position = ring_position_.data();
        }
        for (size_t i = 0; i < n; i++)
            if (outside[i] > cut.high && outside[i] < kInfinity)
                above_[position[i] / 64] |= uint64_t{1} << (position[i] % 64);
    }

    size_t sum_again(const float* values, int b, Interval inside) {
        const size_t room = good_count_[b] + kLanes;
        ring_value_.resize(room), ring_position_.resize(room);
        list_offset_.resize(std::max(list_offset_.size(), room));
        size_t n = 0;
        double s_all = 0, s2_all = 0;
        Sums sums;
        for (uint32_t k = by_bin_start_[b]; k < by_bin_start_[b + 1]; k++) {
            const Segment& segment = segments_[by_bin_[k]];
            const int appended = sum_(values + static_cast<size_t>(segment.block) * kBlock,
                                      offsets_.data() + segment.start, segment.length, inside, sums,
                                      ring_value_.data() + n, list_offset_.data());
            for (int i = 0; i < kLanes; i++) s_all += sums.s[i], s2_all += sums.s2[i];
            for (int i = 0; i < appended; i++)
                ring_position_[n + i] = segment.block * kBlock + list_offset_[i];
            n += appended;
        }
        inside_[b] = inside;
        inside_s_[b] = s_all, inside_s2_[b] = s2_all;
        inside_n_[b] = good_count_[b] - static_cast<uint32_t>(n);
        return n;
    }

    // Candidates of the whole frame when thresholds come from a sample.
    void screen(const float* values) {
        // lowest threshold over any range of bins: a sparse table
        std::vector<std::vector<float>> lowest(1, threshold_);
        for (int width = 1; 2 * width <= bins_; width *= 2) {
            const auto& half = lowest.back();
            std::vector<float> next(bins_ - 2 * width + 1);
            for (size_t i = 0; i < next.size(); i++) next[i] = std::min(half[i], half[i + width]);
            lowest.push_back(std::move(next));
        }
        for (size_t chunk = 0; chunk < chunk_low_.size(); chunk++) {
            const int low = chunk_low_[chunk], high = chunk_high_[chunk];
            if (low == kNoBin) continue;
            const int level = 31 - __builtin_clz(high - low + 1);
            const float floor =
                std::min(lowest[level][low], lowest[level][high + 1 - (1 << level)]);
            for (int w = 0; w < 4; w++) {
                const int64_t from = static_cast<int64_t>(chunk) * 256 + 64 * w;
                if (from >= pixels_) break;
                uint64_t bits = 0;
                if (from + 64 <= pixels_) {
                    bits = screen_(values + from, floor);
                } else {
                    for (int64_t i = from; i < pixels_; i++)
                        bits |= static_cast<uint64_t>(values[i] > floor) << (i - from);
                }
                for (uint64_t left = bits; left; left &= left - 1) {
                    const int k = __builtin_ctzll(left);
                    const uint16_t b = bin_[from + k];
                    if (b == kNoBin || !(values[from + k] > threshold_[b]) ||
                        !(values[from + k] < kInfinity))
                        bits &= ~(uint64_t{1} << k);
                }
                above_[from / 64] = bits;
            }
        }
    }

    bool take(int64_t pixel) {  // true once for each candidate pixel
        const uint64_t bit = uint64_t{1} << (pixel % 64);
        if (!(above_[pixel / 64] & bit)) return false;
        above_[pixel / 64] &= ~bit;
        return true;
    }

    // Region of connected candidates around the pixel in region_[0], already taken; `corner` is
    // the asic's first pixel.  With carry_over the neighbourhood of the entry after the last is
    // visited as well, as the reference does: a position that an earlier, larger region left
    // behind, which matters when that region lay in another asic.
    int grow(int64_t corner, bool carry_over) {
        int n = 1, before = 0;
        if (carry_over) {
            while (n != before) {
                before = n;
                for (int k = 0; k <= n; k++) n = join_neighbours(corner, k, n);
            }
        } else {
            for (int k = 0; k < n; k++) n = join_neighbours(corner, k, n);
        }
        return n;
    }

    int join_neighbours(int64_t corner, int k, int n) {
        for (int i = 0; i < 9; i++) {
            // region_[k] is read again each time: joining may just have written it (k == n)
            const int ss = region_[k].ss + kNeighbourSs[i], fs = region_[k].fs + kNeighbourFs[i];
            if (ss < 0 || fs < 0 || ss >= asic_height_ || fs >= asic_width_) continue;
            if (take(corner + ss * width_ + fs)) region_[n++] = {ss, fs};
        }
        return n;
    }

    int64_t search(const float* values, const Parameters& parameters, std::vector<Peak>& peaks) {
        std::fill(region_.begin(), region_.end(), Position{0, 0});
        int64_t found = 0;
        for (int64_t top = 0; top < panels_ * height_; top += asic_height_)
            for (int64_t left = 0; left < width_; left += asic_width_)
                for (int64_t ss = 1; ss < asic_height_ - 1; ss++) {
                    const int64_t row = (top + ss) * width_ + left;
                    const int64_t end = row + asic_width_ - 1;
                    for (int64_t pixel = row + 1; pixel < end;) {
                        const uint64_t word = above_[pixel / 64] >> (pixel % 64);
                        if (!word) {
                            pixel = (pixel / 64 + 1) * 64;
                            continue;
                        }
                        pixel += __builtin_ctzll(word);
                        if (pixel >= end) break;
                        take(pixel);
                        region_[0] = {static_cast<int>(ss), static_cast<int>(pixel - row)};
                        const int n = grow(top * width_ + left, parameters.carry_over);
                        Peak peak;
                        if (n >= parameters.min_pixel_count && n <= parameters.max_pixel_count &&
                            measure(values, parameters, top, left, n, peak)) {
                            if (found++ < parameters.max_num_peaks) peaks.push_back(peak);
                        }
                        pixel++;
                    }
                }
        return found;
    }

    bool measure(const float* values, const Parameters& parameters, int64_t top, int64_t left,
                 int n, Peak& peak) const {
        const int64_t corner = top * width_ + left;
        double sum = 0, sum_ss = 0, sum_fs = 0;
        float maximum = -kInfinity;
        // float32, in this order: decides where the ring lies when the centroid is half-way
        float net = 0, net_ss = 0, net_fs = 0;
        for (int k = 0; k < n; k++) {
            const int64_t pixel = corner + region_[k].ss * width_ + region_[k].fs;
            const float v = values[pixel];
            const float above = v - mean_[bin_[pixel]];
            net += above;
            net_fs += above * static_cast<float>(left + region_[k].fs);
            net_ss += above * static_cast<float>(top + region_[k].ss);
            sum += v;
            sum_fs += static_cast<double>(v) * region_[k].fs;
            sum_ss += static_cast<double>(v) * region_[k].ss;
            maximum = std::max(maximum, v);
        }
        if (!(sum > 0) || !(net > 0)) return false;
        const double fs = sum_fs / sum, ss = sum_ss / sum;
        if (!(std::nearbyint(fs) >= 0 && std::nearbyint(fs) < asic_width_ &&
              std::nearbyint(ss) >= 0 && std::nearbyint(ss) < asic_height_))
            return false;
        const int64_t centre_fs = std::lrintf(net_fs / net) - left;
        const int64_t centre_ss = std::lrintf(net_ss / net) - top;
        const int64_t reach = 2 * parameters.local_bg_radius;
        double s = 0, s2 = 0;
        int64_t count = 0;
        for (int64_t y = std::max<int64_t>(centre_ss - reach, 0);
             y < std::min(centre_ss + reach, asic_height_); y++)
            for (int64_t x = std::max<int64_t>(centre_fs - reach, 0);
                 x < std::min(centre_fs + reach, asic_width_); x++) {
                const int64_t dy = y - centre_ss, dx = x - centre_fs;
                if (dy * dy + dx * dx > reach * reach) continue;
                const int64_t pixel = corner + y * width_ + x;
                const uint16_t b = bin_[pixel];
                if (b == kNoBin) continue;
                const float v = values[pixel];
                if (!(v < threshold_[b]) || !(v > -kInfinity)) continue;
                if (v > maximum) return false;
                s += v, s2 += static_cast<double>(v) * v, count++;
            }
        if (count == 0) return false;
        const double background = s / count;
        const double sigma = std::sqrt(std::max(0.0, s2 / count - background * background));
        if (!(sigma > 0)) return false;
        peak.total = sum - n * background;
        // float32, or a ratio that is exactly minimum_snr (photon counts) may fall below it
        const float snr = static_cast<float>(peak.total) / static_cast<float>(sigma);
        if (snr < parameters.minimum_snr) return false;
        peak.snr = snr;
        peak.panel = top / height_;
        peak.fs = fs + left, peak.ss = ss + top % height_;
        peak.maximum = maximum - background;
        peak.sigma = sigma, peak.background = background, peak.npix = n;
        return true;
    }
};

}  // namespace

PYBIND11_MODULE(peakfinder8, m) {
    m.doc() = "peakfinder8 on calibrated frames (P, S, F)";
    py::class_<Parameters>(m, "Parameters")
        .def(py::init([](int64_t max_num_peaks, float adc_threshold, float minimum_snr,
                         int64_t min_pixel_count, int64_t max_pixel_count,
                         int64_t local_bg_radius, bool carry_over) {
                 return Parameters{max_num_peaks,   min_pixel_count, max_pixel_count,
                                   local_bg_radius, adc_threshold,   minimum_snr, carry_over};
             }),
             py::kw_only(), py::arg("max_num_peaks"), py::arg("adc_threshold"),
             py::arg("minimum_snr"), py::arg("min_pixel_count"), py::arg("max_pixel_count"),
             py::arg("local_bg_radius"), py::arg("carry_over"));
    py::class_<PeakFinder>(m, "PeakFinder")
        .def(py::init<py::array_t<float, py::array::c_style | py::array::forcecast>,
                      py::array_t<uint8_t, py::array::c_style | py::array::forcecast>, int64_t,
                      int64_t, int64_t, const std::string&>(),
             py::arg("radius_PSF"), py::arg("good_PSF"), py::arg("asics_ss") = 1,
             py::arg("asics_fs") = 1, py::arg("fast_samples") = 100, py::arg("isa") = "")
        .def("find", &PeakFinder::find, py::arg("frame_PSF").noconvert(), py::arg("parameters"),
             py::arg("fast") = false)
        .def("radial", &PeakFinder::radial);
}
