// Running sum and maximum of calibrated frames, one pass.
//
// The sum is kept in fixed point (int64 counts of 1/scale): integer addition gives the same bits in
// any order, so the sum over a run does not depend on how its events were dealt to ranks.
#include <cmath>
#include <cstdint>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

#define DISPATCH __attribute__((target_clones("avx512f", "avx2", "default")))

DISPATCH static void accumulate_pixels(const float* frame, int64_t* sum, float* maximum, int64_t n,
                                       float scale) {
    const float limit = 2147483520.0f;  // largest float below 2^31
    for (int64_t i = 0; i < n; ++i) {
        const float value = frame[i];
        maximum[i] = value > maximum[i] ? value : maximum[i];
        float fixed = value * scale;
        fixed = fixed > limit ? limit : fixed;
        fixed = fixed < -limit ? -limit : fixed;
        sum[i] += static_cast<int32_t>(std::nearbyintf(fixed));
    }
}

static void accumulate(const py::array_t<float, py::array::c_style>& frame,
                       py::array_t<int64_t, py::array::c_style>& sum,
                       py::array_t<float, py::array::c_style>& maximum, float scale) {
    if (frame.size() != sum.size() || frame.size() != maximum.size())
        throw py::value_error("frame, sum and maximum differ in size");
    const float* in = frame.data();
    int64_t* total = sum.mutable_data();
    float* top = maximum.mutable_data();
    const int64_t n = frame.size();
    py::gil_scoped_release unlocked;
    accumulate_pixels(in, total, top, n, scale);
}

PYBIND11_MODULE(powder, m) {
    m.doc() = "Running sum and maximum of calibrated frames.";
    m.def("accumulate", &accumulate, py::arg("frame").noconvert(), py::arg("sum").noconvert(),
          py::arg("maximum").noconvert(), py::arg("scale"),
          "Add a frame to an int64 fixed-point sum and a float32 maximum, in place.");
}
