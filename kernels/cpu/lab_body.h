// What works on a run of pixels. No include guard: included once for each instruction set, inside a namespace and under
// `#pragma GCC target`, so that its loops are vectorized for each, after simd_body.h. A .cpp file includes
// cpu/lab_kernels.h first.

inline void load_words(const View<const uint16_t>& in, Run& run, int64_t n) {
  copy_in(in, run.c, n, [](uint16_t v) { return srgb_to_linear(float(v) * (1.0f / 65535.0f)); });
}

inline void load_floats(const View<const float>& in, Run& run, int64_t n) {
  copy_in(in, run.c, n, [](float v) { return v; });
}

inline void store_floats(const Run& run, const View<float>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return v; });
}

// n neighbouring samples of a 16-bit type to float32, or back.
template <typename From, typename To>
inline void convert(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_some(to + i, load_some(from + i, n - i, 0.0f), 0, n - i);
}

// Interleaved samples change their type in a row, and their order as float32.
struct alignas(64) InOrder {
  float samples[3 * kRun];
};

template <typename T>
inline void load_halves(const View<const T>& in, Run& run, int64_t n) {
  if (in.step == 1) {
    for (int c = 0; c < 3; ++c) convert(in.at + c * in.plane, run.c[c], n);
    return;
  }
  InOrder all;
  convert(in.at, all.samples, 3 * n);
  load_floats({all.samples, 1, 3}, run, n);
}

template <typename T>
inline void store_halves(const Run& run, const View<T>& out, int64_t n) {
  if (out.step == 1) {
    for (int c = 0; c < 3; ++c) convert(run.c[c], out.at + c * out.plane, n);
    return;
  }
  InOrder all;
  store_floats(run, {all.samples, 1, 3}, n);
  convert(all.samples, out.at, 3 * n);
}

inline void store_bytes(const Run& run, const View<uint8_t>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return uint8_t(to_level(v, 255.0f)); });
}

inline void store_words(const Run& run, const View<uint16_t>& out, int64_t n) {
  copy_out(run.c, out, n, [](float v) { return uint16_t(to_level(v, 65535.0f)); });
}

// --- arithmetic, in place on a run -----------------------------------------------------------------------------------

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

inline void lab_run_to_linear(const Run& lab, Run& linear, int64_t n) {
  const float *L = lab.c[0], *a = lab.c[1], *b = lab.c[2];
  float *x = linear.c[0], *y = linear.c[1], *z = linear.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple c = lab_to_linear(L[i], a[i], b[i]);
    x[i] = c.x, y[i] = c.y, z[i] = c.z;
  }
}

// Which colours of a piece in linear light are outside sRGB, -1 or 0 for each; whether any is. By vectors: in one loop
// with the conversion, GCC takes both pixel by pixel.
constexpr int64_t kPiece = 64;
inline bool find_outside(const float* r, const float* g, const float* b, int32_t (&outside)[kPiece]) {
  I any{};
  for (int64_t i = 0; i < kPiece; i += kLanes) {
    const I set = gamut_excess(load(r + i), load(g + i), load(b + i)) > splat(kGamutTolerance);
    memcpy(outside + i, &set, sizeof set);
    any |= set;
  }
  int64_t pairs[kLanes / 2], found = 0;
  memcpy(pairs, &any, sizeof any);
  for (const int64_t pair : pairs) found |= pair;
  return found != 0;
}

// Appends to `at` the places of those of n flags that are -1, each plus `start`; returns their new count.
inline int64_t append_places(const int32_t* set, int64_t start, int64_t n, int32_t* at, int64_t count) {
  for (int64_t i = 0; i < n; ++i) {
    at[count] = int32_t(start + i);
    count -= set[i];
  }
  return count;
}

// The colours at some places of a run, one after the other; then greys up to a whole number of vectors, since what is
// left over goes one by one. Returns how many that makes.
inline int64_t gather(const Run& from, const int32_t* at, int64_t count, Run& to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < 3; ++c) to.c[c][i] = from.c[c][at[i]];
  }
  const int64_t whole = (count + 15) / 16 * 16;
  for (int64_t i = count; i < whole; ++i) to.c[0][i] = 50.0f, to.c[1][i] = to.c[2][i] = 0.0f;
  return whole;
}

// Colours outside sRGB, by themselves: few pictures have many.
struct Outside {
  int64_t count;
  int32_t at[kRun];  // where they are in their run
  Run lab;
  alignas(64) float t[kRun];  // their gamut scales
};

inline void scale_into_gamut(Outside& o) {
  const float *L = o.lab.c[0], *a = o.lab.c[1], *b = o.lab.c[2];
  const int64_t whole = (o.count + 15) / 16 * 16;
  alignas(64) int32_t left[kRun];
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) {
    const float t = gamut_guess(L[i], a[i], b[i]);
    left[i] = gamut_border(L[i], a[i], b[i], t) ? 0 : -1;
    o.t[i] = t;
  }
  int32_t at[kRun];
  const int64_t count = append_places(left, 0, o.count, at, 0);
  if (count == 0) return;
  Run lab;
  const int64_t end = gather(o.lab, at, count, lab);
  float *l = lab.c[0], *p = lab.c[1], *q = lab.c[2];
