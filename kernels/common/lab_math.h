// Colour mathematics for single pixels, shared by the C++ and the CUDA kernels.
//
// All of it is branch-free float32 arithmetic without libm calls, so that a loop over it vectorizes. Constants are
// those of scikit-image: sRGB (IEC 61966-2-1), D65, 2 degree observer. Each approximation states its bound; tests
// assert them.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FC_INLINE __host__ __device__ __forceinline__
#define FC_UNROLL _Pragma("unroll 1")  // a GPU needs no unrolling here, and the code stays small
#else
#define FC_INLINE inline __attribute__((always_inline))
#define FC_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastcolor {

// Linear sRGB -> XYZ divided by the white point, and back; both from float64. Scalars, since nvcc lets device code read
// a constexpr only by value.
constexpr double kWhiteX = 0.95047, kWhiteZ = 1.08883;
constexpr float kXr = float(0.412453 / kWhiteX), kXg = float(0.357580 / kWhiteX), kXb = float(0.180423 / kWhiteX);
constexpr float kYr = 0.212671f, kYg = 0.715160f, kYb = 0.072169f;
constexpr float kZr = float(0.019334 / kWhiteZ), kZg = float(0.119193 / kWhiteZ), kZb = float(0.950227 / kWhiteZ);
constexpr float kRx = float(3.2404813432005266 * kWhiteX), kRy = -1.5371515162713185f,
                kRz = float(-0.49853632616888777 * kWhiteZ);
constexpr float kGx = float(-0.96925494999656822 * kWhiteX), kGy = 1.8759900014898907f,
                kGz = float(0.041555926558292815 * kWhiteZ);
constexpr float kBx = float(0.055646639135177208 * kWhiteX), kBy = -0.20404133836651124f,
                kBz = float(1.0573110696453443 * kWhiteZ);

// f of CIE 15:2004, 8.2.1.1, in scikit-image's rounding of its constants.
constexpr float kKnee = 0.008856f, kInverseKnee = 0.2068966f, kSlope = 7.787f, kOffset = float(16.0 / 116.0);
constexpr int kBisections = 16;                    // of the gamut scale: chroma to 2^-16 of itself
constexpr float kGamutStep = 1.0f / 65536;         // the same, 2^-16
constexpr float kGamutTolerance = 4e-6f;           // of linear light: reference/lab.py, GAMUT_TOLERANCE

// memcpy, not a union: the compiler sees through it and keeps the loop vectorized.
FC_INLINE int32_t bits_of(float x) {
  int32_t i;
  memcpy(&i, &x, sizeof i);
  return i;
}
FC_INLINE float float_of(int32_t i) {
  float x;
  memcpy(&x, &i, sizeof x);
  return x;
}

// 2^f for |f| <= 1/2, of a float or a vector of them. Max relative error 7.5e-8 plus rounding; asserted with what it is
// part of (test_lab.py: test_power_bound).
template <typename T>
FC_INLINE T exp2_of_fraction(T f) {
  T e = 0.00132764516f * f + 0.00967554117f;
  e = e * f + 0.0555071334f;
  e = e * f + 0.240221197f;
  e = e * f + 0.693146967f;
  return e * f + 1.00000007f;
}

#ifdef __CUDA_ARCH__
// The special function unit has log2 and exp2 (relative error 2^-22 each), two instructions where polynomials take
// twenty: the kernels stay bound by memory.
// x^p for x in [2^-20, 2^20]. Max relative error 3e-6 for |p log2 x| <= 12.
FC_INLINE float power(float x, float p) { return exp2f(__log2f(x) * p); }

// x^(-1/3), with a Newton step. Max relative error 2e-7.
FC_INLINE float inverse_cbrt(float x) {
  const float z = exp2f(__log2f(x) * (-1.0f / 3.0f));
  return z + z * (1.0f - x * (z * z * z)) * (1.0f / 3.0f);
}
#else
// x^(-1/3) for x in [2^-9, 8]. A linear guess in the exponent (1 - x z^3 within 0.103), then one step of order 4 and
// one of order 3, without a division. Max relative error 4e-7 (test_lab.py: test_cube_root_bound).
FC_INLINE float inverse_cbrt(float x) {
  float z = float_of(0x54a20000 - int32_t(float(bits_of(x)) * (1.0f / 3.0f)));
  float e = 1.0f - x * (z * z * z);
  z += z * e * (1.0f / 3.0f + e * (2.0f / 9.0f + e * (14.0f / 81.0f)));
  e = 1.0f - x * (z * z * z);
  return z + z * e * (1.0f / 3.0f + e * (2.0f / 9.0f));
}

