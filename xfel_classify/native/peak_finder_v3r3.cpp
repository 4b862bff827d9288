// peak_finder_v3r3: peaks at local maxima of a given rank, judged against a ring around them.
//
// Written from the documentation of psana's algorithm and from what psana's binary answers to
// probe frames; the rules are listed in analyses/peak_finder_v3r3.py with a numpy reference.
//
// Seeds come from a separable sliding maximum (vectorised).  Whether a ring pixel is an extremum
// of its row or column is decided when first asked for, and only around seeds that can still
// reach the amplitude threshold.
#pragma GCC optimize("fp-contract=off")
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "variants.h"

namespace py = pybind11;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kTile = 16;

// out[j] = largest of in[j - rank .. j + rank]; `in` has rank cells of -infinity on both sides.
INLINE void slide_body(const float* in, int width, int rank, float* out) {
    for (int j = 0; j < width; j++) out[j] = in[j - rank];
    for (int k = 1 - rank; k <= rank; k++)
        for (int j = 0; j < width; j++) out[j] = in[j + k] > out[j] ? in[j + k] : out[j];
}
KERNEL(slide, (const float* in, int width, int rank, float* out), (in, width, rank, out))

// into[j] = larger of into[j] and row[j].
INLINE void raise_body(const float* row, int width, float* into) {
    for (int j = 0; j < width; j++) into[j] = row[j] > into[j] ? row[j] : into[j];
}
KERNEL(raise, (const float* row, int width, float* into), (row, width, into))

struct Selection {
    float nsigm;
    int64_t npix_min, npix_max;
    float amax_thr, atot_thr, son_min;
};

struct Peak {
    int64_t panel, npix;
    double fs, ss, total, maximum, son, noise, background;
};

struct Offset {
    int ss, fs;
};

class PeakFinder {
public:
    PeakFinder(py::array_t<uint8_t, py::array::c_style | py::array::forcecast> good, int rank,
               double r0, double dr)
        : rank_(rank) {
        if (good.ndim() != 3) throw std::invalid_argument("good must have the shape (P, S, F)");
        if (rank < 1 || r0 < 0 || dr < 0)
            throw std::invalid_argument("rank must be at least 1, r0 and dr at least 0");
        panels_ = good.shape(0), height_ = static_cast<int>(good.shape(1));
        width_ = static_cast<int>(good.shape(2));
        good_.assign(good.data(), good.data() + good.size());
        reach_ = static_cast<int>(std::ceil(r0 + dr));
        for (int ss = -reach_; ss <= reach_; ss++)
            for (int fs = -reach_; fs <= reach_; fs++) {
                const double distance = std::hypot(ss, fs);
                if (distance >= r0 && distance <= r0 + dr) ring_.push_back({ss, fs});
            }
        stride_ = width_ + 2 * rank_;
        high_.assign(static_cast<size_t>(height_) * stride_, -kInfinity);
        window_.resize(static_cast<size_t>(height_) * width_);
        largest_.resize(width_);
        known_.resize(static_cast<size_t>(height_) * width_);
        tile_rows_ = (height_ + kTile - 1) / kTile, tile_columns_ = (width_ + kTile - 1) / kTile;
        lowest_.resize(static_cast<size_t>(tile_rows_) * tile_columns_);
        region_mark_.assign(static_cast<size_t>(2 * rank_ + 1) * (2 * rank_ + 1), 0);
    }

    py::tuple find(py::array_t<float, py::array::c_style> frame, float nsigm, int64_t npix_min,
                   int64_t npix_max, float amax_thr, float atot_thr, float son_min) {
        if (frame.size() != panels_ * height_ * width_)
            throw std::invalid_argument("frame has another shape");
        const Selection selection{nsigm, npix_min, npix_max, amax_thr, atot_thr, son_min};
        std::vector<Peak> peaks;
        {
            py::gil_scoped_release release;
            for (int64_t panel = 0; panel < panels_; panel++)
                search(frame.data() + panel * height_ * width_, panel, selection, peaks);
        }
        const auto n = static_cast<py::ssize_t>(peaks.size());
        py::array_t<int16_t> panel(n), npix(n);
        py::array_t<float> fs(n), ss(n), total(n), maximum(n), son(n), noise(n), background(n);
        for (py::ssize_t i = 0; i < n; i++) {
            const Peak& p = peaks[i];
            panel.mutable_at(i) = static_cast<int16_t>(p.panel);
            npix.mutable_at(i) = static_cast<int16_t>(std::min<int64_t>(p.npix, 32767));
            fs.mutable_at(i) = static_cast<float>(p.fs);
            ss.mutable_at(i) = static_cast<float>(p.ss);
            total.mutable_at(i) = static_cast<float>(p.total);
            maximum.mutable_at(i) = static_cast<float>(p.maximum);
            son.mutable_at(i) = static_cast<float>(p.son);
            noise.mutable_at(i) = static_cast<float>(p.noise);
            background.mutable_at(i) = static_cast<float>(p.background);
        }
        return py::make_tuple(panel, fs, ss, total, maximum, son, npix, noise, background,
                              static_cast<int64_t>(n));
    }

private:
    int64_t panels_;
    int height_, width_, rank_, reach_, stride_, tile_rows_, tile_columns_;
    std::vector<uint8_t> good_;
    std::vector<Offset> ring_;
    // of the panel in hand
    std::vector<float> high_;     // values, -infinity where masked, with a margin of rank columns
    std::vector<float> window_;   // sliding maximum along the row
    std::vector<float> largest_;  // sliding maximum of the window around a row's pixels
    std::vector<uint8_t> known_;  // 0 not asked yet, 1 no extremum, 2 extremum of row or column
    std::vector<float> lowest_;   // smallest good value of each tile
    std::vector<uint8_t> region_mark_;
    std::vector<Offset> region_;