#pragma omp simd
  for (int64_t i = 0; i < end; ++i) l[i] = gamut_bisect(l[i], p[i], q[i]);
  for (int64_t i = 0; i < count; ++i) o.t[at[i]] = l[i];
}

// A run in linear light, and those of its colours that are outside sRGB, with their scales.
inline void lab_run_to_linear_and_outside(const Run& lab, Run& linear, Outside& o, int64_t n) {
  lab_run_to_linear(lab, linear, n);
  const int64_t end = (n + kPiece - 1) / kPiece * kPiece;
  for (auto& c : linear.c) std::fill(c + n, c + end, 0.0f);  // inside
  alignas(64) int32_t set[kPiece];
  o.count = 0;
  for (int64_t i = 0; i < n; i += kPiece) {  // most are wholly inside
    if (find_outside(linear.c[0] + i, linear.c[1] + i, linear.c[2] + i, set)) {
      o.count = append_places(set, i, std::min(kPiece, n - i), o.at, o.count);
    }
  }
  if (o.count == 0) return;
  gather(lab, o.at, o.count, o.lab);
  scale_into_gamut(o);
}

// Lab to linear light inside sRGB.
inline void lab_run_to_linear_inside(const Run& lab, Run& linear, int64_t n) {
  Outside o;
  lab_run_to_linear_and_outside(lab, linear, o, n);
  if (o.count == 0) return;
  float *L = o.lab.c[0], *a = o.lab.c[1], *b = o.lab.c[2];
  const int64_t whole = (o.count + 15) / 16 * 16;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) {
    const Triple c = lab_to_linear(L[i], o.t[i] * a[i], o.t[i] * b[i]);
    L[i] = c.x, a[i] = c.y, b[i] = c.z;
  }
  for (int64_t i = 0; i < o.count; ++i) {
    for (int c = 0; c < 3; ++c) linear.c[c][o.at[i]] = o.lab.c[c][i];
  }
}

// The scale of each colour of a run.
inline void gamut_scales(const Run& lab, float* t, int64_t n) {
  Run linear;
  Outside o;
  lab_run_to_linear_and_outside(lab, linear, o, n);
  for (int64_t i = 0; i < n; ++i) t[i] = 1.0f;
  for (int64_t i = 0; i < o.count; ++i) t[o.at[i]] = o.t[i];
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

FC_INLINE Triple lab_to_rgb_gradient(float L, float a, float b, float grad_r, float grad_g, float grad_b) {
  const Triple c = lab_to_linear(L, a, b);
  return lab_to_linear_backward(L, a, b, encode_gradient(c.x, grad_r), encode_gradient(c.y, grad_g),
                                encode_gradient(c.z, grad_b));
}

inline void clip_gradient(const Run& lab, Run& grad, int64_t n) {
  const float *L = lab.c[0], *a = lab.c[1], *b = lab.c[2];
  float *x = grad.c[0], *y = grad.c[1], *z = grad.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple d = lab_to_rgb_gradient(L[i], a[i], b[i], x[i], y[i], z[i]);
    x[i] = d.x, y[i] = d.y, z[i] = d.z;
  }
}

inline void preserve_gradient(const Run& lab, Run& grad, int64_t n) {
  alignas(64) float t[kRun];
  gamut_scales(lab, t, n);
  const float *L = lab.c[0], *a = lab.c[1], *b = lab.c[2];
  float *x = grad.c[0], *y = grad.c[1], *z = grad.c[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Triple inside = lab_to_rgb_gradient(L[i], t[i] * a[i], t[i] * b[i], x[i], y[i], z[i]);
    const Triple d = gamut_scale_backward(L[i], a[i], b[i], t[i], inside);
    x[i] = d.x, y[i] = d.y, z[i] = d.z;
  }
}

// --- the approximations by themselves, for the tests of their bounds -------------------------------------------------

inline void inverse_cbrt(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastcolor::inverse_cbrt(x[i]);
}

inline void power(const float* x, float p, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastcolor::power(x[i], p);
}

const LabKernels kKernels = {
    load_words, load_floats, load_halves<Float16>, load_halves<BFloat16>,
    store_bytes, store_words, store_floats, store_halves<Float16>, store_halves<BFloat16>,
    convert<Float16, float>, convert<BFloat16, float>, decode_srgb, encode_srgb, linear_run_to_lab, lab_run_to_linear,
    lab_run_to_linear_inside, rgb_to_lab_gradient, clip_gradient, preserve_gradient, gamut_scales, inverse_cbrt, power};
