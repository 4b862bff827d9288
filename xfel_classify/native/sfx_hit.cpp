// The SFX hit network (methods section 4b, [PNLI18]) as one direct float32 kernel.
//
// General runtimes reach 13 to 20 % of a core's multiply-add rate on convolutions of 1 and 4
// channels.  Here a 7 x 7 convolution computes 32 neighbouring columns of all four output
// channels at once in registers; row normalisation, ReLU and 5 x 5 max-pooling follow while the
// row is in the first-level cache, and only pooled values are stored.  Rows of the convolution
// that no pooling window covers (the last 4 and 2) are never computed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

#define DISPATCH __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64), aligned(4)));

namespace {

constexpr int kTaps = 7, kChannels = 4, kPool = 5;

struct Layer {
    int planes_in, width_in, stride_in;  // input planes, valid columns, floats per row
    int width, pooled;                   // convolution columns; pooled rows and columns
    const float* taps;                   // [planes_in][7][7][4]
    const float* bias;                   // [4]
    const float* gain;                   // [width], row normalisation
    const float* shift;                  // [width]
};

struct Norm {
    float floor, tiny, epsilon;
};

// Columns x .. x+31 of all four channels of one convolution row.
INLINE void convolve(const Layer& layer, const float* input, int64_t plane, int y, int x,
                     float (*row)[384]) {
    lanes sum[kChannels][2];
    for (int c = 0; c < kChannels; ++c) sum[c][0] = sum[c][1] = lanes{} + layer.bias[c];
    const float* tap = layer.taps;
    for (int p = 0; p < layer.planes_in; ++p)
        for (int ky = 0; ky < kTaps; ++ky) {
            const float* in = input + p * plane + int64_t(y + ky) * layer.stride_in + x;
            for (int kx = 0; kx < kTaps; ++kx, tap += kChannels) {
                const lanes left = *reinterpret_cast<const lanes*>(in + kx);
                const lanes right = *reinterpret_cast<const lanes*>(in + kx + 16);
                for (int c = 0; c < kChannels; ++c) {
                    sum[c][0] += left * tap[c];
                    sum[c][1] += right * tap[c];
                }
            }
        }
    for (int c = 0; c < kChannels; ++c) {
        std::memcpy(row[c] + x, &sum[c][0], 64);
        std::memcpy(row[c] + x + 16, &sum[c][1], 64);
    }
}

// Sum of n floats in 16 running sums: float32 keeps 1e-7 over a few hundred values.
INLINE float total(const float* values, int n) {
    lanes sum{};
    int i = 0;
    for (; i + 16 <= n; i += 16) sum += *reinterpret_cast<const lanes*>(values + i);
    float rest = 0;
    for (; i < n; ++i) rest += values[i];
    for (int lane = 0; lane < 16; ++lane) rest += sum[lane];
    return rest;
}

// Normalise a row by its own mean and deviation, and raise the pooling maximum with it.  The
// maximum starts at 0, which is the ReLU.
INLINE void normalise(const Layer& layer, const Norm& norm, float* row, float* maximum) {
    const int n = layer.width;
    const float mean = total(row, n) / n;
    for (int i = 0; i < n; ++i) row[i] -= mean;
    const float rest = total(row, n) / n;  // of the mean, by rounding
    float squares[384];
    for (int i = 0; i < n; ++i) {
        row[i] -= rest;
        squares[i] = row[i] * row[i];
    }
    const float variance = total(squares, n) / n;
    const float least = norm.floor * mean;
    const float factor = 1.0f / (std::sqrt(variance + least * least + norm.tiny) + norm.epsilon);
    for (int i = 0; i < n; ++i) {
        const float value = row[i] * factor * layer.gain[i] + layer.shift[i];
        maximum[i] = value > maximum[i] ? value : maximum[i];
    }
}

// Convolution, row normalisation, ReLU, max pool; output planes have ``stride_out`` floats a row.
INLINE void layer_forward(const Layer& layer, const Norm& norm, const float* input, int64_t plane_in,
                          float* output, int64_t plane_out, int stride_out) {
    float row[kChannels][384], maximum[kChannels][384];
    for (int pooled_y = 0; pooled_y < layer.pooled; ++pooled_y) {
        std::memset(maximum, 0, sizeof maximum);
        for (int dy = 0; dy < kPool; ++dy) {
            for (int x = 0; x < layer.width; x += 32)
                convolve(layer, input, plane_in, pooled_y * kPool + dy, x, row);
            for (int c = 0; c < kChannels; ++c) normalise(layer, norm, row[c], maximum[c]);
        }
        for (int c = 0; c < kChannels; ++c)
            for (int x = 0; x < layer.pooled; ++x) {
                const float* five = maximum[c] + x * kPool;
                output[c * plane_out + int64_t(pooled_y) * stride_out + x] =
                    std::max({five[0], five[1], five[2], five[3], five[4]});
            }
    }
}

constexpr int kSide = 350, kStride1 = 400, kSide2 = 68, kStride2 = 128, kSide3 = 12;

struct Weights {
    Layer first, second;
    Norm norm;
    const float *dense, *dense_bias, *last, *last_bias;  // 16 x 576, 16, 2 x 16, 2
};

DISPATCH void forward(const Weights& w, const float* image, float* padded, float* middle,
                      float* probabilities) {
    double sum_of_means = 0;
    for (int y = 0; y < kSide; ++y) sum_of_means += total(image + y * kSide, kSide) / kSide;
    const float mean = static_cast<float>(sum_of_means / kSide);
    for (int y = 0; y < kSide; ++y)
        for (int x = 0; x < kSide; ++x) padded[y * kStride1 + x] = image[y * kSide + x] - mean;
    layer_forward(w.first, w.norm, padded, 0, middle, int64_t(kSide2) * kStride2, kStride2);
    float features[kChannels * kSide3 * kSide3];
    layer_forward(w.second, w.norm, middle, int64_t(kSide2) * kStride2, features,
                  kSide3 * kSide3, kSide3);
    float hidden[16];
    for (int k = 0; k < 16; ++k) {
        float products[576];
        for (int i = 0; i < 576; ++i) products[i] = features[i] * w.dense[k * 576 + i];
        hidden[k] = std::max(0.0f, total(products, 576) + w.dense_bias[k]);
    }
    float logit[2];
    for (int k = 0; k < 2; ++k) {
        logit[k] = w.last_bias[k];
        for (int i = 0; i < 16; ++i) logit[k] += hidden[i] * w.last[k * 16 + i];
    }
    const float top = std::max(logit[0], logit[1]);
    const float a = std::exp(logit[0] - top), b = std::exp(logit[1] - top);
    probabilities[0] = a / (a + b);
    probabilities[1] = b / (a + b);
}

using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;

// [out][in][7][7] as stored -> [in][7][7][out] as the kernel reads it.
std::vector<float> taps_last(const Array& stored) {
    const int64_t out = stored.shape(0), per_out = stored.size() / out;
    std::vector<float> taps(stored.size());
    for (int64_t o = 0; o < out; ++o)
        for (int64_t i = 0; i < per_out; ++i) taps[i * out + o] = stored.data()[o * per_out + i];
    return taps;
}

std::vector<float> copied(const Array& stored, int64_t size, const char* name) {
    if (stored.size() != size)
        throw py::value_error(std::string(name) + " has " + std::to_string(stored.size()) +
                              " values, the network has " + std::to_string(size));
    return {stored.data(), stored.data() + size};
}

class SfxHit {
public:
    SfxHit(const py::dict& weights, float floor, float tiny, float epsilon) : padded_(356 * kStride1 + 64), middle_(4 * kSide2 * kStride2 + 1024) {
        const auto get = [&](const char* name, int64_t size) -> const float* {
            kept_.push_back(copied(weights[name].cast<Array>(), size, name));
            return kept_.back().data();
        };
        kept_.reserve(16);
        const auto taps = [&](const char* name, int64_t size) -> const float* {
            const Array stored = weights[name].cast<Array>();
            copied(stored, size, name);
            kept_.push_back(taps_last(stored));
            return kept_.back().data();
        };
        w_.first = {1, kSide, kStride1, 344, kSide2, taps("conv_1.weight", 196),
                    get("conv_1.bias", 4), get("norm_3.weight", 344), get("norm_3.bias", 344)};
        w_.second = {4, kSide2, kStride2, 62, kSide3, taps("conv_6.weight", 784),
                     get("conv_6.bias", 4), get("norm_7.weight", 62), get("norm_7.bias", 62)};
        w_.norm = {floor, tiny, epsilon};
        w_.dense = get("fc_12.weight", 16 * 576);
        w_.dense_bias = get("fc_12.bias", 16);
        w_.last = get("fc_16.weight", 32);
        w_.last_bias = get("fc_16.bias", 2);
    }

    py::array_t<float> run(const Array& images) {
        if (images.ndim() != 3 || images.shape(1) != kSide || images.shape(2) != kSide)
            throw py::value_error("images must have the shape (B, 350, 350)");
        const int64_t n = images.shape(0);
        py::array_t<float> probabilities({n, int64_t(2)});
        const float* in = images.data();
        float* out = probabilities.mutable_data();
        py::gil_scoped_release unlocked;
        for (int64_t b = 0; b < n; ++b)
            forward(w_, in + b * kSide * kSide, padded_.data(), middle_.data(), out + 2 * b);
        return probabilities;
    }

private:
    std::vector<std::vector<float>> kept_;
    std::vector<float> padded_, middle_;
    Weights w_;
};

}  // namespace

PYBIND11_MODULE(sfx_hit, m) {
    m.doc() = "The SFX hit network as one direct float32 kernel.";
    py::class_<SfxHit>(m, "SfxHit")
        .def(py::init<const py::dict&, float, float, float>(), py::arg("weights"),
             py::arg("floor"), py::arg("tiny"), py::arg("epsilon"))
        .def("run", &SfxHit::run, py::arg("images"),
             "Probabilities (B, 2) of miss and hit for float32 images (B, 350, 350).");
}