// x^p for x in [2^-20, 2^20]: polynomials of log2 (absolute error 5e-8 plus rounding) and exp2 (7.5e-8).
// Max relative error 2e-6 for |p log2 x| <= 12 (test_lab.py: test_power_bound).
FC_INLINE float power(float x, float p) {
  const int32_t i = bits_of(x);
  const int32_t exponent = (i - 0x3f3504f3) >> 23;  // x = 2^exponent (1 + m), 1 + m in [sqrt(1/2), sqrt(2))
  const float m = float_of(i - exponent * (1 << 23)) - 1.0f;
  float s = -0.145751561f;
  s = s * m + 0.236880146f;
  s = s * m - 0.250062227f;
  s = s * m + 0.286708898f;
  s = s * m - 0.360088057f;
  s = s * m + 0.480939378f;
  s = s * m - 0.721357123f;
  s = s * m + 1.44269477f;
  const float y = (float(exponent) + s * m) * p;
  // rounds to the nearest integer without floorf; right for |y| < 2^21
  const float rounded = (y + 12582912.0f) - 12582912.0f;
  return exp2_of_fraction(y - rounded) * float_of((int32_t(rounded) + 127) << 23);
}
#endif

// f of CIE 15:2004, 8.2.1.1, and its slope.
FC_INLINE float lab_f(float t) {
  const float x = t > kKnee ? t : 1.0f;
  const float z = inverse_cbrt(x);
  return t > kKnee ? x * z * z : t * kSlope + kOffset;
}
FC_INLINE float lab_f_slope(float t) {
  const float z = inverse_cbrt(t > kKnee ? t : 1.0f);
  return t > kKnee ? z * z * (1.0f / 3.0f) : kSlope;
}
FC_INLINE float lab_f_inverse(float f) { return f > kInverseKnee ? f * f * f : (f - kOffset) * (1.0f / kSlope); }
FC_INLINE float lab_f_inverse_slope(float f) { return f > kInverseKnee ? 3.0f * f * f : 1.0f / kSlope; }

// sRGB transfer, both ways, and the slopes. Max absolute error 2e-6 on [0, 1] (test_lab.py: test_transfer_bound).
FC_INLINE float srgb_to_linear(float c) {
  const float x = c > 0.04045f ? c : 1.0f;
  return c > 0.04045f ? power((x + 0.055f) * (1.0f / 1.055f), 2.4f) : c * (1.0f / 12.92f);
}
FC_INLINE float srgb_to_linear_slope(float c) {
  const float x = c > 0.04045f ? c : 1.0f;
  return c > 0.04045f ? (2.4f / 1.055f) * power((x + 0.055f) * (1.0f / 1.055f), 1.4f) : 1.0f / 12.92f;
}
FC_INLINE float linear_to_srgb(float c) {
  const float x = c > 0.0031308f ? c : 1.0f;
  return c > 0.0031308f ? 1.055f * power(x, 1.0f / 2.4f) - 0.055f : c * 12.92f;
}
FC_INLINE float linear_to_srgb_slope(float c) {
  const float x = c > 0.0031308f ? c : 1.0f;
  return c > 0.0031308f ? (1.055f / 2.4f) * power(x, 1.0f / 2.4f - 1.0f) : 12.92f;
}

struct Triple {
  float x, y, z;
};

FC_INLINE Triple rgb_to_xyz(const Triple& c) {
  return {kXr * c.x + kXg * c.y + kXb * c.z, kYr * c.x + kYg * c.y + kYb * c.z, kZr * c.x + kZg * c.y + kZb * c.z};
}
FC_INLINE Triple rgb_to_xyz_transposed(const Triple& c) {
  return {kXr * c.x + kYr * c.y + kZr * c.z, kXg * c.x + kYg * c.y + kZg * c.z, kXb * c.x + kYb * c.y + kZb * c.z};
}
FC_INLINE Triple xyz_to_rgb(const Triple& c) {
  return {kRx * c.x + kRy * c.y + kRz * c.z, kGx * c.x + kGy * c.y + kGz * c.z, kBx * c.x + kBy * c.y + kBz * c.z};
}
FC_INLINE Triple xyz_to_rgb_transposed(const Triple& c) {
  return {kRx * c.x + kGx * c.y + kBx * c.z, kRy * c.x + kGy * c.y + kBy * c.z, kRz * c.x + kGz * c.y + kBz * c.z};
}

FC_INLINE Triple linear_to_lab(float r, float g, float b) {
  const Triple t = rgb_to_xyz({r, g, b});
  const float fx = lab_f(t.x), fy = lab_f(t.y), fz = lab_f(t.z);
  return {116.0f * fy - 16.0f, 500.0f * (fx - fy), 200.0f * (fy - fz)};
}

