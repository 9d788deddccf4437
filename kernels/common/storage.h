// How numbers lie in memory: what the C++ and the CUDA kernels share with Python, as integers.
#pragma once
#include <cstdint>

namespace fastcolor {

// Of logits, marginals and the like.
enum class Storage : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Samples of pictures. Integers stand for [0, 1] times their largest value.
enum class Sample : int { kUint8 = 0, kUint16 = 1, kFloat32 = 2, kFloat16 = 3, kBFloat16 = 4 };

// Three channels of a picture: planar [images, 3, pixels], or interleaved [images, pixels, 3].
struct Channels {
  void* base;
  Sample sample;
  bool interleaved;
};

// The 16 bit types as the C++ kernels see them; CUDA has its own.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace fastcolor
