// What works on a run of pixels. No include guard: included once for each instruction set, inside a namespace and under
// `#pragma GCC target`, so that its loops are vectorized for each. A .cpp file includes cpu/lab_kernels.h first.

inline void load_words(const View<const uint16_t>& in, Run& run, int64_t n) {
  copy_in(in, run.c, n, [](uint16_t v) { return srgb_to_linear(float(v) * (1.0f / 65535.0f)); });
}

inline void load_floats(const View<const float>& in, Run& run, int64_t n) {
  copy_in(in, run.c, n, [](float v) { return v; });
}

inline void store_floats(const Run& run, const View<float>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return v; });
}

inline void store_bytes(const Run& run, const View<uint8_t>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return uint8_t(to_level(v, 255.0f)); });
}

inline void store_words(const Run& run, const View<uint16_t>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return uint16_t(to_level(v, 65535.0f)); });
}

// --- arithmetic, in place on a run -------------------------------------------------------------------------------------

inline void decode_srgb(Run& run, int64_t n) {
  for (auto& c : run.c) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) c[i] = srgb_to_linear(c[i]);
  }
}

inline void encode_srgb(Run& run, int64_t n) {
  for (auto& c : run.c) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) c[i] = linear_to_srgb(clip(c[i]));
  }
}

inline void linear_run_to_lab(Run& run, int64_t n) {
  float *r = run.c[0], *g = run.c[1], *b = run.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple lab = linear_to_lab(r[i], g[i], b[i]);
    r[i] = lab.x, g[i] = lab.y, b[i] = lab.z;
  }
}

inline void lab_run_to_linear(Run& run, int64_t n) {
  float *L = run.c[0], *a = run.c[1], *b = run.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple c = lab_to_linear(L[i], a[i], b[i]);
    L[i] = c.x, a[i] = c.y, b[i] = c.z;
  }
}

inline void scale_into_gamut(const float* L, float* a, float* b, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float t = gamut_scale(L[i], a[i], b[i]);
    a[i] *= t, b[i] *= t;
  }
}

// To linear light at x, y, z; how many are outside sRGB.
inline int lab_to_linear_and_count(const float* L, const float* a, const float* b, float* x, float* y, float* z,
                                   int64_t n) {
  int outside = 0;  // not the largest excess: a maximum of floats does not vectorize without -ffast-math
#pragma omp simd reduction(+ : outside)
  for (int64_t i = 0; i < n; ++i) {
    const Triple c = lab_to_linear(L[i], a[i], b[i]);
    outside += gamut_excess(c) > kGamutTolerance ? 1 : 0;
    x[i] = c.x, y[i] = c.y, z[i] = c.z;
  }
  return outside;
}

// Lab to linear light inside sRGB. Bisection costs some thirty times a conversion: pieces that are wholly inside, as most
// are, go without.
inline void lab_run_to_linear_inside(Run& run, int64_t n) {
  constexpr int64_t kPiece = 32;
  alignas(64) float x[kPiece], y[kPiece], z[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    float *L = run.c[0] + i, *a = run.c[1] + i, *b = run.c[2] + i;
    const int64_t m = n - i < kPiece ? n - i : kPiece;
    if (lab_to_linear_and_count(L, a, b, x, y, z, m) > 0) {
      scale_into_gamut(L, a, b, m);
      lab_to_linear_and_count(L, a, b, x, y, z, m);
    }
    memcpy(L, x, m * sizeof(float)), memcpy(a, y, m * sizeof(float)), memcpy(b, z, m * sizeof(float));
  }
}

inline void rgb_to_lab_gradient(const Run& rgb, Run& grad, int64_t n) {
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

inline void clip_gradient(const Run& lab, Run& grad, int64_t n) {
  const float *L = lab.c[0], *a = lab.c[1], *b = lab.c[2];
  float *x = grad.c[0], *y = grad.c[1], *z = grad.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple d = lab_to_rgb_gradient<false>(L[i], a[i], b[i], x[i], y[i], z[i]);
    x[i] = d.x, y[i] = d.y, z[i] = d.z;
  }
}

inline void preserve_gradient(const Run& lab, Run& grad, int64_t n) {
  const float *L = lab.c[0], *a = lab.c[1], *b = lab.c[2];
  float *x = grad.c[0], *y = grad.c[1], *z = grad.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple d = lab_to_rgb_gradient<true>(L[i], a[i], b[i], x[i], y[i], z[i]);
    x[i] = d.x, y[i] = d.y, z[i] = d.z;
  }
}

// --- the approximations by themselves, for the tests of their bounds --------------------------------------------------

inline void inverse_cbrt(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastcolor::inverse_cbrt(x[i]);
}

inline void power(const float* x, float p, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastcolor::power(x[i], p);
}

const LabKernels kKernels = {load_words, load_floats, store_floats, store_bytes, store_words, decode_srgb, encode_srgb,
                          linear_run_to_lab, lab_run_to_linear, lab_run_to_linear_inside, rgb_to_lab_gradient, clip_gradient,
                          preserve_gradient, inverse_cbrt, power};
