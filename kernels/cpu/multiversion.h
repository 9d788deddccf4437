// Run-time choice of the instruction set: code that is compiled for each, in a namespace of its own under `#pragma GCC
// target`, is picked by simd(). Only GCC on Linux x86-64 has what it takes; elsewhere there is the baseline alone.
// Not target_clones: those are resolved when the library is loaded, before a sanitizer runs and once for all.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FC_HAS_MULTIVERSION 1
#else
#define FC_HAS_MULTIVERSION 0
#endif

namespace fastcolor::cpu {

enum class Simd : int { kBaseline, kAvx2, kAvx512 };

// The instruction set that kernels run with from their next call on, and its name: "AVX-512", "AVX2" or "baseline".
Simd simd();
const char* simd_level();

// Asks for one: "avx512", "avx2", "baseline", or "auto" for the best that the machine has.
// Throws std::invalid_argument where the name is unknown or the machine does not have it.
void use_simd(const char* name);

}  // namespace fastcolor::cpu
