// Vectors of FC_LANES floats. No include guard: included once for each instruction set, inside a namespace and under
// `#pragma GCC target`, so that a template over them is compiled for each. A .cpp file includes <cstring> and, on x86,
// <immintrin.h> first.

constexpr int kLanes = FC_LANES;
typedef float V __attribute__((vector_size(4 * FC_LANES)));
typedef int32_t I __attribute__((vector_size(4 * FC_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * FC_LANES)));
typedef uint16_t S __attribute__((vector_size(2 * FC_LANES)));

FC_INLINE V splat(float x) { return x - V{}; }

FC_INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
FC_INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// bfloat16 is the upper half of a float32.
FC_INLINE V load(const BFloat16* p) {
  S s;
  memcpy(&s, p, sizeof s);
  return (V)(__builtin_convertvector(s, U) << 16);
}
FC_INLINE void store(BFloat16* p, V v) {
  const U bits = (U)v;
  const U even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const S s = __builtin_convertvector(v == v ? even : U{} + 0x7fc0, S);
  memcpy(p, &s, sizeof s);
}

#if FC_LANES == 16
FC_INLINE V load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FC_INLINE void store(Float16* p, V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
FC_INLINE V maximum(V a, V b) { return _mm512_max_ps(a, b); }
#elif FC_LANES == 8
FC_INLINE V load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FC_INLINE void store(Float16* p, V v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
FC_INLINE V maximum(V a, V b) { return _mm256_max_ps(a, b); }
#else
// float16 without hardware for it: the exponent is moved by a multiplication, which also takes care of subnormals.
FC_INLINE V load(const Float16* p) {
  S s;
  memcpy(&s, p, sizeof s);
  const U h = __builtin_convertvector(s, U);
  const U magnitude = h & 0x7fff;
  const U finite = (U)((V)(magnitude << 13) * 0x1p112f);
  const U wide = (I)magnitude >= 0x7c00 ? finite | 0x7f800000 : finite;
  return (V)(wide | ((h & 0x8000) << 16));
}
FC_INLINE void store(Float16* p, V v) {
  const U bits = (U)v, magnitude = bits & 0x7fffffff;
  // adding 2^-14 · 2^13 units rounds a subnormal in the float32 adder
  const U subnormal = (U)((V)magnitude + 0.5f) - 0x3f000000;
  const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  U h = (I)magnitude < 0x38800000 ? subnormal : normal;
  h = (I)magnitude >= 0x47800000 ? ((I)magnitude > 0x7f800000 ? U{} + 0x7e00 : U{} + 0x7c00) : h;
  const S s = __builtin_convertvector(h | ((bits >> 16) & 0x8000), S);
  memcpy(p, &s, sizeof s);
}
// a > b ? a : b, so that a nan in b stays and one in a goes: the order of the x86 instruction
FC_INLINE V maximum(V a, V b) { return a > b ? a : b; }
#endif

// Whether a vector of T can be a whole cache line.
template <typename T>
constexpr bool kStreams = FC_LANES == 16 && sizeof(T) == 4;

// Past the caches where v is a whole cache line, else as `store`. Call `streamed` before others read.
template <typename T>
FC_INLINE void stream(T* p, V v) {
#if FC_LANES == 16
  if constexpr (kStreams<T>) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) return _mm512_stream_ps(p, v);
  }
#endif
  store(p, v);
}
FC_INLINE void streamed() {
#if FC_LANES == 16
  _mm_sfence();
#endif
}

// The first n of kLanes values; the others are `rest`.
template <typename T>
FC_INLINE V load_some(const T* p, int64_t n, float rest) {
  T all[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  float wide[kLanes];
  store(wide, load(all));
  for (int64_t i = n; i < kLanes; ++i) wide[i] = rest;
  return load(wide);
}

// Stores lanes [from, from + n) at p.
template <typename T>
FC_INLINE void store_some(T* p, V v, int64_t from, int64_t n) {
  T all[kLanes];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) p[i] = all[from + i];
}

// Stores the first n lanes, n < kLanes.
template <typename T>
FC_INLINE void store_first(T* p, V v, int64_t n) {
#if FC_LANES == 16
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
#endif
  store_some(p, v, 0, n);
}

