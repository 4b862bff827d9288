// peakfinder8: Bragg peaks above a radially averaged background.
//
// Written from the published description, A. Barty et al., J. Appl. Cryst. 47 (2014) 1118-1131,
// doi 10.1107/S1600576714007626, section "peak finding", and from what psana's binary answers
// to probe frames.  The rules are listed in analyses/peakfinder8.py, the numpy reference.
//
// ring_statistics.h finds the candidate pixels; this file joins them to peaks.
#pragma GCC optimize("fp-contract=off")
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ring_statistics.h"

namespace py = pybind11;

namespace {

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

using rings::kInfinity;
using rings::kNoBin;

class PeakFinder {
public:
    PeakFinder(py::array_t<float, py::array::c_style | py::array::forcecast> radius,
               py::array_t<uint8_t, py::array::c_style | py::array::forcecast> good,
               int64_t asics_ss, int64_t asics_fs, int64_t fast_samples) {
        if (radius.ndim() != 3 || good.ndim() != 3 ||
            !std::equal(radius.shape(), radius.shape() + 3, good.shape()))
            throw std::invalid_argument("radius and good must be of one shape (P, S, F)");
        panels_ = radius.shape(0), height_ = radius.shape(1), width_ = radius.shape(2);
        if (asics_ss < 1 || asics_fs < 1 || height_ % asics_ss || width_ % asics_fs)
            throw std::invalid_argument("the asic grid does not divide the panel");
        asic_height_ = height_ / asics_ss, asic_width_ = width_ / asics_fs;
        statistics_ = std::make_unique<rings::RingStatistics>(
            radius.data(), good.data(), panels_ * height_ * width_, fast_samples);
        region_.resize(asic_height_ * asic_width_ + 2);
    }

    py::tuple find(py::array_t<float, py::array::c_style> frame, const Parameters& parameters,
                   bool fast) {
        if (frame.size() != panels_ * height_ * width_)
            throw std::invalid_argument("frame has another shape");
        const float* values = frame.data();
        std::vector<Peak> peaks;
        int64_t found = 0;
        {
            py::gil_scoped_release release;
            const rings::Clipping clipping{parameters.minimum_snr, parameters.adc_threshold};
            if (fast)
                statistics_->sampled(values, clipping);
            else
                statistics_->exact(values, clipping);
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
        const auto& mean = statistics_->mean_;
        const auto& threshold = statistics_->threshold_;
        return py::make_tuple(py::array_t<float>(mean.size(), mean.data()),
                              py::array_t<float>(threshold.size(), threshold.data()));
    }

private:
    int64_t panels_, height_, width_, asic_height_, asic_width_;
    std::unique_ptr<rings::RingStatistics> statistics_;
    std::vector<Position> region_;  // entries outlive their region on purpose, see grow()
    int largest_ = 0;               // region of the latest frame
    bool take(int64_t pixel) {  // true once for each candidate pixel
        const uint64_t bit = uint64_t{1} << (pixel % 64);
        if (!(statistics_->above_[pixel / 64] & bit)) return false;
        statistics_->above_[pixel / 64] &= ~bit;
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
        std::fill_n(region_.begin(), largest_ + 1, Position{0, 0});
        largest_ = 0;
        int64_t found = 0;
        for (int64_t top = 0; top < panels_ * height_; top += asic_height_)
            for (int64_t left = 0; left < width_; left += asic_width_)
                for (int64_t ss = 1; ss < asic_height_ - 1; ss++) {
                    const int64_t row = (top + ss) * width_ + left;
                    const int64_t end = row + asic_width_ - 1;
                    for (int64_t pixel = row + 1; pixel < end;) {
                        const uint64_t word = statistics_->above_[pixel / 64] >> (pixel % 64);
                        if (!word) {
                            pixel = (pixel / 64 + 1) * 64;
                            continue;
                        }
                        pixel += __builtin_ctzll(word);
                        if (pixel >= end) break;
                        take(pixel);
                        region_[0] = {static_cast<int>(ss), static_cast<int>(pixel - row)};
                        const int n = grow(top * width_ + left, parameters.carry_over);
                        largest_ = std::max(largest_, n);
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
        const auto& bin = statistics_->bin_;
        const auto& mean = statistics_->mean_;
        const auto& threshold = statistics_->threshold_;
        const int64_t corner = top * width_ + left;
        double sum = 0, sum_ss = 0, sum_fs = 0;
        float maximum = -kInfinity;
        // float32, in this order: decides where the ring lies when the centroid is half-way
        float net = 0, net_ss = 0, net_fs = 0;
        for (int k = 0; k < n; k++) {
            const int64_t pixel = corner + region_[k].ss * width_ + region_[k].fs;
            const float v = values[pixel];
            const float above = v - mean[bin[pixel]];
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
        double s = 0, s2 = 0, origin = 0;  // relative to the first value: a flat disc gives 0
        int64_t count = 0;
        const int64_t bottom = std::min(centre_ss + reach, asic_height_);
        const int64_t right = std::min(centre_fs + reach, asic_width_);
        for (int64_t y = std::max<int64_t>(centre_ss - reach, 0); y < bottom; y++)
            for (int64_t x = std::max<int64_t>(centre_fs - reach, 0); x < right; x++) {
                const int64_t dy = y - centre_ss, dx = x - centre_fs;
                if (dy * dy + dx * dx > reach * reach) continue;
                const int64_t pixel = corner + y * width_ + x;
                const uint16_t b = bin[pixel];
                if (b == kNoBin) continue;
                const float v = values[pixel];
                if (!(v < threshold[b]) || !(v > -kInfinity)) continue;
                if (v > maximum) return false;
                if (count++ == 0) origin = v;
                s += v - origin, s2 += (v - origin) * (v - origin);
            }
        if (count == 0) return false;
        const double background = origin + s / count;
        const double sigma = std::sqrt(std::max(0.0, s2 / count - (s / count) * (s / count)));
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
                      int64_t, int64_t>(),
             py::arg("radius_PSF"), py::arg("good_PSF"), py::arg("asics_ss") = 1,
             py::arg("asics_fs") = 1, py::arg("fast_samples") = 100)
        .def("find", &PeakFinder::find, py::arg("frame_PSF").noconvert(), py::arg("parameters"),
             py::arg("fast") = false)
        .def("radial", &PeakFinder::radial);
    m.def("variants", &variants::available, "instruction sets of this machine");
    m.def("set_variant", &variants::set_variant, "use this one in finders made from now on");
}
