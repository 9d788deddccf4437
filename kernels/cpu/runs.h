// Runs of pixels: a run passes through three small planes in the first-level cache, so that the arithmetic is one
// vector loop for every sample type and layout. What works on them is in lab_body.h.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/lab_math.h"
#include "common/storage.h"

namespace fastcolor::cpu {

constexpr int64_t kRun = 1024;
struct alignas(64) Run {
  float c[3][kRun];
};

// --- memory to planes and back ---------------------------------------------------------------------------------------

// Channel c of pixel i lies at [c * plane + i * step].
template <typename T>
struct View {
  T* at;
  int64_t plane, step;
};

template <typename T>
View<T> view(const Channels& c, int64_t image, int64_t pixels, int64_t start) {
  T* base = static_cast<T*>(c.base) + image * 3 * pixels;
  return c.interleaved ? View<T>{base + 3 * start, 1, 3} : View<T>{base + start, pixels, 1};
}

template <typename From, typename To, typename Convert>
FC_INLINE void copy_in(const View<const From>& in, To (&out)[3][kRun], int64_t n, Convert convert) {
  if (in.step == 1) {
    for (int c = 0; c < 3; ++c) {
      const From* p = in.at + c * in.plane;
      for (int64_t i = 0; i < n; ++i) out[c][i] = convert(p[i]);
    }
  } else {
    const From* p = in.at;
    for (int64_t i = 0; i < n; ++i) {
      out[0][i] = convert(p[3 * i]);
      out[1][i] = convert(p[3 * i + 1]);
      out[2][i] = convert(p[3 * i + 2]);
    }
  }
}

template <typename To, typename Convert>
FC_INLINE void copy_out(const float (&in)[3][kRun], const View<To>& out, int64_t n, Convert convert) {
  if (out.step == 1) {
    for (int c = 0; c < 3; ++c) {
      To* p = out.at + c * out.plane;
      for (int64_t i = 0; i < n; ++i) p[i] = convert(in[c][i]);
    }
  } else {
    To* p = out.at;
    for (int64_t i = 0; i < n; ++i) {
      p[3 * i] = convert(in[0][i]);
      p[3 * i + 1] = convert(in[1][i]);
      p[3 * i + 2] = convert(in[2][i]);
    }
  }
}

// --- threads over runs -----------------------------------------------------------------------------------------------

template <typename Body>
void for_each_run(int64_t images, int64_t pixels, int threads, Body body) {
  const int64_t runs = (pixels + kRun - 1) / kRun;
  // threads == 1 must not enter OpenMP: a forked data-loader worker would hang in it
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < images * runs; ++i) {
    const int64_t start = i % runs * kRun;
    body(i / runs, start, std::min(kRun, pixels - start));
  }
}

}  // namespace fastcolor::cpu
