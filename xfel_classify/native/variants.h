// One body, compiled for several instruction sets, chosen at run time.
//
// KERNEL(name, (parameters), (arguments)) defines name_baseline, name_avx2 and name_avx512 around
// the always-inlined name_body, and name(), which calls the best one that the machine has, or the
// one chosen with set_variant() (tests and benchmarks compare them).
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#define INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define XC_X86 1
#include <immintrin.h>
#define XC_AVX2 __attribute__((target("avx2")))
#define XC_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define XC_X86 0
#define XC_AVX2
#define XC_AVX512
#endif

namespace variants {

enum Variant { baseline = 0, avx2 = 1, avx512 = 2 };

inline std::vector<std::string> available() {
    std::vector<std::string> names{"baseline"};
#if XC_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) names.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        names.push_back("avx512");
#endif
    return names;
}

inline Variant &current() {
    static Variant chosen = static_cast<Variant>(available().size() - 1);
    return chosen;
}

inline void set_variant(const std::string &name) {
    const auto names = available();
    for (size_t i = 0; i < names.size(); ++i)
        if (names[i] == name) {
            current() = static_cast<Variant>(i);
            return;
        }
    throw std::invalid_argument("this machine has no variant " + name);
}

}  // namespace variants

#define XC_CHOOSE(name, parameters, arguments)                       \
    static void name parameters {                                    \
        switch (variants::current()) {                               \
            case variants::avx512: name##_avx512 arguments; return;  \
            case variants::avx2: name##_avx2 arguments; return;      \
            default: name##_baseline arguments; return;              \
        }                                                            \
    }

#define KERNEL(name, parameters, arguments)                                   \
    static void name##_baseline parameters { name##_body arguments; }         \
    XC_AVX2 static void name##_avx2 parameters { name##_body arguments; }     \
    XC_AVX512 static void name##_avx512 parameters { name##_body arguments; } \
    XC_CHOOSE(name, parameters, arguments)

// The same for a body that is a template of the number of 32-bit lanes of a vector.
#define KERNEL_OF_WIDTH(name, parameters, arguments)                              \
    static void name##_baseline parameters { name##_body<4> arguments; }          \
    XC_AVX2 static void name##_avx2 parameters { name##_body<8> arguments; }      \
    XC_AVX512 static void name##_avx512 parameters { name##_body<16> arguments; } \
    XC_CHOOSE(name, parameters, arguments)
