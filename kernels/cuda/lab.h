// RGB <-> CIE L*a*b* on the GPU: one pass over memory, asynchronous on a stream.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/storage.h"

namespace fastcolor::cuda {

// Three channels in memory: planar [images, 3, pixels], or interleaved [images, pixels, 3]. Lab is always float32.
cudaError_t rgb_to_lab(const void* rgb, Sample sample, bool rgb_interleaved, float* lab, bool lab_interleaved,
                       int64_t images, int64_t pixels, cudaStream_t stream);

cudaError_t rgb_to_lab_backward(const float* grad_lab, bool grad_lab_interleaved, const float* rgb,
                                bool rgb_interleaved, float* grad_rgb, bool grad_rgb_interleaved, int64_t images,
                                int64_t pixels, cudaStream_t stream);

// preserve_lightness: colours outside sRGB are brought in by scaling (a, b); otherwise channels are clipped.
cudaError_t lab_to_rgb(const float* lab, bool lab_interleaved, void* rgb, Sample sample, bool rgb_interleaved,
                       bool preserve_lightness, int64_t images, int64_t pixels, cudaStream_t stream);

cudaError_t lab_to_rgb_backward(const float* grad_rgb, bool grad_rgb_interleaved, const float* lab,
                                bool lab_interleaved, float* grad_lab, bool grad_lab_interleaved,
                                bool preserve_lightness, int64_t images, int64_t pixels, cudaStream_t stream);

}  // namespace fastcolor::cuda