// Gradient of linear_to_lab with respect to linear light.
FC_INLINE Triple linear_to_lab_backward(float r, float g, float b, float grad_L, float grad_a, float grad_b) {
  const Triple t = rgb_to_xyz({r, g, b});
  return rgb_to_xyz_transposed({500.0f * grad_a * lab_f_slope(t.x),
                                (116.0f * grad_L - 500.0f * grad_a + 200.0f * grad_b) * lab_f_slope(t.y),
                                -200.0f * grad_b * lab_f_slope(t.z)});
}

FC_INLINE Triple lab_to_linear(float L, float a, float b) {
  const float fy = (L + 16.0f) * (1.0f / 116.0f);
  return xyz_to_rgb({lab_f_inverse(fy + a * 0.002f), lab_f_inverse(fy), lab_f_inverse(fy - b * 0.005f)});
}

// Gradient of lab_to_linear with respect to Lab.
FC_INLINE Triple lab_to_linear_backward(float L, float a, float b, float grad_r, float grad_g, float grad_bl) {
  const float fy = (L + 16.0f) * (1.0f / 116.0f);
  const Triple t = xyz_to_rgb_transposed({grad_r, grad_g, grad_bl});
  const float x = t.x * lab_f_inverse_slope(fy + a * 0.002f);
  const float y = t.y * lab_f_inverse_slope(fy);
  const float z = t.z * lab_f_inverse_slope(fy - b * 0.005f);
  return {(x + y + z) * (1.0f / 116.0f), x * 0.002f, z * -0.005f};
}

// Clips to [0, 1]; nan stays nan.
FC_INLINE float clip(float c) { return c < 0.0f ? 0.0f : (c > 1.0f ? 1.0f : c); }

// How far linear light lies outside [0, 1]: the largest of the six distances, negative inside. Of floats, or of vectors
// of them.
template <typename T>
FC_INLINE T gamut_excess(T r, T g, T b) {
  T most = r > g ? r : g;
  most = most > b ? most : b;
  T least = r < g ? r : g;
  least = least < b ? least : b;
  const T above = most - 1.0f, below = -least;
  return above > below ? above : below;
}
FC_INLINE float gamut_excess(const Triple& c) { return gamut_excess(c.x, c.y, c.z); }

// --- the gamut scale: the largest t in [0, 1] such that (L, t a, t b) is inside sRGB ---------------------------------
//
// Every t that is given lies inside, with the outside at most 2^-16 beyond it, as lab_to_linear in float32 tells the
// two apart; 1 for colours inside, 0 where the grey of that L is outside itself. A line of one hue and lightness that
// leaves sRGB and enters it again has several such t. Against float64: test_lab.py, test_gamut_scale_bound.

FC_INLINE bool gamut_fits(float L, float a, float b, float t) {
  return gamut_excess(lab_to_linear(L, t * a, t * b)) <= kGamutTolerance;
}

// From s, by Halley's method, to where the channel that is furthest out at s comes to its bound: on either piece of
// lab_f_inverse a channel is a polynomial in s of degree 3 or 1, of which two derivatives cost little. Where that leads
// out of [low, most], half of the way from s to low.
FC_INLINE float gamut_halley(float L, float a, float b, float s, float low, float most) {
  const float fy = (L + 16.0f) * (1.0f / 116.0f), of_x = a * 0.002f, of_z = b * -0.005f;
  const float fx = fy + s * of_x, fz = fy + s * of_z;
  const Triple c = xyz_to_rgb({lab_f_inverse(fx), lab_f_inverse(fy), lab_f_inverse(fz)});
  const float x1 = lab_f_inverse_slope(fx) * of_x, x2 = fx > kInverseKnee ? 6.0f * fx * of_x * of_x : 0.0f;
  const float z1 = lab_f_inverse_slope(fz) * of_z, z2 = fz > kInverseKnee ? 6.0f * fz * of_z * of_z : 0.0f;
  const float high = c.x > c.y ? c.x : c.y, highest = high > c.z ? high : c.z;
  const float less = c.x < c.y ? c.x : c.y, lowest = less < c.z ? less : c.z;
  const bool above = highest - 1.0f > -lowest;
  const float bound = above ? highest : lowest, sign = above ? 1.0f : -1.0f;
  const bool red = c.x == bound, green = c.y == bound;
  const float by_x = red ? kRx : (green ? kGx : kBx), by_z = red ? kRz : (green ? kGz : kBz);
  const float e = (above ? highest - 1.0f : -lowest) - kGamutTolerance;
  const float e1 = sign * (by_x * x1 + by_z * z1), e2 = sign * (by_x * x2 + by_z * z2);
  const float t = s - 2.0f * e * e1 / (2.0f * e1 * e1 - e * e2);
  return t > low && t < most ? t : 0.5f * (low + s);
}