    float high(int ss, int fs) const { return high_[static_cast<size_t>(ss) * stride_ + rank_ + fs]; }
    bool usable(int ss, int fs) const { return high(ss, fs) != -kInfinity; }

    void load(const float* values, int64_t panel) {
        const uint8_t* good = good_.data() + panel * height_ * width_;
        std::fill(lowest_.begin(), lowest_.end(), kInfinity);
        for (int ss = 0; ss < height_; ss++) {
            float* row = high_.data() + static_cast<size_t>(ss) * stride_ + rank_;
            float* lowest = lowest_.data() + static_cast<size_t>(ss / kTile) * tile_columns_;
            const size_t first = static_cast<size_t>(ss) * width_;
            for (int fs = 0; fs < width_; fs++) {
                const float v = values[first + fs];
                const bool use = good[first + fs] && v > -kInfinity && v < kInfinity;
                row[fs] = use ? v : -kInfinity;
                if (use && v < lowest[fs / kTile]) lowest[fs / kTile] = v;
            }
            slide(row, width_, rank_, window_.data() + first);
        }
        std::fill(known_.begin(), known_.end(), 0);
    }

    void search(const float* values, int64_t panel, const Selection& selection,
                std::vector<Peak>& peaks) {
        load(values, panel);
        for (int ss = 0; ss < height_; ss++) {
            std::fill(largest_.begin(), largest_.end(), -kInfinity);
            for (int k = std::max(0, ss - rank_); k <= std::min(height_ - 1, ss + rank_); k++)
                raise(window_.data() + static_cast<size_t>(k) * width_, width_, largest_.data());
            const float* row = high_.data() + static_cast<size_t>(ss) * stride_ + rank_;
            for (int fs = 0; fs < width_; fs++) {
                if (row[fs] != largest_[fs] || row[fs] == -kInfinity) continue;
                if (row[fs] - floor_near(ss, fs) < selection.amax_thr) continue;
                if (!is_extremum<true, false>(ss, fs) || !is_extremum<true, true>(ss, fs)) continue;
                Peak peak;
                if (measure(ss, fs, selection, peak)) {
                    peak.panel = panel;
                    peaks.push_back(peak);
                }
            }
        }
    }

    // No background around the pixel can be lower than this.  Without any usable pixel it is 0.
    float floor_near(int ss, int fs) const {
        const int top = std::max(0, ss - reach_) / kTile;
        const int bottom = std::min(height_ - 1, ss + reach_) / kTile;
        const int left = std::max(0, fs - reach_) / kTile;
        const int right = std::min(width_ - 1, fs + reach_) / kTile;
        float lowest = 0;
        for (int y = top; y <= bottom; y++)
            for (int x = left; x <= right; x++)
                lowest = std::min(lowest, lowest_[static_cast<size_t>(y) * tile_columns_ + x]);
        return lowest;
    }

    // Value at distance k along a row or column; `sign` turns minima into maxima.
    template <bool maximum, bool column>
    float along(int ss, int fs, int k, float masked) const {
        const float v = column ? high(ss + k, fs) : high(ss, fs + k);
        if (v == -kInfinity) return masked;
        return maximum ? v : -v;
    }

    template <bool maximum, bool column>
    bool stands_out(int ss, int fs) const {
        const int position = column ? ss : fs, length = column ? height_ : width_;
        const float v = maximum ? high(ss, fs) : -high(ss, fs);
        if (position > 0 && along<maximum, column>(ss, fs, -1, -kInfinity) > v) return false;
        // a masked pixel counts as 0 here, and only here
        if (position + 1 < length && along<maximum, column>(ss, fs, 1, 0.0f) >= v) return false;
        for (int k = -std::min(rank_, position); k <= std::min(rank_, length - 1 - position); k++)
            if (along<maximum, column>(ss, fs, k, -kInfinity) > v) return false;
        return true;
    }

