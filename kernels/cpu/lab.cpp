#include "cpu/lab.h"

#include <array>
#include <cmath>

#include "common/lab_math.h"
#include "cpu/lab_kernels.h"
#include "cpu/multiversion.h"
#include "cpu/runs.h"

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
#include "cpu/lab_body.h"
}  // namespace baseline

#if FC_HAS_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "cpu/lab_body.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "cpu/lab_body.h"
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

void rgb_to_lab(const void* rgb, Sample sample, bool rgb_interleaved, float* lab, bool lab_interleaved, int64_t images,
                int64_t pixels, int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [=, &k](int64_t image, int64_t start, int64_t n) {
    Run run;
    switch (sample) {
      case Sample::kUint8:
        load_bytes(view(static_cast<const uint8_t*>(rgb), rgb_interleaved, image, pixels, start), run, n);
        break;
      case Sample::kUint16:
        k.load_words(view(static_cast<const uint16_t*>(rgb), rgb_interleaved, image, pixels, start), run, n);
        break;
      case Sample::kFloat32:
        k.load_floats(view(static_cast<const float*>(rgb), rgb_interleaved, image, pixels, start), run, n);
        k.decode_srgb(run, n);
        break;
    }
    k.linear_run_to_lab(run, n);
    k.store_floats(run, view(lab, lab_interleaved, image, pixels, start), n);
  });
}

void rgb_to_lab_backward(const float* grad_lab, bool grad_lab_interleaved, const float* rgb, bool rgb_interleaved,
                         float* grad_rgb, bool grad_rgb_interleaved, int64_t images, int64_t pixels, int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [=, &k](int64_t image, int64_t start, int64_t n) {
    Run c, grad;
    k.load_floats(view(rgb, rgb_interleaved, image, pixels, start), c, n);
    k.load_floats(view(grad_lab, grad_lab_interleaved, image, pixels, start), grad, n);
    k.rgb_to_lab_gradient(c, grad, n);
    k.store_floats(grad, view(grad_rgb, grad_rgb_interleaved, image, pixels, start), n);
  });
}

void lab_to_rgb(const float* lab, bool lab_interleaved, void* rgb, Sample sample, bool rgb_interleaved,
                bool preserve_lightness, int64_t images, int64_t pixels, int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [=, &k](int64_t image, int64_t start, int64_t n) {
    Run run;
    k.load_floats(view(lab, lab_interleaved, image, pixels, start), run, n);
    preserve_lightness ? k.lab_run_to_linear_inside(run, n) : k.lab_run_to_linear(run, n);
    k.encode_srgb(run, n);
    switch (sample) {
      case Sample::kUint8:
        k.store_bytes(run, view(static_cast<uint8_t*>(rgb), rgb_interleaved, image, pixels, start), n);
        break;
      case Sample::kUint16:
        k.store_words(run, view(static_cast<uint16_t*>(rgb), rgb_interleaved, image, pixels, start), n);
        break;
      case Sample::kFloat32:
        k.store_floats(run, view(static_cast<float*>(rgb), rgb_interleaved, image, pixels, start), n);
        break;
    }
  });
}

void lab_to_rgb_backward(const float* grad_rgb, bool grad_rgb_interleaved, const float* lab, bool lab_interleaved,
                         float* grad_lab, bool grad_lab_interleaved, bool preserve_lightness, int64_t images,
                         int64_t pixels, int threads) {
  const LabKernels& k = lab_kernels();
  for_each_run(images, pixels, threads, [=, &k](int64_t image, int64_t start, int64_t n) {
    Run c, grad;
    k.load_floats(view(lab, lab_interleaved, image, pixels, start), c, n);
    k.load_floats(view(grad_rgb, grad_rgb_interleaved, image, pixels, start), grad, n);
    preserve_lightness ? k.preserve_gradient(c, grad, n) : k.clip_gradient(c, grad, n);
    k.store_floats(grad, view(grad_lab, grad_lab_interleaved, image, pixels, start), n);
  });
}

void inverse_cbrt(const float* x, float* out, int64_t n) { lab_kernels().inverse_cbrt(x, out, n); }

void power(const float* x, float p, float* out, int64_t n) { lab_kernels().power(x, p, out, n); }

void gamut_scales(const float* lab, float* t, int64_t n) {
  const LabKernels& k = lab_kernels();
  for_each_run(1, n, 1, [=, &k](int64_t, int64_t start, int64_t m) {
    Run run;
    k.load_floats(view(lab, false, 0, n, start), run, m);
    k.gamut_scales(run, t + start, m);
  });
}

}  // namespace fastcolor::cpu
