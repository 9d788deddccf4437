// RGB <-> CIE L*a*b* on the CPU: one pass, SIMD, threads over runs of pixels.
#pragma once
#include <cstdint>

#include "common/storage.h"

namespace fastcolor::cpu {

// rgb: any sample. lab and gradients: floating. Each in either order, and of a type of its own.
void rgb_to_lab(const Channels& rgb, const Channels& lab, int64_t images, int64_t pixels, int threads);

void rgb_to_lab_backward(const Channels& grad_lab, const Channels& rgb, const Channels& grad_rgb, int64_t images,
                         int64_t pixels, int threads);

// preserve_lightness: colours outside sRGB are brought in by scaling (a, b); otherwise channels are clipped.
void lab_to_rgb(const Channels& lab, const Channels& rgb, bool preserve_lightness, int64_t images, int64_t pixels,
                int threads);

void lab_to_rgb_backward(const Channels& grad_rgb, const Channels& lab, const Channels& grad_lab,
                         bool preserve_lightness, int64_t images, int64_t pixels, int threads);

// The approximations by themselves, for tests of their error bounds: out[i] = x[i]^(-1/3), or x[i]^p.
void inverse_cbrt(const float* x, float* out, int64_t n);
void power(const float* x, float p, float* out, int64_t n);

// How much of (a, b) keeps each colour of lab, planar [3, n], inside sRGB: t [n].
void gamut_scales(const float* lab, float* t, int64_t n);

}  // namespace fastcolor::cpu
