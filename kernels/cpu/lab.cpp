#include "cpu/lab.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/lab_math.h"
#include "cpu/multiversion.h"

namespace fastcolor::cpu {
namespace {

// A run of pixels passes through three small planes in the first-level cache, so that the arithmetic is one vector loop
// for every sample type and layout.
constexpr int64_t kRun = 1024;
struct alignas(64) Run {
  float c[3][kRun];
};

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

// --- memory to planes and back ---------------------------------------------------------------------------------------

// Channel c of pixel i lies at [c * plane + i * step].
template <typename T>
struct View {
  T* at;
  int64_t plane, step;
};

template <typename T>
View<T> view(T* base, bool interleaved, int64_t image, int64_t pixels, int64_t start) {
  base += image * 3 * pixels;
  return interleaved ? View<T>{base + 3 * start, 1, 3} : View<T>{base + start, pixels, 1};
}

template <typename From, typename To, typename Convert>
FC_INLINE void copy_in(const View<const From>& in, To (&out)[3][kRun], int64_t n, Convert convert) {
  if (in.step == 1) {
    for (int c = 0; c < 3; ++c) {
      const From* p = in.at + c * in.plane;
      for (int64_t i = 0; i < n; ++i) out[c][i] = convert(p[i]);
    }
  } else {
    const From* p = in.at;
    for (int64_t i = 0; i < n; ++i) {
      out[0][i] = convert(p[3 * i]);
      out[1][i] = convert(p[3 * i + 1]);
      out[2][i] = convert(p[3 * i + 2]);
    }
  }
}

template <typename To, typename Convert>
FC_INLINE void copy_out(const float (&in)[3][kRun], const View<To>& out, int64_t n, Convert convert) {
  if (out.step == 1) {
    for (int c = 0; c < 3; ++c) {
      To* p = out.at + c * out.plane;
      for (int64_t i = 0; i < n; ++i) p[i] = convert(in[c][i]);
    }
  } else {
    To* p = out.at;
    for (int64_t i = 0; i < n; ++i) {
      p[3 * i] = convert(in[0][i]);
      p[3 * i + 1] = convert(in[1][i]);
      p[3 * i + 2] = convert(in[2][i]);
    }
  }
}

// A table look-up does not vectorize well (gathers are slow), and needs no vectors: it is three loads a pixel.
void load_bytes(const View<const uint8_t>& in, Run& run, int64_t n) {
  const auto& table = linear_of_byte();
  copy_in(in, run.c, n, [&](uint8_t v) { return table[v]; });
}

FC_MULTIVERSION void load_words(const View<const uint16_t>& in, Run& run, int64_t n) {
  copy_in(in, run.c, n, [](uint16_t v) { return srgb_to_linear(float(v) * (1.0f / 65535.0f)); });
}

FC_MULTIVERSION void load_floats(const View<const float>& in, Run& run, int64_t n) {
  copy_in(in, run.c, n, [](float v) { return v; });
}

FC_MULTIVERSION void store_floats(const Run& run, const View<float>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return v; });
}

FC_MULTIVERSION void store_bytes(const Run& run, const View<uint8_t>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return uint8_t(to_level(v, 255.0f)); });
}

FC_MULTIVERSION void store_words(const Run& run, const View<uint16_t>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return uint16_t(to_level(v, 65535.0f)); });
}

// --- arithmetic, in place on a run -------------------------------------------------------------------------------------

FC_MULTIVERSION void decode_srgb(Run& run, int64_t n) {
  for (auto& c : run.c) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) c[i] = srgb_to_linear(c[i]);
  }
}

FC_MULTIVERSION void encode_srgb(Run& run, int64_t n) {
  for (auto& c : run.c) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) c[i] = linear_to_srgb(clip(c[i]));
  }
}

FC_MULTIVERSION void linear_run_to_lab(Run& run, int64_t n) {
  float *r = run.c[0], *g = run.c[1], *b = run.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple lab = linear_to_lab(r[i], g[i], b[i]);
    r[i] = lab.x, g[i] = lab.y, b[i] = lab.z;
  }
}

