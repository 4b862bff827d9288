// Single-particle diffraction: atoms to a Fourier mesh, Ewald slices of the mesh, sum of copies.
//
// Lengths in angstrom and metres as the Python side says; a scattering vector is
// s = (k_out - k_in) / (2 pi), its z component written without cancellation.
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

#define DISPATCH __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#define INLINE static inline __attribute__((always_inline))

typedef float four __attribute__((vector_size(16), aligned(4)));

namespace {

constexpr int kWidth = 8;  // grid points under the spreading kernel, along each axis

// exp(beta (sqrt(1 - (2 z / w)^2) - 1)), the "exponential of semicircle" of Barnett et al. (2019)
INLINE void kernel_values(double u, double beta, int64_t& first, float* value) {
    first = static_cast<int64_t>(std::ceil(u - 0.5 * kWidth));
    for (int i = 0; i < kWidth; ++i) {
        const double z = (static_cast<double>(first + i) - u) * (2.0 / kWidth);
        const double inside = 1.0 - z * z;
        value[i] = inside > 0 ? static_cast<float>(std::exp(beta * (std::sqrt(inside) - 1.0))) : 0;
    }
}

INLINE int64_t wrapped(int64_t i, int64_t n) { return i < 0 ? i + n : (i >= n ? i - n : i); }

DISPATCH void spread_points(const double* points, const float* weights, int64_t count, float* grid,
                            int64_t n, double beta) {
    for (int64_t j = 0; j < count; ++j) {
        int64_t at[3];
        float value[3][kWidth];
        for (int axis = 0; axis < 3; ++axis)
            kernel_values(points[3 * j + axis], beta, at[axis], value[axis]);
        float line[2 * kWidth];
        for (int i = 0; i < kWidth; ++i) {
            line[2 * i] = weights[2 * j] * value[2][i];
            line[2 * i + 1] = weights[2 * j + 1] * value[2][i];
        }
        const bool whole = at[2] >= 0 && at[2] + kWidth <= n;
        for (int a = 0; a < kWidth; ++a) {
            const int64_t x = wrapped(at[0] + a, n);
            for (int b = 0; b < kWidth; ++b) {
                const float factor = value[0][a] * value[1][b];
                float* row = grid + 2 * n * (x * n + wrapped(at[1] + b, n));
                if (whole) {
                    float* out = row + 2 * at[2];
                    for (int i = 0; i < 2 * kWidth; ++i) out[i] += factor * line[i];
                } else {
                    for (int i = 0; i < kWidth; ++i) {
                        float* out = row + 2 * wrapped(at[2] + i, n);
                        out[0] += factor * line[2 * i];
                        out[1] += factor * line[2 * i + 1];
                    }
                }
            }
        }
    }
}

struct Rays {
    const float *x, *y;  // metres, of columns and of rows
    int64_t width, height;
    float distance, wavenumber;  // metres; 1/A
};

INLINE void scattering(const Rays& rays, float x, float y, float* s) {
    const float across = x * x + y * y;
    const float r = std::sqrt(across + rays.distance * rays.distance);
    const float scale = rays.wavenumber / r;
    s[0] = x * scale;
    s[1] = y * scale;
    s[2] = -across / (r + rays.distance) * scale;
}

// Trilinear interpolation of the complex mesh; beyond its faces the face value is taken.
DISPATCH void slice_mesh(const float* mesh, int64_t n, const float* m, const Rays& rays,
                         float* out) {
    const float last = static_cast<float>(n - 1), middle = 0.5f * last;
    const int64_t top = n - 2;
    for (int64_t row = 0; row < rays.height; ++row)
        for (int64_t col = 0; col < rays.width; ++col) {
            float s[3], f[3];
            int64_t i[3];
            scattering(rays, rays.x[col], rays.y[row], s);
            for (int axis = 0; axis < 3; ++axis) {
                float u = m[3 * axis] * s[0] + m[3 * axis + 1] * s[1] + m[3 * axis + 2] * s[2] +
                          middle;
                u = u > 0 ? u : 0;
                u = u < last ? u : last;
                const int64_t low = static_cast<int64_t>(u);
                i[axis] = low < top ? low : top;
                f[axis] = u - static_cast<float>(i[axis]);
            }
            const float* corner = mesh + 2 * ((i[0] * n + i[1]) * n + i[2]);
            const four c00 = *reinterpret_cast<const four*>(corner);
            const four c01 = *reinterpret_cast<const four*>(corner + 2 * n);
            const four c10 = *reinterpret_cast<const four*>(corner + 2 * n * n);
            const four c11 = *reinterpret_cast<const four*>(corner + 2 * n * n + 2 * n);
            const four near = c00 + (c01 - c00) * f[1];
            const four far = c10 + (c11 - c10) * f[1];
            const four value = near + (far - near) * f[0];
            float* pixel = out + 2 * (row * rays.width + col);
            pixel[0] = value[0] + (value[2] - value[0]) * f[2];
            pixel[1] = value[1] + (value[3] - value[1]) * f[2];
        }
}

// sin and cos of 2 pi t, to 1e-7, in a form that vectorises.
INLINE void circle(float t, float& sine, float& cosine) {
    const float a = 3.14159265358979f * (t - std::nearbyint(t)), b = a * a;
    const float s =
        a * (1 + b * (-1.6666667e-1f +
                      b * (8.3333333e-3f +
                           b * (-1.9841270e-4f + b * (2.7557319e-6f - 2.5052108e-8f * b)))));
    const float c =
        1 + b * (-0.5f + b * (4.1666667e-2f +
                              b * (-1.3888889e-3f +
                                   b * (2.4801587e-5f +
                                        b * (-2.7557319e-7f + 2.0876757e-9f * b)))));
    sine = 2 * s * c;
    cosine = 1 - 2 * s * s;
}

// I = factor sum_cd G_cd Re(B_c B_d*), B_c = F_c exp(2 pi i s p_c);
// factor = scale (1 - (x/r)^2) distance / r^3: polarisation along x, solid angle of a pixel.
DISPATCH void sum_copies(const float* amplitudes, int64_t copies, const float* positions,
                         const float* pairs, const Rays& rays, float scale, float* out) {
    const int64_t w = rays.width, plane = 2 * w * rays.height;
    std::vector<float> room((4 + 2 * copies) * w);
    float *sx = room.data(), *sy = sx + w, *sz = sy + w, *factor = sz + w;
    float *real = factor + w, *imaginary = real + copies * w;
    for (int64_t row = 0; row < rays.height; ++row) {
        const float y = rays.y[row], d = rays.distance;
        for (int64_t i = 0; i < w; ++i) {
            const float x = rays.x[i], across = x * x + y * y;
            const float r2 = across + d * d, r = std::sqrt(r2), k = rays.wavenumber / r;
            sx[i] = x * k;
            sy[i] = y * k;
            sz[i] = -across / (r + d) * k;
            factor[i] = scale * (1 - x * x / r2) * d / (r2 * r);
        }
        float* total = out + row * w;
        for (int64_t i = 0; i < w; ++i) total[i] = 0;
        for (int64_t c = 0; c < copies; ++c) {
            const float px = positions[3 * c], py = positions[3 * c + 1], pz = positions[3 * c + 2];
            const float* f = amplitudes + c * plane + 2 * row * w;
            float *re = real + c * w, *im = imaginary + c * w;
            for (int64_t i = 0; i < w; ++i) {
                float sine, cosine;
                circle(sx[i] * px + sy[i] * py + sz[i] * pz, sine, cosine);
                re[i] = f[2 * i] * cosine - f[2 * i + 1] * sine;
                im[i] = f[2 * i] * sine + f[2 * i + 1] * cosine;
            }
            for (int64_t e = 0; e <= c; ++e) {
                const float g = (e < c ? 2.0f : 1.0f) * pairs[c * copies + e];
                const float *re2 = real + e * w, *im2 = imaginary + e * w;
                for (int64_t i = 0; i < w; ++i) total[i] += g * (re[i] * re2[i] + im[i] * im2[i]);
            }
        }
        for (int64_t i = 0; i < w; ++i) total[i] *= factor[i];
    }
}

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

Rays rays_of(const Array<float>& x, const Array<float>& y, double distance, double wavenumber) {
    if (x.ndim() != 1 || y.ndim() != 1) throw py::value_error("x and y must have one axis");
    return {x.data(), y.data(), x.size(), y.size(), static_cast<float>(distance),
            static_cast<float>(wavenumber)};
}

void spread(const Array<double>& points, const Array<float>& weights,
            Array<std::complex<float>>& grid, double beta) {
    if (grid.ndim() != 3 || grid.shape(0) != grid.shape(1) || grid.shape(0) != grid.shape(2) ||
        grid.shape(0) < 2 * kWidth)
        throw py::value_error("grid must be a cube of at least 16 points a side");
    if (points.ndim() != 2 || points.shape(1) != 3 || weights.ndim() != 2 ||
        weights.shape(1) != 2 || weights.shape(0) != points.shape(0))
        throw py::value_error("points must be (N, 3) and weights (N, 2)");
    const double* at = points.data();
    const int64_t n = grid.shape(0), count = points.shape(0);
    for (int64_t i = 0; i < 3 * count; ++i)
        if (!(at[i] >= 0 && at[i] < static_cast<double>(n)))
            throw py::value_error("points must lie in [0, n)");
    const float* weight = weights.data();
    float* out = reinterpret_cast<float*>(grid.mutable_data());
    py::gil_scoped_release unlocked;
    spread_points(at, weight, count, out, n, beta);
}

void slice(const Array<std::complex<float>>& mesh, const Array<float>& matrix,
           const Array<float>& x, const Array<float>& y, double distance, double wavenumber,
           Array<std::complex<float>>& out) {
    const Rays rays = rays_of(x, y, distance, wavenumber);
    if (mesh.ndim() != 3 || mesh.shape(0) != mesh.shape(1) || mesh.shape(0) != mesh.shape(2) ||
        mesh.shape(0) < 2)
        throw py::value_error("mesh must be a cube");
    if (matrix.size() != 9) throw py::value_error("matrix must be (3, 3)");
    if (out.ndim() != 2 || out.shape(0) != rays.height || out.shape(1) != rays.width)
        throw py::value_error("out must be (rows, columns)");
    const float* in = reinterpret_cast<const float*>(mesh.data());
    const float* m = matrix.data();
    float* result = reinterpret_cast<float*>(out.mutable_data());
    const int64_t n = mesh.shape(0);
    py::gil_scoped_release unlocked;
    slice_mesh(in, n, m, rays, result);
}

void combine(const Array<std::complex<float>>& amplitudes, const Array<float>& positions,
             const Array<float>& pairs, const Array<float>& x, const Array<float>& y,
             double distance, double wavenumber, double scale, Array<float>& out) {
    const Rays rays = rays_of(x, y, distance, wavenumber);
    if (amplitudes.ndim() != 3 || amplitudes.shape(1) != rays.height ||
        amplitudes.shape(2) != rays.width)
        throw py::value_error("amplitudes must be (copies, rows, columns)");
    const int64_t copies = amplitudes.shape(0);
    if (positions.size() != 3 * copies || pairs.size() != copies * copies)
        throw py::value_error("positions must be (copies, 3) and pairs (copies, copies)");
    if (out.ndim() != 2 || out.shape(0) != rays.height || out.shape(1) != rays.width)
        throw py::value_error("out must be (rows, columns)");
    const float* in = reinterpret_cast<const float*>(amplitudes.data());
    const float *p = positions.data(), *g = pairs.data();
    float* result = out.mutable_data();
    py::gil_scoped_release unlocked;
    sum_copies(in, copies, p, g, rays, static_cast<float>(scale), result);
}

}  // namespace

