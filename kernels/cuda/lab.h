// RGB <-> CIE L*a*b* on the GPU: one pass over memory, asynchronous on a stream.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/storage.h"

namespace fastcolor::cuda {

// rgb: any sample. lab and gradients: floating. Each in either order, and of a type of its own.
cudaError_t rgb_to_lab(const Channels& rgb, const Channels& lab, int64_t images, int64_t pixels, cudaStream_t stream);

cudaError_t rgb_to_lab_backward(const Channels& grad_lab, const Channels& rgb, const Channels& grad_rgb, int64_t images,
                                int64_t pixels, cudaStream_t stream);

// preserve_lightness: colours outside sRGB are brought in by scaling (a, b); otherwise channels are clipped.
cudaError_t lab_to_rgb(const Channels& lab, const Channels& rgb, bool preserve_lightness, int64_t images,
                       int64_t pixels, cudaStream_t stream);

cudaError_t lab_to_rgb_backward(const Channels& grad_rgb, const Channels& lab, const Channels& grad_lab,
                                bool preserve_lightness, int64_t images, int64_t pixels, cudaStream_t stream);

}  // namespace fastcolor::cuda
