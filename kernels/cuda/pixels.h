// Pixels of any type to registers and back. A warp takes a tile, a lane N neighbouring pixels of it, whose samples are
// one access: 16 bytes for the widest type at hand.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/lab_math.h"
#include "common/storage.h"

namespace fastcolor::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMostBlocks = 4096;  // about four waves on the largest GPUs; blocks loop over what is left

// N samples in one access: 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// nvcc splits the copy of a struct into its members; only its own vector types stay one access.
template <int N, typename T>
__device__ Pack<T, N> get(const T* from) {
  const auto word = *reinterpret_cast<const typename Word<N * sizeof(T)>::type*>(from);
  Pack<T, N> pack;
  memcpy(&pack, &word, sizeof pack);
  return pack;
}

template <typename T, int N>
__device__ void put(T* to, const Pack<T, N>& pack) {
  typename Word<N * sizeof(T)>::type word;
  memcpy(&word, &pack, sizeof word);
  *reinterpret_cast<decltype(word)*>(to) = word;
}

// To device memory by an intrinsic, since nvcc 13.0 splits the plain assignment into four stores. Evict-first: large
// results leave the cache before they are read again, and small ones stay in it all the same.
template <typename T, int N>
__device__ void put_global(T* to, const Pack<T, N>& pack) {
  typename Word<N * sizeof(T)>::type word;
  memcpy(&word, &pack, sizeof word);
  __stcs(reinterpret_cast<decltype(word)*>(to), word);
}

// --- samples and numbers ---------------------------------------------------------------------------------------------

// As they are: integers are not divided by their largest value.
__device__ inline float to_float(uint8_t x) { return float(x); }
__device__ inline float to_float(uint16_t x) { return float(x); }
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Integers stand for [0, 1].
__device__ inline void encode(float c, uint8_t& out) { out = to_level(c, 255.0f); }
__device__ inline void encode(float c, uint16_t& out) { out = to_level(c, 65535.0f); }
__device__ inline void encode(float c, float& out) { out = c; }
__device__ inline void encode(float c, __half& out) { out = __float2half_rn(c); }
__device__ inline void encode(float c, __nv_bfloat16& out) { out = __float2bfloat16_rn(c); }

inline int bytes_of(Sample sample) { return sample == Sample::kUint8 ? 1 : sample == Sample::kFloat32 ? 4 : 2; }

inline bool aligned(const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

// --- three channels --------------------------------------------------------------------------------------------------

// Where a warp turns interleaved memory around: three accesses of 16 bytes for each lane.
struct alignas(16) Exchange {
  char bytes[32 * 3 * 16];
};

// N pixels in registers.
template <int N>
using Planes = float[3][N];

// N = 1: any pixel. Else `first` is the pixel of lane 0, all lanes of the warp take part, and memory is aligned to
// packs.
template <typename T, int N, typename Decode>
__device__ void read(const Channels& in, int64_t image, int64_t pixels, int64_t first, Exchange& exchange,
                     const Decode& decode, Planes<N>& out) {
  const T* base = static_cast<const T*>(in.base) + image * 3 * pixels;
  if constexpr (N == 1) {
    const T* at = base + (in.interleaved ? 3 * first : first);
    const int64_t plane = in.interleaved ? 1 : pixels;
#pragma unroll
    for (int c = 0; c < 3; ++c) out[c][0] = decode(at[c * plane]);
  } else {
    const int lane = threadIdx.x % 32;
    Pack<T, N> packs[3];
    if (!in.interleaved) {
#pragma unroll
      for (int c = 0; c < 3; ++c) packs[c] = get<N>(base + c * pixels + first + N * lane);
#pragma unroll
      for (int i = 0; i < 3 * N; ++i) out[i / N][i % N] = decode(packs[i / N].v[i % N]);
      return;
    }
    // A lane's samples are contiguous, but lanes would access memory three packs apart, touching each sector several
    // times. So the warp accesses it in order, and hands samples on through shared memory (without bank conflicts).
    const T* from = base + first * 3;
    T* staged = reinterpret_cast<T*>(exchange.bytes);
#pragma unroll
    for (int k = 0; k < 3; ++k) packs[k] = get<N>(from + N * (32 * k + lane));
#pragma unroll
    for (int k = 0; k < 3; ++k) put(staged + N * (32 * k + lane), packs[k]);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 3; ++k) packs[k] = get<N>(staged + N * (3 * lane + k));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 3 * N; ++i) out[i % 3][i / 3] = decode(packs[i / N].v[i % N]);
  }
}

