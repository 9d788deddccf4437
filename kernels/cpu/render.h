// Rendering on the CPU: chroma is brought to full size along the edges of the lightness, and with it to RGB, or to the
// chroma planes of a video frame, in one pass.
#pragma once
#include <cstdint>

#include "common/render_types.h"
#include "common/storage.h"

namespace fastcolor::cpu {

struct RenderProblem {
  const float* ab;     // [B, 2, h, w]
  const float* guide;  // [B, h, w]
  int64_t batch, low_height, low_width;
  int64_t height, width;  // of the result
  Places rows, columns;   // [height], [width]
  float sharpness;        // log2(e) / 2 sigma_light²
  float floor;            // added to each weight
  int threads;
};

// L: [B, height, width], floating. rgb: [B, 3, height, width], or [B, height, width, 3] interleaved.
void render(const RenderProblem& problem, const void* L, Sample light, const Channels& rgb, bool preserve_lightness);

// luma: [B, luma_height, luma_width] uint8 for 8 bits, else uint16; rows and images lie `row` and `image` samples
// apart. u, v: [B, height, width] of the same type. See reference/render.py: render_uv.
void render_uv(const RenderProblem& problem, const YuvLayout& yuv, const void* luma, int64_t luma_height,
               int64_t luma_width, int64_t row, int64_t image, void* u, void* v);

// out[i] = table[samples[i]]; samples are uint16 where `wide`, else uint8.
void look_up(const void* samples, bool wide, const float* table, float* out, int64_t n, int threads);

// 2^x by itself, for the test of its bound.
void render_exp2(const float* x, float* out, int64_t n);

}  // namespace fastcolor::cpu
