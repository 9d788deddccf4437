// What the rendering on the CPU and on the GPU is told.
#pragma once
#include <cstdint>

namespace fastcolor {

// Places of the result on the low-resolution grid, of each row and of each column: the nearest of its positions, which
// may be outside, and how far beyond it, in [-1/2, 1/2].
struct Places {
  const int32_t* at;
  const float* beyond;
};

struct YuvLayout {
  int64_t down, across;               // luma samples of a chroma sample
  bool cosited_down, cosited_across;  // chroma on every second luma sample, else between two
  int bits;
  float black, luma_span, chroma_span;
  float red, blue;          // weights in luma
  const float* xyz_to_rgb;  // [3, 3] XYZ / white to linear RGB, in the memory of the host
};

}  // namespace fastcolor