FC_MULTIVERSION void lab_run_to_linear(Run& run, int64_t n) {
  float *L = run.c[0], *a = run.c[1], *b = run.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple c = lab_to_linear(L[i], a[i], b[i]);
    L[i] = c.x, a[i] = c.y, b[i] = c.z;
  }
}

FC_MULTIVERSION bool any_outside(const Run& run, int64_t n) {
  const float *L = run.c[0], *a = run.c[1], *b = run.c[2];
  int outside = 0;  // not the largest excess: a maximum of floats does not vectorize without -ffast-math
#pragma omp simd reduction(+ : outside)
  for (int64_t i = 0; i < n; ++i) {
    outside += gamut_excess(lab_to_linear(L[i], a[i], b[i])) > kGamutTolerance ? 1 : 0;
  }
  return outside != 0;
}

FC_MULTIVERSION void scale_into_gamut(Run& run, int64_t n) {
  float *L = run.c[0], *a = run.c[1], *b = run.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float t = gamut_scale(L[i], a[i], b[i]);
    a[i] *= t, b[i] *= t;
  }
}

// Bisection costs some thirty times a conversion: runs that are wholly inside, as most are, go without.
void preserve(Run& run, int64_t n) {
  if (any_outside(run, n)) scale_into_gamut(run, n);
}

FC_MULTIVERSION void rgb_to_lab_gradient(const Run& rgb, Run& grad, int64_t n) {
  const float *r = rgb.c[0], *g = rgb.c[1], *b = rgb.c[2];
  float *x = grad.c[0], *y = grad.c[1], *z = grad.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple d = linear_to_lab_backward(srgb_to_linear(r[i]), srgb_to_linear(g[i]), srgb_to_linear(b[i]), x[i],
                                            y[i], z[i]);
    x[i] = d.x * srgb_to_linear_slope(r[i]);
    y[i] = d.y * srgb_to_linear_slope(g[i]);
    z[i] = d.z * srgb_to_linear_slope(b[i]);
  }
}

// A clipped channel passes no gradient; at the very bounds it does, as torch.clamp has it.
FC_INLINE float encode_gradient(float c, float grad) {
  return c >= 0.0f && c <= 1.0f ? grad * linear_to_srgb_slope(c) : 0.0f;
}

template <bool kPreserve>
FC_INLINE Triple lab_to_rgb_gradient(float L, float a, float b, float grad_r, float grad_g, float grad_b) {
  const float t = kPreserve ? gamut_scale(L, a, b) : 1.0f;
  const Triple c = lab_to_linear(L, t * a, t * b);
  const Triple d = lab_to_linear_backward(L, t * a, t * b, encode_gradient(c.x, grad_r), encode_gradient(c.y, grad_g),
                                          encode_gradient(c.z, grad_b));
  return kPreserve ? gamut_scale_backward(L, a, b, t, d) : d;
}

FC_MULTIVERSION void clip_gradient(const Run& lab, Run& grad, int64_t n) {
  const float *L = lab.c[0], *a = lab.c[1], *b = lab.c[2];
  float *x = grad.c[0], *y = grad.c[1], *z = grad.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple d = lab_to_rgb_gradient<false>(L[i], a[i], b[i], x[i], y[i], z[i]);
    x[i] = d.x, y[i] = d.y, z[i] = d.z;
  }
}

FC_MULTIVERSION void preserve_gradient(const Run& lab, Run& grad, int64_t n) {
  const float *L = lab.c[0], *a = lab.c[1], *b = lab.c[2];
  float *x = grad.c[0], *y = grad.c[1], *z = grad.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple d = lab_to_rgb_gradient<true>(L[i], a[i], b[i], x[i], y[i], z[i]);
    x[i] = d.x, y[i] = d.y, z[i] = d.z;
  }
}

// --- threads over runs ---------------------------------------------------------------------------------------------------

