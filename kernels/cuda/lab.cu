#include <algorithm>

#include "common/lab_math.h"
#include "cuda/lab.h"
#include "cuda/quads.h"

namespace fastcolor::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMostBlocks = 4096;  // about four waves on the largest GPUs; blocks loop over what is left

template <typename T>
struct Quads {
  Quad<T> c[3];
  __device__ Pixel<T> pixel(int i) const { return {c[0].v[i], c[1].v[i], c[2].v[i]}; }
};

// out = function(in...), pixel by pixel. `vectors`: all of memory is aligned to quads.
template <typename Function, typename Out, typename... In>
__global__ void __launch_bounds__(kThreads)
    map_pixels(int64_t images, int64_t pixels, bool vectors, View<Out> out, View<const In>... in) {
  __shared__ Exchange exchanges[kWarps];
  __shared__ float table[Function::kTable];
  const Function function(table);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Exchange& exchange = exchanges[warp];
  const int64_t tiles = (pixels + kTile - 1) / kTile;
  for (int64_t image = blockIdx.y; image < images; image += gridDim.y) {
    for (int64_t tile = blockIdx.x * int64_t(kWarps) + warp; tile < tiles; tile += gridDim.x * int64_t(kWarps)) {
      const int64_t start = tile * kTile, end = start + kTile;
      if (vectors && end <= pixels) {
        const auto load = [&](const auto& view, auto quads) {
          load_quads(view, image, pixels, start, exchange, quads.c);
          return quads;
        };
        const auto apply = [&](const auto&... quads) {
          Quads<Out> result;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Pixel<Out> p = function(quads.pixel(i)...);
            result.c[0].v[i] = p.x, result.c[1].v[i] = p.y, result.c[2].v[i] = p.z;
          }
          store_quads(out, image, pixels, start, exchange, result.c);
        };
        apply(load(in, Quads<In>())...);
      } else {
        for (int64_t i = start + lane; i < end && i < pixels; i += 32)
          store_pixel(out, image, pixels, i, function(load_pixel(in, image, pixels, i)...));
      }
    }
  }
}

// --- a pixel ---------------------------------------------------------------------------------------------------------

__device__ Pixel<float> as_pixel(const Triple& t) { return {t.x, t.y, t.z}; }

template <typename T>
struct RgbToLab {
  static constexpr int kTable = sizeof(T) == 1 ? 256 : 1;
  const float* table;  // [256] linear light of a byte: half the special-function work of the kernel saved

  __device__ explicit RgbToLab(float* shared) : table(shared) {
    if constexpr (kTable > 1) {
      static_assert(kTable == kThreads);
      shared[threadIdx.x] = srgb_to_linear(float(threadIdx.x) * (1.0f / 255.0f));
      __syncthreads();
    }
  }
  __device__ float linear(uint8_t v) const { return table[v]; }
  __device__ float linear(uint16_t v) const { return srgb_to_linear(float(v) * (1.0f / 65535.0f)); }
  __device__ float linear(float v) const { return srgb_to_linear(v); }

  __device__ Pixel<float> operator()(const Pixel<T>& c) const {
    return as_pixel(linear_to_lab(linear(c.x), linear(c.y), linear(c.z)));
  }
};

struct RgbToLabBackward {
  static constexpr int kTable = 1;
  __device__ explicit RgbToLabBackward(float*) {}
  __device__ Pixel<float> operator()(const Pixel<float>& grad, const Pixel<float>& c) const {
    const Triple d = linear_to_lab_backward(srgb_to_linear(c.x), srgb_to_linear(c.y), srgb_to_linear(c.z), grad.x,
                                            grad.y, grad.z);
    return {d.x * srgb_to_linear_slope(c.x), d.y * srgb_to_linear_slope(c.y), d.z * srgb_to_linear_slope(c.z)};
  }
};

template <typename T, bool kPreserveLightness>
struct LabToRgb {
  static constexpr int kTable = 1;
  __device__ explicit LabToRgb(float*) {}

  static __device__ void encode(float linear, uint8_t& out) { out = to_level(linear_to_srgb(clip(linear)), 255.0f); }
  static __device__ void encode(float linear, uint16_t& out) { out = to_level(linear_to_srgb(clip(linear)), 65535.0f); }
  static __device__ void encode(float linear, float& out) { out = linear_to_srgb(clip(linear)); }

  __device__ Pixel<T> operator()(const Pixel<float>& lab) const {
    const float t = kPreserveLightness ? gamut_scale(lab.x, lab.y, lab.z) : 1.0f;
    const Triple c = lab_to_linear(lab.x, t * lab.y, t * lab.z);
    Pixel<T> rgb;
    encode(c.x, rgb.x), encode(c.y, rgb.y), encode(c.z, rgb.z);
    return rgb;
  }
};

template <bool kPreserveLightness>
struct LabToRgbBackward {
  static constexpr int kTable = 1;
  __device__ explicit LabToRgbBackward(float*) {}

  // A clipped channel passes no gradient; at the very bounds it does, as torch.clamp has it.
  static __device__ float encode_gradient(float c, float grad) {
    return c >= 0.0f && c <= 1.0f ? grad * linear_to_srgb_slope(c) : 0.0f;
  }

