// Statistics of the pixels of each ring (rounded radius) of a frame, and its candidate pixels.
//
// Pixels are visited ring by ring inside blocks of 65,536 pixels (16-bit offsets, and a block
// stays in the second-level cache).  A small sample tells of each ring an inner interval J that
// no iteration is expected to cut into: pixels inside J are summed once, the few others go on a
// list, and the iterations and the choice of candidates look at the list only.  Where an
// iteration does cut into J the ring is summed again with a narrower J: a misleading sample costs
// time, never correctness.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "ring_kernels.h"

namespace rings {

constexpr uint32_t kBlock = 65536;
constexpr uint16_t kNoBin = 0xFFFF;
constexpr int kIterations = 5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Clipping {
    float minimum_snr, adc_threshold;
};

class RingStatistics {
public:
    // `radius` in pixels; `good` 0 = ignore; at most `fast_samples` pixels per ring if sampled.
    RingStatistics(const float* radius, const uint8_t* good, int64_t pixels, int64_t fast_samples)
        : pixels_(pixels), fast_samples_(fast_samples) {
        prepare(radius, good);
    }

    // Mean and upper limit of every ring from all of its pixels, and the pixels above it.
    void exact(const float* values, const Clipping& clipping) {
        std::fill(above_.begin(), above_.end(), 0);
        sample_statistics(values, clipping, guide_sample_, guide_start_, false);
        full_statistics(values, clipping);
    }

    // The same from a sample of each ring.
    void sampled(const float* values, const Clipping& clipping) {
        std::fill(above_.begin(), above_.end(), 0);
        sample_statistics(values, clipping, fast_sample_, fast_start_, true);
        screen(values);
    }

    std::vector<uint16_t> bin_;          // ring of each pixel; kNoBin where masked
    std::vector<float> mean_, threshold_;  // of each ring
    std::vector<uint64_t> above_;        // one bit per pixel: above its ring's limit

private:
    int64_t pixels_, fast_samples_;
    int bins_ = 0;
    SumKernel sum_ = sum_kernel();
    ScreenKernel screen_ = screen_kernel();
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
    std::vector<float> list_value_, sorted_value_, ring_value_;
    std::vector<uint16_t> list_offset_;
    std::vector<uint32_t> sorted_position_, ring_position_;
    struct Run {  // what one segment appended to the list
        uint32_t segment, start;
    };
    std::vector<Run> runs_;

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
        void tighten(const Moments& m, float centre, const Clipping& clipping) {
            mean = 0, sigma = 0, low = 0, high = kInfinity;
            if (m.n == 0) return;  // nothing was left of the ring: start again from what is > 0
            const double shift = m.s / m.n, origin = centre;
            sigma = std::sqrt(std::max(0.0, m.s2 / m.n - shift * shift));
            // In float32 as the reference has it where that is exact enough: with photon counts
            // a limit can fall on a count, and the last bit decides.
            const float count = static_cast<float>(m.n);
            const float total = static_cast<float>(m.s + m.n * origin);
            const float squares =
                static_cast<float>(m.s2 + 2 * origin * m.s + m.n * origin * origin);
            mean = total / count;
            float spread = std::sqrt(std::max(0.0f, squares / count - mean * mean));
            if (!(std::fabs(spread - sigma) <= 1e-4 * sigma)) spread = static_cast<float>(sigma);
            low = mean - clipping.minimum_snr * spread;
            high = mean + clipping.minimum_snr * spread;
            if (high < clipping.adc_threshold) high = clipping.adc_threshold;
        }
    };

    // Five iterations over a sample of each ring: final statistics (fast mode), or a guess of
    // the interval that the exact iterations will keep.
    void sample_statistics(const float* values, const Clipping& clipping,
                           const std::vector<uint32_t>& sample, const std::vector<uint32_t>& start,
                           bool final) {
        for (int b = 0; b < bins_; b++) {
            ring_value_.clear();
            for (uint32_t k = start[b]; k < start[b + 1]; k++)
                if (std::isfinite(values[sample[k]])) ring_value_.push_back(values[sample[k]]);
            if (ring_value_.empty()) {
                inside_[b] = {1.0f, -1.0f, 0.0f};
                mean_[b] = 0.0f, threshold_[b] = clipping.adc_threshold;
                continue;
            }
            // a value of the sample as origin: differences of photon counts stay exact
            const size_t middle = ring_value_.size() / 2;
            const float centre = ring_value_[middle];
            Cut cut;
            Clipping unfloored = clipping;
            if (!final) unfloored.adc_threshold = -kInfinity;
            for (int k = 0; k < kIterations; k++) {
                Moments m;
                for (float v : ring_value_)
                    if (v > cut.low && v < cut.high) m.add(v, centre);
                cut.tighten(m, centre, unfloored);
            }
            mean_[b] = cut.mean, threshold_[b] = cut.high;
            const float half = static_cast<float>(0.7 * clipping.minimum_snr * cut.sigma);
            inside_[b] = {cut.mean - half, cut.mean + half, centre};
        }
    }

    void full_statistics(const float* values, const Clipping& clipping) {
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
            finish_ring(values, clipping, b, sorted_value_.data() + outside[b],
                        sorted_position_.data() + outside[b], outside[b + 1] - outside[b]);
    }

    void finish_ring(const float* values, const Clipping& clipping, int b,
                     const float* outside, const uint32_t* position, size_t n) {
        Cut cut;
        for (int k = 0; k < kIterations; k++) {
            const Interval inside = inside_[b];
            const bool cuts = inside.low <= inside.high &&
                              !(cut.low < inside.low && cut.high > inside.high);
            if (cuts) {
                const float half = static_cast<float>(0.5 * clipping.minimum_snr * cut.sigma);
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
            cut.tighten(m, inside_[b].centre, clipping);
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
};

}  // namespace rings
