// What code over vectors (simd_body.h) needs before it, once for all instruction sets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/lab_math.h"
#include "common/storage.h"
#include "cpu/multiversion.h"

#if FC_HAS_MULTIVERSION
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of _mm512_undefined_ps in the header of GCC 12
#endif

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastcolor::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896f;

// Bits of 2^(j / kSteps), less what j adds to them when n = kSteps · integer + j is shifted into the exponent. Filled
// here, where no code for another instruction set can come in.
template <int kSteps>
struct Powers {
  alignas(64) uint32_t bits[kSteps];
  Powers() {
    for (int j = 0; j < kSteps; ++j) {
      const float power = float(std::exp2(j / double(kSteps)));
      memcpy(bits + j, &power, sizeof power);
      bits[j] -= uint32_t(j) * (uint32_t(1 << 23) / kSteps);
    }
  }
};

#if FC_HAS_MULTIVERSION
const Powers<8> powers_8;
const Powers<32> powers_32;
#endif

// Fresh memory costs a page fault every 4 KB, for a large result as much as the field itself: 60 ms for 160 MB. Huge
// pages make that 15.
inline void expect_writes([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + uintptr_t(bytes)) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

}  // namespace
}  // namespace fastcolor::cpu
