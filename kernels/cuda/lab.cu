#include "cuda/lab.h"

#include "common/lab_math.h"
#include "cuda/pixels.h"

namespace fastcolor::cuda {
namespace {

// Floating samples are numbers as they are.
struct AsTheyAre {
  static constexpr bool kIntegers = false;
  template <typename T>
  __device__ float operator()(T x) const {
    return to_float(x);
  }
};

// sRGB samples to linear light.
struct ToLinear {
  static constexpr bool kIntegers = true;
  const float* table;  // [256] of a byte, in shared memory: half the special-function work of the kernel saved
  __device__ float operator()(uint8_t x) const { return table[x]; }
  __device__ float operator()(uint16_t x) const { return srgb_to_linear(float(x) * (1.0f / 65535.0f)); }
  template <typename T>
  __device__ float operator()(T x) const {
    return srgb_to_linear(to_float(x));
  }
};

// --- a pixel: from what is loaded to what is stored ------------------------------------------------------------------

struct RgbToLab {
  static constexpr bool kIntegers = false;  // as a result
  using Decode = ToLinear;
  __device__ Triple operator()(const Triple& c) const { return linear_to_lab(c.x, c.y, c.z); }
};

struct RgbToLabBackward {
  static constexpr bool kIntegers = false;
  using Decode = AsTheyAre;
  __device__ Triple operator()(const Triple& grad, const Triple& c) const {
    const Triple d = linear_to_lab_backward(srgb_to_linear(c.x), srgb_to_linear(c.y), srgb_to_linear(c.z), grad.x,
                                            grad.y, grad.z);
    return {d.x * srgb_to_linear_slope(c.x), d.y * srgb_to_linear_slope(c.y), d.z * srgb_to_linear_slope(c.z)};
  }
};

template <bool kPreserveLightness>
struct LabToRgb {
  static constexpr bool kIntegers = true;
  using Decode = AsTheyAre;
  __device__ Triple operator()(const Triple& lab) const { return lab_to_srgb<kPreserveLightness>(lab.x, lab.y, lab.z); }
};

template <bool kPreserveLightness>
struct LabToRgbBackward {
  static constexpr bool kIntegers = false;
  using Decode = AsTheyAre;

  // A clipped channel passes no gradient; at the very bounds it does, as torch.clamp has it.
  static __device__ float encode_gradient(float c, float grad) {
    return c >= 0.0f && c <= 1.0f ? grad * linear_to_srgb_slope(c) : 0.0f;
  }

