// RGB <-> CIE L*a*b* on the CPU: one pass, SIMD, threads over runs of pixels.
#pragma once
#include <cstdint>

#include "common/storage.h"

namespace fastcolor::cpu {

// Three channels in memory: planar [images, 3, pixels], or interleaved [images, pixels, 3]. Lab is always float32.
void rgb_to_lab(const void* rgb, Sample sample, bool rgb_interleaved,  // [images, 3, pixels] or [images, pixels, 3]
                float* lab, bool lab_interleaved,                      // the same
                int64_t images, int64_t pixels, int threads);

void rgb_to_lab_backward(const float* grad_lab, bool grad_lab_interleaved, const float* rgb, bool rgb_interleaved,
                         float* grad_rgb, bool grad_rgb_interleaved, int64_t images, int64_t pixels, int threads);

// preserve_lightness: colours outside sRGB are brought in by scaling (a, b); otherwise channels are clipped.
void lab_to_rgb(const float* lab, bool lab_interleaved, void* rgb, Sample sample, bool rgb_interleaved,
                bool preserve_lightness, int64_t images, int64_t pixels, int threads);

void lab_to_rgb_backward(const float* grad_rgb, bool grad_rgb_interleaved, const float* lab, bool lab_interleaved,
                         float* grad_lab, bool grad_lab_interleaved, bool preserve_lightness, int64_t images,
                         int64_t pixels, int threads);

// The approximations by themselves, for tests of their error bounds: out[i] = x[i]^(-1/3), or x[i]^p.
void inverse_cbrt(const float* x, float* out, int64_t n);
void power(const float* x, float p, float* out, int64_t n);

// How much of (a, b) keeps each colour of lab, planar [3, n], inside sRGB: t [n].
void gamut_scales(const float* lab, float* t, int64_t n);

}  // namespace fastcolor::cpu
