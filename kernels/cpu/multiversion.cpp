#include "cpu/multiversion.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace fastcolor::cpu {
namespace {

Simd best() {
#if FC_HAS_MULTIVERSION
  if (__builtin_cpu_supports("x86-64-v4")) return Simd::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Simd::kAvx2;
#endif
  return Simd::kBaseline;
}

std::atomic<Simd>& chosen() {
  static std::atomic<Simd> level{best()};
  return level;
}

}  // namespace

Simd simd() { return chosen().load(std::memory_order_relaxed); }

const char* simd_level() {
  switch (simd()) {
    case Simd::kAvx512: return "AVX-512";
    case Simd::kAvx2: return "AVX2";
    default: return "baseline";
  }
}

void use_simd(const char* name) {
  const std::string wish = name;
  Simd level = best();
  if (wish == "avx512") {
    level = Simd::kAvx512;
  } else if (wish == "avx2") {
    level = Simd::kAvx2;
  } else if (wish == "baseline") {
    level = Simd::kBaseline;
  } else if (wish != "auto") {
    throw std::invalid_argument("must be auto, avx512, avx2 or baseline, got '" + wish + "'");
  }
  if (level > best()) throw std::invalid_argument("'" + wish + "' is not there: this machine, or this build, lacks it");
  chosen() = level;
}

}  // namespace fastcolor::cpu