// Three bisections, so that of several borders the one is found that bisection finds, then three steps from the
// outside, and as much inwards as puts the border in the middle of [t, t + 2^-16]. `gamut_border` tells where that did
// not do.
FC_INLINE float gamut_guess(float L, float a, float b) {
  float low = 0.0f, most = 1.0f;
  FC_UNROLL
  for (int i = 0; i < 3; ++i) {
    const float t = 0.5f * (low + most);
    const bool fits = gamut_fits(L, a, b, t);
    low = fits ? t : low;
    most = fits ? most : t;
  }
  float t = most;
  FC_UNROLL
  for (int i = 0; i < 3; ++i) t = gamut_halley(L, a, b, t, low, most);
  const float y = lab_f_inverse((L + 16.0f) * (1.0f / 116.0f));
  const bool grey_fits = gamut_excess(xyz_to_rgb({y, y, y})) <= kGamutTolerance;
  t -= 0.5f * kGamutStep;
  return grey_fits && t > 0.0f ? t : 0.0f;
}

// Whether the border is between t and t + 2^-16, or t is 0 and nothing fits.
FC_INLINE bool gamut_border(float L, float a, float b, float t) {
  return (t == 0.0f || gamut_fits(L, a, b, t)) && !gamut_fits(L, a, b, t + kGamutStep);
}

// By bisection from the inside, which needs no guess.
FC_INLINE float gamut_bisect(float L, float a, float b) {
  float low = 0.0f, high = 1.0f;
  FC_UNROLL  // a loop inside would keep the loop over pixels from vectorizing
  for (int i = 0; i < kBisections; ++i) {
    const float t = 0.5f * (low + high);
    const bool fits = gamut_fits(L, a, b, t);
    low = fits ? t : low;
    high = fits ? high : t;
  }
  return low;
}

// For single pixels; with branches.
FC_INLINE float gamut_scale(float L, float a, float b) {
  if (gamut_fits(L, a, b, 1.0f)) return 1.0f;
  const float t = gamut_guess(L, a, b);
  return gamut_border(L, a, b, t) ? t : gamut_bisect(L, a, b);
}

// Lab to sRGB in [0, 1], for single pixels. Most are inside, and go without the search for their place there.
template <bool kPreserveLightness>
FC_INLINE Triple lab_to_srgb(float L, float a, float b) {
  Triple c = lab_to_linear(L, a, b);
  if (kPreserveLightness && !(gamut_excess(c) <= kGamutTolerance)) {
    const float t = gamut_scale(L, a, b);
    c = lab_to_linear(L, t * a, t * b);
  }
  return {linear_to_srgb(clip(c.x)), linear_to_srgb(clip(c.y)), linear_to_srgb(clip(c.z))};
}

// Gradient of (L, a, b) -> (L, t a, t b), t = gamut_scale, given the gradient of the right-hand side at the scaled
// colour. t follows from the one bound that it touches: excess(L, t a, t b) = 0, so dt = -d(excess) / (d excess / dt).
FC_INLINE Triple gamut_scale_backward(float L, float a, float b, float t, const Triple& grad) {
  const Triple c = lab_to_linear(L, t * a, t * b);
  const float most = c.x > c.y ? (c.x > c.z ? c.x : c.z) : (c.y > c.z ? c.y : c.z);
  const float least = c.x < c.y ? (c.x < c.z ? c.x : c.z) : (c.y < c.z ? c.y : c.z);
  const bool above = most - 1.0f > -least;
  const float bound = above ? most : least, sign = above ? 1.0f : -1.0f;
  const bool first = c.x == bound, second = !first && c.y == bound;
  const Triple d = lab_to_linear_backward(L, t * a, t * b, first ? sign : 0.0f, second ? sign : 0.0f,
                                          first || second ? 0.0f : sign);
  const float slope = d.y * a + d.z * b;  // d excess / dt
  const bool moves = t < 1.0f && t > 0.0f && slope > 1e-12f;
  const float along = moves ? (grad.y * a + grad.z * b) / slope : 0.0f;  // grad . (a, b) times dt per d excess
  return {grad.x - along * d.x, t * (grad.y - along * d.y), t * (grad.z - along * d.z)};
}

// Rounds a channel in [0, 1] to an integer level; nan becomes 0.
FC_INLINE int32_t to_level(float c, float levels) {
  const float x = c > 0.0f ? c : 0.0f;
  return int32_t((x < 1.0f ? x : 1.0f) * levels + 0.5f);
}

}  // namespace fastcolor
