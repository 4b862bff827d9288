// Kernels of peakfinder8: sums over the pixels of a ring, and a threshold test of 64 pixels.
//
// All variants add in the same 16 lanes without contraction: the same bits everywhere.
#pragma once

#include <algorithm>
#include <cstdint>

#include "variants.h"

namespace rings {

constexpr int kLanes = 16;

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

inline int sum_baseline(const float* block, const uint16_t* offsets, int n, Interval inside, Sums& sums,
              float* out_values, uint16_t* out_offsets) {
    std::fill_n(sums.s, 2 * kLanes, 0.0f);
    return sum_tail(block, offsets, 0, n, inside, sums, out_values, out_offsets, 0);
}

// Bit i of the answer: values[i] > threshold, for 64 pixels.
using ScreenKernel = uint64_t (*)(const float* values, float threshold);

inline uint64_t screen_baseline(const float* values, float threshold) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++) bits |= static_cast<uint64_t>(values[i] > threshold) << i;
    return bits;
}

#if XC_X86

XC_AVX2 inline int sum_avx2(const float* block, const uint16_t* offsets, int n,
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

XC_AVX512 inline int sum_avx512(
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

XC_AVX2 inline uint64_t screen_avx2(const float* values, float threshold) {
    const __m256 t = _mm256_set1_ps(threshold);
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) {
        const __m256 above = _mm256_cmp_ps(_mm256_loadu_ps(values + 8 * i), t, _CMP_GT_OQ);
        bits |= static_cast<uint64_t>(_mm256_movemask_ps(above) & 0xFF) << (8 * i);
    }
    return bits;
}

XC_AVX512 inline uint64_t screen_avx512(const float* values, float threshold) {
    const __m512 t = _mm512_set1_ps(threshold);
    uint64_t bits = 0;
    for (int i = 0; i < 4; i++) {
        const __mmask16 above =
            _mm512_cmp_ps_mask(_mm512_loadu_ps(values + 16 * i), t, _CMP_GT_OQ);
        bits |= static_cast<uint64_t>(above) << (16 * i);
    }
    return bits;
}

#endif

inline SumKernel sum_kernel() {
#if XC_X86
    if (variants::current() == variants::avx512) return sum_avx512;
    if (variants::current() == variants::avx2) return sum_avx2;
#endif
    return sum_baseline;
}

inline ScreenKernel screen_kernel() {
#if XC_X86
    if (variants::current() == variants::avx512) return screen_avx512;
    if (variants::current() == variants::avx2) return screen_avx2;
#endif
    return screen_baseline;
}

}  // namespace rings
