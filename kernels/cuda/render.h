// Rendering on the GPU: chroma is brought to full size along the edges of the lightness, and with it to RGB, or to the
// chroma planes of a video frame, in one pass, asynchronous on a stream.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/render_types.h"
#include "common/storage.h"

namespace fastcolor::cuda {

struct RenderProblem {
  const void* ab;     // [B, 2, h, w]
  const void* guide;  // [B, h, w]
  Storage storage;    // of both
  int64_t batch, low_height, low_width;
  int64_t height, width;  // of the result
  Places rows, columns;   // [height], [width]
  float sharpness;        // log2(e) / 2 sigma_light²
  float floor;            // added to each weight
};

// L: [B, height, width], floating. rgb: [B, 3, height, width], or [B, height, width, 3] interleaved.
cudaError_t render(const RenderProblem& problem, const void* L, Sample light, const Channels& rgb,
                   bool preserve_lightness, cudaStream_t stream);

// luma: [B, luma_height, luma_width] uint8 for 8 bits, else uint16; rows and images lie `row` and `image` samples
// apart. u, v: [B, height, width] of the same type. See reference/render.py: render_uv.
cudaError_t render_uv(const RenderProblem& problem, const YuvLayout& yuv, const void* luma, int64_t luma_height,
                      int64_t luma_width, int64_t row, int64_t image, void* u, void* v, cudaStream_t stream);

// out[i] = table[samples[i]]; samples are uint16 where `wide`, else uint8.
cudaError_t look_up(const void* samples, bool wide, const float* table, float* out, int64_t n, cudaStream_t stream);

}  // namespace fastcolor::cuda