  __device__ Triple operator()(const Triple& grad, const Triple& lab) const {
    const float t = kPreserveLightness ? gamut_scale(lab.x, lab.y, lab.z) : 1.0f;
    const Triple c = lab_to_linear(lab.x, t * lab.y, t * lab.z);
    const Triple d = lab_to_linear_backward(lab.x, t * lab.y, t * lab.z, encode_gradient(c.x, grad.x),
                                            encode_gradient(c.y, grad.y), encode_gradient(c.z, grad.z));
    return kPreserveLightness ? gamut_scale_backward(lab.x, lab.y, lab.z, t, d) : d;
  }
};

// --- out = function(in...), pixel by pixel ---------------------------------------------------------------------------

template <typename Function, int N, typename... In>
__device__ void map(const Function& function, const typename Function::Decode& decode, Exchange& exchange,
                    int64_t image, int64_t pixels, int64_t first, const Channels& out, const In&... in) {
  struct Loaded {
    Planes<N> c;
  };
  const auto load_from = [&](const Channels& channels) {
    Loaded x;
    load(channels, image, pixels, first, exchange, decode, x.c);
    return x;
  };
  const auto apply = [&](const auto&... x) {
    Planes<N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Triple p = function(Triple{x.c[0][i], x.c[1][i], x.c[2][i]}...);
      result[0][i] = p.x, result[1][i] = p.y, result[2][i] = p.z;
    }
    store<Function::kIntegers>(out, image, pixels, first, exchange, result);
  };
  apply(load_from(in)...);
}

// `vectors`: all of memory is aligned to packs of N.
template <typename Function, int N, typename... In>
__global__ void __launch_bounds__(kThreads, N == 8 ? 2 : 3)  // else nvcc spills to fit in one block more
    map_pixels(int64_t images, int64_t pixels, bool vectors, Channels out, In... in) {
  __shared__ Exchange exchanges[kWarps];
  __shared__ float table[kThreads];
  typename Function::Decode decode{};
  if constexpr (Function::Decode::kIntegers) {
    static_assert(kThreads == 256);
    table[threadIdx.x] = srgb_to_linear(float(threadIdx.x) * (1.0f / 255.0f));
    decode.table = table;
    __syncthreads();
  }
  const Function function{};
  Exchange& exchange = exchanges[threadIdx.x / 32];
  for_each_tile<N>(images, pixels, [&](int64_t image, int64_t start) {
    const int64_t end = start + 32 * N;
    if (vectors && end <= pixels) {
      map<Function, N>(function, decode, exchange, image, pixels, start, out, in...);
    } else {
      for (int64_t i = start + threadIdx.x % 32; i < end && i < pixels; i += 32)
        map<Function, 1>(function, decode, exchange, image, pixels, i, out, in...);
    }
  });
}

template <typename Function, int N, typename... In>
cudaError_t launch_in_packs(int64_t images, int64_t pixels, cudaStream_t stream, const Channels& out, const In&... in) {
  const auto fits = [](const Channels& c) { return aligned(c.base, N * bytes_of(c.sample)); };
  const bool one_run = out.interleaved && (in.interleaved && ...);
  if (one_run) pixels *= images, images = 1;
  const bool vectors = (one_run || pixels % N == 0) && fits(out) && (fits(in) && ...);
  return launch<N>(map_pixels<Function, N, In...>, images, pixels, stream, images, pixels, vectors, out, in...);
}

// The widest type takes 16 bytes of an access.
template <typename Function, typename... In>
cudaError_t launch_map(int64_t images, int64_t pixels, cudaStream_t stream, const Channels& out, const In&... in) {
  const auto is_wide = [](const Channels& c) { return bytes_of(c.sample) == 4; };
  return is_wide(out) || (is_wide(in) || ...) ? launch_in_packs<Function, 4>(images, pixels, stream, out, in...)
                                              : launch_in_packs<Function, 8>(images, pixels, stream, out, in...);
}

}  // namespace

cudaError_t rgb_to_lab(const Channels& rgb, const Channels& lab, int64_t images, int64_t pixels, cudaStream_t stream) {
  return launch_map<RgbToLab>(images, pixels, stream, lab, rgb);
}

cudaError_t rgb_to_lab_backward(const Channels& grad_lab, const Channels& rgb, const Channels& grad_rgb, int64_t images,
                                int64_t pixels, cudaStream_t stream) {
  return launch_map<RgbToLabBackward>(images, pixels, stream, grad_rgb, grad_lab, rgb);
}

cudaError_t lab_to_rgb(const Channels& lab, const Channels& rgb, bool preserve_lightness, int64_t images,
                       int64_t pixels, cudaStream_t stream) {
  return preserve_lightness ? launch_map<LabToRgb<true>>(images, pixels, stream, rgb, lab)
                            : launch_map<LabToRgb<false>>(images, pixels, stream, rgb, lab);
}

cudaError_t lab_to_rgb_backward(const Channels& grad_rgb, const Channels& lab, const Channels& grad_lab,
                                bool preserve_lightness, int64_t images, int64_t pixels, cudaStream_t stream) {
  return preserve_lightness ? launch_map<LabToRgbBackward<true>>(images, pixels, stream, grad_lab, grad_rgb, lab)
                            : launch_map<LabToRgbBackward<false>>(images, pixels, stream, grad_lab, grad_rgb, lab);
}

}  // namespace fastcolor::cuda
