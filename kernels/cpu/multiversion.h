// Run-time choice of the instruction set: a function marked FC_MULTIVERSION is compiled for each level and the best one
// is picked when the library is loaded. Only GCC on Linux x86-64 has what it takes; elsewhere it is compiled once.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(FASTCOLOR_SINGLE_VERSION)
#define FC_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FC_HAS_MULTIVERSION 1
#else
#define FC_MULTIVERSION
#define FC_HAS_MULTIVERSION 0
#endif

namespace fastcolor::cpu {

// The instruction set that the kernels run with: "AVX-512", "AVX2" or "baseline".
const char* simd_level();

}  // namespace fastcolor::cpu