#if FC_LANES == 16
FC_INLINE float sum(V v) { return _mm512_reduce_add_ps(v); }
FC_INLINE float largest(V v) { return _mm512_reduce_max_ps(v); }
#else
FC_INLINE float sum(V v) {
#if FC_LANES == 8
  typedef float H __attribute__((vector_size(16)));
  const H h = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const V h = v;
#endif
  return (h[0] + h[2]) + (h[1] + h[3]);
}
FC_INLINE float largest(V v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
#endif

// The sum, or the largest lane, of each of P vectors.
template <int P>
FC_INLINE void sums(const V (&v)[P], float (&out)[P]) {
  for (int p = 0; p < P; ++p) out[p] = sum(v[p]);
}
template <int P>
FC_INLINE void largests(const V (&v)[P], float (&out)[P]) {
  for (int p = 0; p < P; ++p) out[p] = largest(v[p]);
}
#if FC_LANES == 16
// Four at once take a third of the instructions of four by themselves.
template <typename Join>
FC_INLINE void fold(const V (&v)[4], float (&out)[4], Join join) {
  const V ab = join(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const V cd = join(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const V x = join(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));  // a b c d in each quarter
  const V y = join(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  const V z = join(y, _mm512_shuffle_f32x4(y, y, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(z));
}
FC_INLINE void sums(const V (&v)[4], float (&out)[4]) {
  fold(v, out, [](V a, V b) __attribute__((always_inline)) -> V { return a + b; });
}
FC_INLINE void largests(const V (&v)[4], float (&out)[4]) {
  fold(v, out, [](V a, V b) __attribute__((always_inline)) -> V { return maximum(a, b); });
}
#endif

// 2^x for x <= 0; 0 at -127 and below, at most 2^-126 from there to -126, and nan stays. Max relative error 2.5e-7
// above -126 (test_mean_field.py: test_exp2_bound).
#if FC_LANES == 4
FC_INLINE V exp2_of(V x) {
  const V magic = splat(12582912.0f + 127.0f);  // 1.5 · 2^23: what is added to it is rounded to an integer
  x = maximum(splat(-127.0f), x);
  const V z = x + magic;
  // the lowest bits of z are the exponent, of which 0 makes the float 0
  return exp2_of_fraction(x - (z - magic)) * (V)((U)z << 23);
}
template <int P>
FC_INLINE void exp2_of(V (&x)[P]) {
  for (int i = 0; i < P; ++i) x[i] = exp2_of(x[i]);
}
#else
// 2^(n / steps) · 2^f, the first from a table of one or two registers: multiplications are what bounds the passes over
// the labels, and a table leaves half of them to the polynomial. n / steps may go below -126 only to -127, where the
// sum of bits is 0.
template <int P>
FC_INLINE void exp2_of(V (&x)[P]) {
  constexpr int kShift = FC_LANES == 16 ? 18 : 20;  // 23 - log2(steps)
  const V magic = splat(1.5f * (1 << kShift));      // what is added to it is rounded to 1 / steps
  V z[P];
  U power[P];
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) x[i] = maximum(splat(-127.0f), x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) z[i] = x[i] + magic;
#if FC_LANES == 16
  const __m512i low = _mm512_load_si512(powers_32.bits), high = _mm512_load_si512(powers_32.bits + 16);
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) power[i] = (U)_mm512_permutex2var_epi32(low, (__m512i)z[i], high);
#else
  const __m256i table = _mm256_load_si256((const __m256i*)powers_8.bits);
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) power[i] = (U)_mm256_permutevar8x32_epi32(table, (__m256i)z[i]);
#endif
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) {
    power[i] += (U)z[i] << kShift;
    x[i] -= z[i] - magic;
  }
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i) {
#if FC_LANES == 16
    const V p = 0.240226492f * x[i] + 0.693157315f;
#else
    const V p = (0.0554962233f * x[i] + 0.240257636f) * x[i] + 0.693147242f;
#endif
    x[i] = (V)power[i] + (V)power[i] * (p * x[i]);
  }
}
FC_INLINE V exp2_of(V x) {
  V one[1] = {x};
  exp2_of(one);
  return one[0];
}
#endif
