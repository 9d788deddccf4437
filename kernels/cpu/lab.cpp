#include "cpu/lab.h"

#include <array>
#include <cmath>

#include "common/lab_math.h"
#include "cpu/lab_kernels.h"
#include "cpu/multiversion.h"
#include "cpu/runs.h"
#include "cpu/vectors.h"

namespace fastcolor::cpu {
namespace {

const std::array<float, 256>& linear_of_byte() {
  static const auto table = [] {
    std::array<float, 256> t{};
    for (int i = 0; i < 256; ++i) {
      const double c = i / 255.0;
      t[i] = float(c > 0.04045 ? std::pow((c + 0.055) / 1.055, 2.4) : c / 12.92);
    }
    return t;
  }();
  return table;
}

// A table look-up does not vectorize well (gathers are slow), and needs no vectors: it is three loads a pixel.
void load_bytes(const View<const uint8_t>& in, Run& run, int64_t n) {
  const auto& table = linear_of_byte();
  copy_in(in, run.c, n, [&](uint8_t v) { return table[v]; });
}

namespace baseline {
#define FC_LANES 4
#include "cpu/simd_body.h"
#include "cpu/lab_body.h"
#undef FC_LANES
}  // namespace baseline

#if FC_HAS_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define FC_LANES 8
#include "cpu/simd_body.h"
#include "cpu/lab_body.h"
#undef FC_LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define FC_LANES 16
#include "cpu/simd_body.h"
#include "cpu/lab_body.h"
#undef FC_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace

const LabKernels& lab_kernels() {
#if FC_HAS_MULTIVERSION
  if (simd() == Simd::kAvx512) return avx512::kKernels;
  if (simd() == Simd::kAvx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

void rgb_to_lab(const Channels& rgb, const Channels& lab, int64_t images, int64_t pixels, int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [&](int64_t image, int64_t start, int64_t n) {
    Run run;
    if (rgb.sample == Sample::kUint8) {
      load_bytes(view<const uint8_t>(rgb, image, pixels, start), run, n);
    } else if (rgb.sample == Sample::kUint16) {
      k.load_words(view<const uint16_t>(rgb, image, pixels, start), run, n);
    } else {
      load(k, rgb, image, pixels, start, run, n);
      k.decode_srgb(run, n);
    }
    k.linear_run_to_lab(run, n);
    store(k, run, lab, image, pixels, start, n);
  });
}

void rgb_to_lab_backward(const Channels& grad_lab, const Channels& rgb, const Channels& grad_rgb, int64_t images,
                         int64_t pixels, int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [&](int64_t image, int64_t start, int64_t n) {
    Run c, grad;
    load(k, rgb, image, pixels, start, c, n);
    load(k, grad_lab, image, pixels, start, grad, n);
    k.rgb_to_lab_gradient(c, grad, n);
    store(k, grad, grad_rgb, image, pixels, start, n);
  });
}

void lab_to_rgb(const Channels& lab, const Channels& rgb, bool preserve_lightness, int64_t images, int64_t pixels,
                int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [&](int64_t image, int64_t start, int64_t n) {
    Run run, c;
    load(k, lab, image, pixels, start, run, n);
    preserve_lightness ? k.lab_run_to_linear_inside(run, c, n) : k.lab_run_to_linear(run, c, n);
    k.encode_srgb(c, n);
    store(k, c, rgb, image, pixels, start, n);
  });
}

void lab_to_rgb_backward(const Channels& grad_rgb, const Channels& lab, const Channels& grad_lab,
                         bool preserve_lightness, int64_t images, int64_t pixels, int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [&](int64_t image, int64_t start, int64_t n) {
    Run c, grad;
    load(k, lab, image, pixels, start, c, n);
    load(k, grad_rgb, image, pixels, start, grad, n);
    preserve_lightness ? k.preserve_gradient(c, grad, n) : k.clip_gradient(c, grad, n);
    store(k, grad, grad_lab, image, pixels, start, n);
  });
}

void inverse_cbrt(const float* x, float* out, int64_t n) { lab_kernels().inverse_cbrt(x, out, n); }

void power(const float* x, float p, float* out, int64_t n) { lab_kernels().power(x, p, out, n); }

void gamut_scales(const float* lab, float* t, int64_t n) {
  const LabKernels& k = lab_kernels();
  for_each_run(1, n, 1, [=, &k](int64_t, int64_t start, int64_t m) {
    Run run;
    k.load_floats({lab + start, n, 1}, run, m);
    k.gamut_scales(run, t + start, m);
  });
}

}  // namespace fastcolor::cpu