    // Extremum of its row or column within rank; of equal ones within rank the first counts.
    template <bool maximum, bool column>
    bool is_extremum(int ss, int fs) const {
        if (!usable(ss, fs) || !stands_out<maximum, column>(ss, fs)) return false;
        const float v = high(ss, fs);
        for (int k = -std::min(rank_, column ? ss : fs); k < 0; k++) {
            const int y = column ? ss + k : ss, x = column ? fs : fs + k;
            if (high(y, x) == v && is_extremum<maximum, column>(y, x)) return false;
        }
        return true;
    }

    bool any_extremum(int ss, int fs) {
        uint8_t& known = known_[static_cast<size_t>(ss) * width_ + fs];
        if (!known)
            known = is_extremum<true, false>(ss, fs) || is_extremum<true, true>(ss, fs) ||
                            is_extremum<false, false>(ss, fs) || is_extremum<false, true>(ss, fs)
                        ? 2
                        : 1;
        return known == 2;
    }

    bool measure(int ss, int fs, const Selection& selection, Peak& peak) {
        double sum = 0, sum2 = 0;
        int64_t count = 0;
        for (const Offset& o : ring_) {
            const int y = ss + o.ss, x = fs + o.fs;
            if (y < 0 || x < 0 || y >= height_ || x >= width_) continue;
            const float v = high(y, x);
            if (v == -kInfinity || any_extremum(y, x)) continue;
            sum += v, sum2 += static_cast<double>(v) * v, count++;
        }
        double background = 0, noise = 0;
        if (count > 0) {
            background = sum / count;
            noise = std::sqrt(std::max(0.0, sum2 / count - background * background));
        }
        const auto threshold = static_cast<float>(background + selection.nsigm * noise);
        const auto amplitude = static_cast<float>(high(ss, fs) - background);
        if (!(high(ss, fs) >= threshold) || amplitude < selection.amax_thr) return false;
        grow(ss, fs, threshold);
        peak.npix = static_cast<int64_t>(region_.size());
        if (peak.npix < selection.npix_min || peak.npix > selection.npix_max) return false;
        double total = 0, total_ss = 0, total_fs = 0;
        for (const Offset& o : region_) {
            const double above = static_cast<double>(high(o.ss, o.fs)) - background;
            total += above, total_ss += above * (o.ss - ss), total_fs += above * (o.fs - fs);
        }
        peak.total = static_cast<float>(total);
        peak.maximum = amplitude;
        peak.ss = ss + (total > 0 ? total_ss / total : 0);
        peak.fs = fs + (total > 0 ? total_fs / total : 0);
        peak.noise = noise, peak.background = background;
        // of float32 and double as psana has them: with photon counts son is often exactly son_min
        const double spread = noise * std::sqrt(static_cast<double>(peak.npix));
        peak.son = noise > 0 ? static_cast<float>(peak.total / spread) : 0;
        return peak.total >= selection.atot_thr && peak.son >= selection.son_min;
    }

    // Pixels that reach the threshold, connected by sides, at most rank rows and columns away.
    void grow(int ss, int fs, float threshold) {
        const int side = 2 * rank_ + 1;
        region_.assign(1, {ss, fs});
        region_mark_[static_cast<size_t>(rank_) * side + rank_] = 1;
        for (size_t k = 0; k < region_.size(); k++)
            for (const Offset step : {Offset{-1, 0}, Offset{0, -1}, Offset{0, 1}, Offset{1, 0}}) {
                const int y = region_[k].ss + step.ss, x = region_[k].fs + step.fs;
                if (y < 0 || x < 0 || y >= height_ || x >= width_) continue;
                if (std::abs(y - ss) > rank_ || std::abs(x - fs) > rank_) continue;
                uint8_t& mark =
                    region_mark_[static_cast<size_t>(y - ss + rank_) * side + x - fs + rank_];
                if (mark || !(high(y, x) >= threshold)) continue;
                if (high(y, x) == -kInfinity) continue;
                mark = 1;
                region_.push_back({y, x});
            }
        for (const Offset& o : region_)
            region_mark_[static_cast<size_t>(o.ss - ss + rank_) * side + o.fs - fs + rank_] = 0;
    }
};

}  // namespace

PYBIND11_MODULE(peak_finder_v3r3, m) {
    m.doc() = "peak_finder_v3r3 on calibrated frames (P, S, F)";
    py::class_<PeakFinder>(m, "PeakFinder")
        .def(py::init<py::array_t<uint8_t, py::array::c_style | py::array::forcecast>, int, double,
                      double>(),
             py::arg("good_PSF"), py::arg("rank"), py::arg("r0"), py::arg("dr"))
        .def("find", &PeakFinder::find, py::arg("frame_PSF").noconvert(), py::kw_only(),
             py::arg("nsigm"), py::arg("npix_min"), py::arg("npix_max"), py::arg("amax_thr"),
             py::arg("atot_thr"), py::arg("son_min"));
    m.def("variants", &variants::available, "instruction sets of this machine");
    m.def("set_variant", &variants::set_variant, "use this instruction set from now on");
}