  __device__ Pixel<float> operator()(const Pixel<float>& grad, const Pixel<float>& lab) const {
    const float t = kPreserveLightness ? gamut_scale(lab.x, lab.y, lab.z) : 1.0f;
    const Triple c = lab_to_linear(lab.x, t * lab.y, t * lab.z);
    const Triple d = lab_to_linear_backward(lab.x, t * lab.y, t * lab.z, encode_gradient(c.x, grad.x),
                                            encode_gradient(c.y, grad.y), encode_gradient(c.z, grad.z));
    return as_pixel(kPreserveLightness ? gamut_scale_backward(lab.x, lab.y, lab.z, t, d) : d);
  }
};

// --- launches --------------------------------------------------------------------------------------------------------

template <typename T>
bool aligned(const View<T>& view) {
  return reinterpret_cast<uintptr_t>(view.base) % (4 * sizeof(T)) == 0;
}

template <typename Function, typename Out, typename... In>
cudaError_t launch(int64_t images, int64_t pixels, cudaStream_t stream, View<Out> out, View<const In>... in) {
  if (images == 0 || pixels == 0) return cudaSuccess;
  const bool one_run = out.interleaved && (in.interleaved && ...);
  if (one_run) pixels *= images, images = 1;
  const bool vectors = (one_run || pixels % 4 == 0) && aligned(out) && (aligned(in) && ...);
  const int64_t across = std::min((pixels + kTile * kWarps - 1) / (kTile * kWarps), kMostBlocks);
  const int64_t down = std::min(images, std::max<int64_t>(1, kMostBlocks / across));
  const dim3 blocks(static_cast<unsigned>(across), static_cast<unsigned>(down));
  map_pixels<Function><<<blocks, kThreads, 0, stream>>>(images, pixels, vectors, out, in...);
  return cudaGetLastError();
}

template <typename T>
cudaError_t rgb_to_lab_of(const void* rgb, bool rgb_interleaved, const View<float>& lab, int64_t images, int64_t pixels,
                          cudaStream_t stream) {
  const View<const T> in{static_cast<const T*>(rgb), rgb_interleaved};
  return launch<RgbToLab<T>>(images, pixels, stream, lab, in);
}

template <typename T>
cudaError_t lab_to_rgb_of(const View<const float>& lab, void* rgb, bool rgb_interleaved, bool preserve_lightness,
                          int64_t images, int64_t pixels, cudaStream_t stream) {
  const View<T> out{static_cast<T*>(rgb), rgb_interleaved};
  return preserve_lightness ? launch<LabToRgb<T, true>>(images, pixels, stream, out, lab)
                            : launch<LabToRgb<T, false>>(images, pixels, stream, out, lab);
}

}  // namespace

cudaError_t rgb_to_lab(const void* rgb, Sample sample, bool rgb_interleaved, float* lab, bool lab_interleaved,
                       int64_t images, int64_t pixels, cudaStream_t stream) {
  const View<float> out{lab, lab_interleaved};
  switch (sample) {
    case Sample::kUint8:
      return rgb_to_lab_of<uint8_t>(rgb, rgb_interleaved, out, images, pixels, stream);
    case Sample::kUint16:
      return rgb_to_lab_of<uint16_t>(rgb, rgb_interleaved, out, images, pixels, stream);
    case Sample::kFloat32:
      return rgb_to_lab_of<float>(rgb, rgb_interleaved, out, images, pixels, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t rgb_to_lab_backward(const float* grad_lab, bool grad_lab_interleaved, const float* rgb,
                                bool rgb_interleaved, float* grad_rgb, bool grad_rgb_interleaved, int64_t images,
                                int64_t pixels, cudaStream_t stream) {
  return launch<RgbToLabBackward>(images, pixels, stream, View<float>{grad_rgb, grad_rgb_interleaved},
                                  View<const float>{grad_lab, grad_lab_interleaved},
                                  View<const float>{rgb, rgb_interleaved});
}

cudaError_t lab_to_rgb(const float* lab, bool lab_interleaved, void* rgb, Sample sample, bool rgb_interleaved,
                       bool preserve_lightness, int64_t images, int64_t pixels, cudaStream_t stream) {
  const View<const float> in{lab, lab_interleaved};
  switch (sample) {
    case Sample::kUint8:
      return lab_to_rgb_of<uint8_t>(in, rgb, rgb_interleaved, preserve_lightness, images, pixels, stream);
    case Sample::kUint16:
      return lab_to_rgb_of<uint16_t>(in, rgb, rgb_interleaved, preserve_lightness, images, pixels, stream);
    case Sample::kFloat32:
      return lab_to_rgb_of<float>(in, rgb, rgb_interleaved, preserve_lightness, images, pixels, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t lab_to_rgb_backward(const float* grad_rgb, bool grad_rgb_interleaved, const float* lab,
                                bool lab_interleaved, float* grad_lab, bool grad_lab_interleaved,
                                bool preserve_lightness, int64_t images, int64_t pixels, cudaStream_t stream) {
  const View<float> out{grad_lab, grad_lab_interleaved};
  const View<const float> grad{grad_rgb, grad_rgb_interleaved}, in{lab, lab_interleaved};
  return preserve_lightness ? launch<LabToRgbBackward<true>>(images, pixels, stream, out, grad, in)
                            : launch<LabToRgbBackward<false>>(images, pixels, stream, out, grad, in);
}

}  // namespace fastcolor::cuda
