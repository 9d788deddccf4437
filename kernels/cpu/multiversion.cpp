#include "cpu/multiversion.h"

namespace fastcolor::cpu {

const char* simd_level() {
#if FC_HAS_MULTIVERSION
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "baseline";
}

}  // namespace fastcolor::cpu