PYBIND11_MODULE(ewald_slice, m) {
    m.doc() = "Fourier mesh of a particle, Ewald slices of it, intensity of several copies.";
    m.attr("WIDTH") = kWidth;
    m.def("spread", &spread, py::arg("points").noconvert(), py::arg("weights").noconvert(),
          py::arg("grid").noconvert(), py::arg("beta"),
          "Add points (N, 3) in grid units, each with two real weights (N, 2), to a periodic "
          "complex64 cube.");
    m.def("slice", &slice, py::arg("mesh").noconvert(), py::arg("matrix").noconvert(),
          py::arg("x").noconvert(), py::arg("y").noconvert(), py::arg("distance"),
          py::arg("wavenumber"), py::arg("out").noconvert(),
          "Trilinear lookup of a complex64 cube at matrix s + centre, into complex64 (rows, "
          "columns).");
    m.def("combine", &combine, py::arg("amplitudes").noconvert(), py::arg("positions").noconvert(),
          py::arg("pairs").noconvert(), py::arg("x").noconvert(), py::arg("y").noconvert(),
          py::arg("distance"), py::arg("wavenumber"), py::arg("scale"), py::arg("out").noconvert(),
          "Intensity of copies at positions (C, 3) with pair coherences (C, C), into float32 (rows, "
          "columns).");
}