template <typename Body>
void for_each_run(int64_t images, int64_t pixels, int threads, Body body) {
  const int64_t runs = (pixels + kRun - 1) / kRun;
  // threads == 1 must not enter OpenMP: a forked data-loader worker would hang in it
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t k = 0; k < images * runs; ++k) {
    const int64_t start = k % runs * kRun;
    body(k / runs, start, std::min(kRun, pixels - start));
  }
}

}  // namespace

void rgb_to_lab(const void* rgb, Sample sample, bool rgb_interleaved, float* lab, bool lab_interleaved, int64_t images,
                int64_t pixels, int threads) {
  for_each_run(images, pixels, threads, [=](int64_t image, int64_t start, int64_t n) {
    Run run;
    switch (sample) {
      case Sample::kUint8:
        load_bytes(view(static_cast<const uint8_t*>(rgb), rgb_interleaved, image, pixels, start), run, n);
        break;
      case Sample::kUint16:
        load_words(view(static_cast<const uint16_t*>(rgb), rgb_interleaved, image, pixels, start), run, n);
        break;
      case Sample::kFloat32:
        load_floats(view(static_cast<const float*>(rgb), rgb_interleaved, image, pixels, start), run, n);
        decode_srgb(run, n);
        break;
    }
    linear_run_to_lab(run, n);
    store_floats(run, view(lab, lab_interleaved, image, pixels, start), n);
  });
}

void rgb_to_lab_backward(const float* grad_lab, bool grad_lab_interleaved, const float* rgb, bool rgb_interleaved,
                         float* grad_rgb, bool grad_rgb_interleaved, int64_t images, int64_t pixels, int threads) {
  for_each_run(images, pixels, threads, [=](int64_t image, int64_t start, int64_t n) {
    Run c, grad;
    load_floats(view(rgb, rgb_interleaved, image, pixels, start), c, n);
    load_floats(view(grad_lab, grad_lab_interleaved, image, pixels, start), grad, n);
    rgb_to_lab_gradient(c, grad, n);
    store_floats(grad, view(grad_rgb, grad_rgb_interleaved, image, pixels, start), n);
  });
}

void lab_to_rgb(const float* lab, bool lab_interleaved, void* rgb, Sample sample, bool rgb_interleaved,
                bool preserve_lightness, int64_t images, int64_t pixels, int threads) {
  for_each_run(images, pixels, threads, [=](int64_t image, int64_t start, int64_t n) {
    Run run;
    load_floats(view(lab, lab_interleaved, image, pixels, start), run, n);
    if (preserve_lightness) preserve(run, n);
    lab_run_to_linear(run, n);
    encode_srgb(run, n);
    switch (sample) {
      case Sample::kUint8:
        store_bytes(run, view(static_cast<uint8_t*>(rgb), rgb_interleaved, image, pixels, start), n);
        break;
      case Sample::kUint16:
        store_words(run, view(static_cast<uint16_t*>(rgb), rgb_interleaved, image, pixels, start), n);
        break;
      case Sample::kFloat32:
        store_floats(run, view(static_cast<float*>(rgb), rgb_interleaved, image, pixels, start), n);
        break;
    }
  });
}

void lab_to_rgb_backward(const float* grad_rgb, bool grad_rgb_interleaved, const float* lab, bool lab_interleaved,
                         float* grad_lab, bool grad_lab_interleaved, bool preserve_lightness, int64_t images,
                         int64_t pixels, int threads) {
  for_each_run(images, pixels, threads, [=](int64_t image, int64_t start, int64_t n) {
    Run c, grad;
    load_floats(view(lab, lab_interleaved, image, pixels, start), c, n);
    load_floats(view(grad_rgb, grad_rgb_interleaved, image, pixels, start), grad, n);
    preserve_lightness ? preserve_gradient(c, grad, n) : clip_gradient(c, grad, n);
    store_floats(grad, view(grad_lab, grad_lab_interleaved, image, pixels, start), n);
  });
}

FC_MULTIVERSION void inverse_cbrt(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastcolor::inverse_cbrt(x[i]);
}

FC_MULTIVERSION void power(const float* x, float p, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastcolor::power(x[i], p);
}

}  // namespace fastcolor::cpu
