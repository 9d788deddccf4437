// Memory to registers and back, four samples in one access: a lane of a warp has four neighbouring pixels.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace fastcolor::cuda {

constexpr int kTile = 128;  // pixels of a warp: four for each lane

// Four samples in one access: 4, 8 or 16 bytes.
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
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
template <typename T>
__device__ Quad<T> get(const T* from) {
  const auto word = *reinterpret_cast<const typename Word<sizeof(Quad<T>)>::type*>(from);
  Quad<T> quad;
  memcpy(&quad, &word, sizeof quad);
  return quad;
}

template <typename T>
__device__ void put(T* to, const Quad<T>& quad) {
  typename Word<sizeof(Quad<T>)>::type word;
  memcpy(&word, &quad, sizeof word);
  *reinterpret_cast<decltype(word)*>(to) = word;
}

// To device memory by an intrinsic, since nvcc 13.0 splits the plain assignment into four stores. Evict-first: large
// results leave the cache before they are read again, and small ones stay in it all the same.
template <typename T>
__device__ void put_global(T* to, const Quad<T>& quad) {
  typename Word<sizeof(Quad<T>)>::type word;
  memcpy(&word, &quad, sizeof word);
  __stcs(reinterpret_cast<decltype(word)*>(to), word);
}

template <typename T>
struct Pixel {
  T x, y, z;
};

template <typename T>
struct View {
  T* base;
  bool interleaved;  // [images, pixels, 3]; else planar [images, 3, pixels]
};

// Where a warp turns interleaved memory around: 128 pixels of 12 bytes.
struct alignas(16) Exchange {
  char bytes[kTile * 3 * sizeof(float)];
};

// The four pixels of a lane. All lanes of the warp take part.
template <typename T>
__device__ void load_quads(const View<const T>& in, int64_t image, int64_t pixels, int64_t start, Exchange& exchange,
                           Quad<T> (&out)[3]) {
  const int lane = threadIdx.x % 32;
  if (!in.interleaved) {
    const T* from = in.base + image * 3 * pixels + start + 4 * lane;
#pragma unroll
    for (int c = 0; c < 3; ++c) out[c] = get(from + c * pixels);
    return;
  }
  // A lane's twelve samples are contiguous, but lanes would access memory 3 quads apart, touching each sector several
  // times. So the warp accesses it in order, and hands samples on through shared memory (without bank conflicts).
  const T* from = in.base + (image * pixels + start) * 3;
  T* staged = reinterpret_cast<T*>(exchange.bytes);
  Quad<T> packed[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) packed[k] = get(from + 4 * (32 * k + lane));
#pragma unroll
  for (int k = 0; k < 3; ++k) put(staged + 4 * (32 * k + lane), packed[k]);
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 3; ++k) packed[k] = get<T>(staged + 4 * (3 * lane + k));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 12; ++i) out[i % 3].v[i / 3] = packed[i / 4].v[i % 4];
}

template <typename T>
__device__ void store_quads(const View<T>& out, int64_t image, int64_t pixels, int64_t start, Exchange& exchange,
                            const Quad<T> (&in)[3]) {
  const int lane = threadIdx.x % 32;
  if (!out.interleaved) {
    T* to = out.base + image * 3 * pixels + start + 4 * lane;
#pragma unroll
    for (int c = 0; c < 3; ++c) put_global(to + c * pixels, in[c]);
    return;
  }
  T* to = out.base + (image * pixels + start) * 3;
  T* staged = reinterpret_cast<T*>(exchange.bytes);
  Quad<T> packed[3];
#pragma unroll
  for (int i = 0; i < 12; ++i) packed[i / 4].v[i % 4] = in[i % 3].v[i / 3];
#pragma unroll
  for (int k = 0; k < 3; ++k) put(staged + 4 * (3 * lane + k), packed[k]);
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 3; ++k) put_global(to + 4 * (32 * k + lane), get<T>(staged + 4 * (32 * k + lane)));
  __syncwarp();
}

template <typename T>
__device__ Pixel<T> load_pixel(const View<const T>& in, int64_t image, int64_t pixels, int64_t i) {
  const T* at = in.base + image * 3 * pixels + (in.interleaved ? 3 * i : i);
  const int64_t plane = in.interleaved ? 1 : pixels;
  return {at[0], at[plane], at[2 * plane]};
}

template <typename T>
__device__ void store_pixel(const View<T>& out, int64_t image, int64_t pixels, int64_t i, const Pixel<T>& p) {
  T* at = out.base + image * 3 * pixels + (out.interleaved ? 3 * i : i);
  const int64_t plane = out.interleaved ? 1 : pixels;
  at[0] = p.x, at[plane] = p.y, at[2 * plane] = p.z;
}

}  // namespace fastcolor::cuda
