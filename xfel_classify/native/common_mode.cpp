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

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

INLINE Lanes lanes_at(const int32_t *keys) {
    Lanes v;
    std::memcpy(&v, keys, sizeof v);
    return v;
}

// Medians of kLanes columns of keys (n rows of kLanes).  Comparisons give 0 or -1 per lane.
INLINE void lane_medians_body(const int32_t *keys, int n, int minimum, float limit,
                              float *median) {
    const Lanes sign = Lanes{} + INT32_MIN;
    Lanes count{}, prefix{}, upto{}, next = Lanes{} + kMasked;
    for (int i = 0; i < n; ++i) count -= lanes_at(keys + i * kLanes) != kMasked;
    const Lanes rank = (count - 1) >> 1;
    for (int bit = 31; bit >= 0; --bit) {
        const Lanes tried = prefix | static_cast<int32_t>(1u << bit);
        const Lanes at = tried ^ sign;
        Lanes below{}, more{};
        int i = 0;
        for (; i + 2 <= n; i += 2) {
            below -= lanes_at(keys + i * kLanes) < at;
            more -= lanes_at(keys + (i + 1) * kLanes) < at;
        }
        if (i < n) below -= lanes_at(keys + i * kLanes) < at;
        prefix = below + more <= rank ? tried : prefix;
    }
    prefix ^= sign;
    for (int i = 0; i < n; ++i) {
        const Lanes key = lanes_at(keys + i * kLanes);
        upto -= key <= prefix;
        const Lanes above = key > prefix ? key : kMasked + Lanes{};
        next = above < next ? above : next;
    }
    for (int l = 0; l < kLanes; ++l) {
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

// Median of one long vector of keys.
INLINE float long_median_body(const int32_t *keys, int n, int minimum, float limit) {
    int32_t count = 0;
    for (int i = 0; i < n; ++i) count += keys[i] != kMasked;
    if (count < minimum || count < 1) return 0.0f;
    const int32_t rank = (count - 1) / 2;
    uint32_t prefix = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const int32_t at = static_cast<int32_t>((prefix | 1u << bit) ^ 0x80000000u);
        int32_t below = 0;
        for (int i = 0; i < n; ++i) below += keys[i] < at;
        if (below <= rank) prefix |= 1u << bit;
    }
    const int32_t found = static_cast<int32_t>(prefix ^ 0x80000000u);
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
};

INLINE void banks_body(const Frame &f) {
    const size_t all = f.panels * f.rows;
    for (size_t top = 0; top < all; top += f.bank_rows)
        for (size_t left = 0; left < f.columns; left += f.bank_columns) {
            size_t n = 0;
            for (size_t s = top; s < top + f.bank_rows; ++s, n += f.bank_columns) {
                const size_t at = s * f.columns + left;
                for (size_t k = 0; k < f.bank_columns; ++k)
                    f.keys[n + k] = masked_key(f.values[at + k], f.good[at + k]);
            }
            const float median = long_median_body(f.keys, static_cast<int>(n), f.minimum, f.limit);
            if (median == 0.0f) continue;
            for (size_t s = top; s < top + f.bank_rows; ++s) {
                const size_t at = s * f.columns + left;
                for (size_t k = at; k < at + f.bank_columns; ++k)
                    f.values[k] = is_good(f.values[k], f.good[k]) ? f.values[k] - median
                                                                  : f.values[k];
            }
        }
}

INLINE void columns_body(const Frame &f) {
    const size_t all = f.panels * f.rows;
    float median[kLanes];
    for (size_t top = 0; top < all; top += f.bank_rows)
        for (size_t left = 0; left < f.columns; left += kLanes) {
            const int lanes = static_cast<int>(f.columns - left < kLanes ? f.columns - left : kLanes);
            for (size_t s = 0; s < f.bank_rows; ++s) {
                const size_t at = (top + s) * f.columns + left;
                int32_t *to = f.keys + s * kLanes;
                if (lanes == kLanes)
                    for (int l = 0; l < kLanes; ++l)
                        to[l] = masked_key(f.values[at + l], f.good[at + l]);
                else
                    for (int l = 0; l < kLanes; ++l)
                        to[l] = l < lanes ? masked_key(f.values[at + l], f.good[at + l]) : kMasked;
            }
            lane_medians_body(f.keys, static_cast<int>(f.bank_rows), f.minimum, f.limit, median);
            for (size_t s = 0; s < f.bank_rows; ++s) {
                const size_t at = (top + s) * f.columns + left;
                for (int l = 0; l < lanes; ++l)
                    if (is_good(f.values[at + l], f.good[at + l])) f.values[at + l] -= median[l];
            }
        }
}

INLINE void rows_body(const Frame &f) {
    const size_t all = f.panels * f.rows, n = f.bank_columns;
    float median[kLanes];
    for (size_t left = 0; left < f.columns; left += n)
        for (size_t top = 0; top < all; top += kLanes) {
            const int lanes = static_cast<int>(all - top < kLanes ? all - top : kLanes);
            for (int l = 0; l < kLanes; ++l) {
                const size_t at = (top + (l < lanes ? l : 0)) * f.columns + left;
                for (size_t k = 0; k < n; ++k)
                    f.keys[k * kLanes + l] = masked_key(f.values[at + k], f.good[at + k]);
            }
            lane_medians_body(f.keys, static_cast<int>(n), f.minimum, f.limit, median);
            for (int l = 0; l < lanes; ++l) {
                if (median[l] == 0.0f) continue;
                const size_t at = (top + l) * f.columns + left;
                for (size_t k = at; k < at + n; ++k)
                    f.values[k] = is_good(f.values[k], f.good[k]) ? f.values[k] - median[l]
                                                                  : f.values[k];
            }
        }
}

KERNEL(banks, (const Frame &f), (f))
KERNEL(columns, (const Frame &f), (f))
KERNEL(rows, (const Frame &f), (f))

void subtract(py::array_t<float, py::array::c_style> values,
              py::array_t<bool, py::array::c_style> good, const std::string &kind,
              size_t bank_rows, size_t bank_columns, float limit, int minimum) {
    if (values.ndim() != 3 || good.size() != values.size() || !values.writeable())
        throw py::value_error("values: a writeable (P, S, F) array and its mask are needed");
    Frame f{values.mutable_data(), reinterpret_cast<const uint8_t *>(good.data()),
            static_cast<size_t>(values.shape(0)), static_cast<size_t>(values.shape(1)),
            static_cast<size_t>(values.shape(2)), bank_rows, bank_columns, minimum, limit, nullptr};
    if (!bank_rows || !bank_columns || f.rows % bank_rows || f.columns % bank_columns)
        throw py::value_error("banks do not tile the panel");
    std::vector<int32_t> keys(std::max({bank_rows * bank_columns, bank_rows * kLanes,
                                        bank_columns * kLanes}));
    f.keys = keys.data();
    py::gil_scoped_release free;
    if (kind == "banks") banks(f);
    else if (kind == "columns") columns(f);
    else if (kind == "rows") rows(f);
    else throw std::invalid_argument("kind " + kind + " is none of banks, rows, columns");
}

}  // namespace

PYBIND11_MODULE(common_mode, m) {
    m.doc() = "Compiled common mode; called through xfel_classify.preprocess.";
    m.def("subtract", &subtract, "values, good, kind, bank_rows, bank_columns, limit, minimum");
    m.def("variants", &variants::available, "instruction sets of this machine");
    m.def("set_variant", &variants::set_variant, "use this instruction set from now on");
}