template <typename T, int N>
__device__ void write(const Channels& to, int64_t image, int64_t pixels, int64_t first, Exchange& exchange,
                      const Planes<N>& in) {
  T* base = static_cast<T*>(to.base) + image * 3 * pixels;
  if constexpr (N == 1) {
    T* at = base + (to.interleaved ? 3 * first : first);
    const int64_t plane = to.interleaved ? 1 : pixels;
#pragma unroll
    for (int c = 0; c < 3; ++c) encode(in[c][0], at[c * plane]);
  } else {
    const int lane = threadIdx.x % 32;
    Pack<T, N> packs[3];
    if (!to.interleaved) {
#pragma unroll
      for (int i = 0; i < 3 * N; ++i) encode(in[i / N][i % N], packs[i / N].v[i % N]);
#pragma unroll
      for (int c = 0; c < 3; ++c) put_global(base + c * pixels + first + N * lane, packs[c]);
      return;
    }
    T* staged = reinterpret_cast<T*>(exchange.bytes);
#pragma unroll
    for (int i = 0; i < 3 * N; ++i) encode(in[i % 3][i / 3], packs[i / N].v[i % N]);
#pragma unroll
    for (int k = 0; k < 3; ++k) put(staged + N * (3 * lane + k), packs[k]);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int at = N * (32 * k + lane);
      put_global(base + first * 3 + at, get<N>(staged + at));
    }
    __syncwarp();
  }
}

// Of any type: which one is a branch that all threads take alike, cheaper than a kernel for each. A pack of eight is
// for types of 16 bits at most.
template <int N, typename Decode>
__device__ void load(const Channels& in, int64_t image, int64_t pixels, int64_t first, Exchange& exchange,
                     const Decode& decode, Planes<N>& out) {
  switch (in.sample) {
    case Sample::kUint8:
      if constexpr (Decode::kIntegers) read<uint8_t>(in, image, pixels, first, exchange, decode, out);
      return;
    case Sample::kUint16:
      if constexpr (Decode::kIntegers) read<uint16_t>(in, image, pixels, first, exchange, decode, out);
      return;
    case Sample::kFloat32:
      if constexpr (N <= 4) read<float>(in, image, pixels, first, exchange, decode, out);
      return;
    case Sample::kFloat16: return read<__half>(in, image, pixels, first, exchange, decode, out);
    case Sample::kBFloat16: return read<__nv_bfloat16>(in, image, pixels, first, exchange, decode, out);
  }
}

template <bool kIntegers, int N>
__device__ void store(const Channels& to, int64_t image, int64_t pixels, int64_t first, Exchange& exchange,
                      const Planes<N>& in) {
  switch (to.sample) {
    case Sample::kUint8:
      if constexpr (kIntegers) write<uint8_t>(to, image, pixels, first, exchange, in);
      return;
    case Sample::kUint16:
      if constexpr (kIntegers) write<uint16_t>(to, image, pixels, first, exchange, in);
      return;
    case Sample::kFloat32:
      if constexpr (N <= 4) write<float>(to, image, pixels, first, exchange, in);
      return;
    case Sample::kFloat16: return write<__half>(to, image, pixels, first, exchange, in);
    case Sample::kBFloat16: return write<__nv_bfloat16>(to, image, pixels, first, exchange, in);
  }
}

// --- tiles -----------------------------------------------------------------------------------------------------------

// Calls tile(image, first pixel) for each run of 32 N pixels of an image, a warp for each.
template <int N, typename Tile>
__device__ void for_each_tile(int64_t images, int64_t pixels, Tile tile) {
  const unsigned of_image = unsigned((pixels + 32 * N - 1) / (32 * N));
  const int64_t all = images * of_image;
  for (int64_t t = blockIdx.x * kWarps + threadIdx.x / 32; t < all; t += gridDim.x * kWarps) {
    const unsigned image = unsigned(t) / of_image;
    tile(int64_t(image), int64_t(unsigned(t) - image * of_image) * (32 * N));
  }
}

// A kernel that goes over tiles of 32 N pixels.
template <int N, typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t images, int64_t pixels, cudaStream_t stream,
                   Arguments... arguments) {
  if (images == 0 || pixels == 0) return cudaSuccess;
  const int64_t tiles = images * ((pixels + 32 * N - 1) / (32 * N));
  if (tiles >> 32) return cudaErrorInvalidValue;  // more than any device has memory for
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min((tiles + kWarps - 1) / kWarps, kMostBlocks)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fastcolor::cuda
