// What works on a piece of a row. No include guard: included once for each instruction set, after simd_body.h, as
// lab_body.h is. render.cpp defines Expanded and Columns first.

// 2^x for x <= 0; 0 at -127 and below, at most 2^-126 from there to -126, and nan stays. Max relative error 3e-7 above
// -126 (test_render.py: test_exp2_bound).
FC_INLINE float exp2_of(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 · 2^23: what is added to it is rounded to an integer
  const float y = x < -127.0f ? -127.0f : x;
  const float z = y + kMagic;  // its lowest bits are the exponent, of which 0 makes the float 0
  return exp2_of_fraction(y - (z - kMagic)) * float_of(int32_t(uint32_t(bits_of(z)) << 23));
}

// Lanes of v by number, modulo their count.
FC_INLINE V pick(V v, I lane) {
#if FC_LANES == 16
  return _mm512_permutexvar_ps((__m512i)lane, v);
#elif FC_LANES == 8
  return _mm256_permutevar8x32_ps(v, (__m256i)lane);
#else
  return __builtin_shuffle(v, lane);
#endif
}

// One low-resolution row, brought to the columns of a piece: its values left and right of each. Where the result is
// larger, those of a vector of columns come out of one vector: loads by number would take half as long as all the rest.
inline void expand(const float* guide, const float* a, const float* b, const Columns& columns, Expanded& to,
                   int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t end = i + kLanes < n ? i + kLanes : n;
    const int32_t first = columns.left[i], most = columns.all - kLanes, base = first < most ? first : most;
    if (kLanes > 4 && base >= 0 && columns.right[end - 1] - base < kLanes) {
      I left, right;
      memcpy(&left, columns.left + i, sizeof left), memcpy(&right, columns.right + i, sizeof right);
      left -= base, right -= base;
      const V of_guide = load(guide + base), of_a = load(a + base), of_b = load(b + base);
      store(to.guide[0] + i, pick(of_guide, left)), store(to.guide[1] + i, pick(of_guide, right));
      store(to.a[0] + i, pick(of_a, left)), store(to.a[1] + i, pick(of_a, right));
      store(to.b[0] + i, pick(of_b, left)), store(to.b[1] + i, pick(of_b, right));
      continue;
    }
    for (int64_t k = i; k < end; ++k) {
      const int32_t left = columns.left[k], right = columns.right[k];
      to.guide[0][k] = guide[left], to.guide[1][k] = guide[right];
      to.a[0][k] = a[left], to.a[1][k] = a[right];
      to.b[0][k] = b[left], to.b[1][k] = b[right];
    }
  }
}

// The chroma of a piece of a row from the two low-resolution rows about it; `low` is the share of the second.
inline void upsample(const Expanded& above, const Expanded& below, const Columns& columns, float low, float sharpness,
                     float floor, const float* L, float* a, float* b, int64_t n) {
  const float high = 1.0f - low;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float light = L[i], right = columns.share[i], left = 1.0f - right;
    const float d0 = above.guide[0][i] - light, d1 = above.guide[1][i] - light;
    const float d2 = below.guide[0][i] - light, d3 = below.guide[1][i] - light;
    const float w0 = (exp2_of(-sharpness * d0 * d0) + floor) * (high * left);
    const float w1 = (exp2_of(-sharpness * d1 * d1) + floor) * (high * right);
    const float w2 = (exp2_of(-sharpness * d2 * d2) + floor) * (low * left);
    const float w3 = (exp2_of(-sharpness * d3 * d3) + floor) * (low * right);
    const float scale = 1.0f / ((w0 + w1) + (w2 + w3));
    a[i] = scale * ((w0 * above.a[0][i] + w1 * above.a[1][i]) + (w2 * below.a[0][i] + w3 * below.a[1][i]));
    b[i] = scale * ((w0 * above.b[0][i] + w1 * above.b[1][i]) + (w2 * below.b[0][i] + w3 * below.b[1][i]));
  }
}

// --- video -----------------------------------------------------------------------------------------------------------

// Luma of two rows down, or three, to one: out = shares · rows.
template <typename T>
inline void mix_rows(const T* p0, const T* p1, const T* p2, const float* share, float* out, int64_t n) {
  const float s0 = share[0], s1 = share[1], s2 = share[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = s0 * float(p0[i]) + s1 * float(p1[i]) + s2 * float(p2[i]);
}

// Every second of the columns with its neighbours; `in` has one more column on each side.
inline void halve_columns(const float* in, const float* share, float black, float scale, float* out, int64_t n) {
  const float s0 = share[0], s1 = share[1], s2 = share[2];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = (s0 * in[2 * i] + s1 * in[2 * i + 1] + s2 * in[2 * i + 2] - black) * scale;
  }
}

// y: luma 0 .. 1 at the chroma samples; L: its lightness.
inline void lightness_of(const float* y, float* L, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) L[i] = grey_lightness(y[i]);
}

// Levels of Cb and Cr, in place of a and b.
inline void chroma_levels(const UvJob& job, const float* luma, const float* lightness, float* a, float* b, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Chroma c = chroma_of(job, luma[i], lightness[i], a[i], b[i]);
    a[i] = c.u, b[i] = c.v;
  }
}

template <typename T>
inline void store_levels(const float* level, T* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = T(int32_t(level[i]));
}

inline void exp2_run(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp2_of(x[i]);
}

const RenderKernels kKernels = {expand, upsample, mix_rows<uint8_t>, mix_rows<uint16_t>, halve_columns,
                                lightness_of, chroma_levels, store_levels<uint8_t>,
                                store_levels<uint16_t>, exp2_run};
