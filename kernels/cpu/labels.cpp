// Compiled without contraction to fused multiply-adds (CMakeLists.txt): distances must be rounded as in PyTorch.
#include "cpu/labels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/lab_math.h"
#include "cpu/multiversion.h"

namespace fastcolor::cpu {
namespace {

constexpr int32_t kTaken = std::numeric_limits<int32_t>::max();
constexpr int64_t kColors = 1024;  // of a run: a fixed number, so that results do not depend on threads

// The cell of a colour, or -1 where the table does not reach.
FC_INLINE int64_t cell_of(const LabelTables& t, float a, float b) {
  if (t.side == 1) return std::isfinite(a) && std::abs(a) < 1e18f ? 0 : -1;  // no square is infinite
  const float row = (a - t.first) / t.size, column = (b - t.first) / t.size, end = float(t.side);
  return row >= 0 && row < end && column >= 0 && column < end ? int64_t(row) * t.side + int64_t(column) : -1;
}

// Compared with every label: a stable insertion, in which nan comes last.
void nearest_of_all(const float* centers, int64_t count, float a, float b, int64_t k, int32_t* index, float* squared,
                    int64_t stride) {
  int64_t found = 0;
  for (int64_t l = 0; l < count; ++l) {
    const float da = a - centers[l], db = b - centers[count + l];
    const float d = da * da + db * db;
    const auto before = [d](float other) { return d < other || (std::isnan(other) && !std::isnan(d)); };
    if (found == k && !before(squared[(k - 1) * stride])) continue;
    int64_t j = found < k ? found++ : k - 1;
    for (; j > 0 && before(squared[(j - 1) * stride]); --j) {
      squared[j * stride] = squared[(j - 1) * stride];
      index[j * stride] = index[(j - 1) * stride];
    }
    squared[j * stride] = d;
    index[j * stride] = int32_t(l);
  }
}

using RunFunction = void (*)(const LabelTables&, int64_t axis, int64_t k, const Colors&, int64_t n, int32_t* scratch,
                             int32_t* index, float* squared, int64_t stride);

namespace baseline {
#include "cpu/labels_body.h"
}  // namespace baseline

#if FC_HAS_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "cpu/labels_body.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "cpu/labels_body.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

RunFunction function_for(int64_t width) {
#if FC_HAS_MULTIVERSION
  if (simd() == Simd::kAvx512) return avx512::run_function(width);
  if (simd() == Simd::kAvx2) return avx2::run_function(width);
#endif
  return baseline::run_function(width);
}

Colors colors_of(const float* ab, bool interleaved, int64_t image, int64_t pixels, int64_t start) {
  ab += image * 2 * pixels;
  return interleaved ? Colors{ab + 2 * start, ab + 2 * start + 1, 2} : Colors{ab + start, ab + pixels + start, 1};
}

// body(thread, image, start, n) of each run of colours.
template <typename Body>
void for_each(int64_t images, int64_t pixels, int threads, Body body) {
  const int64_t runs = (pixels + kColors - 1) / kColors, all = images * runs;
  // threads == 1 must not enter OpenMP: a forked data-loader worker would hang in it
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int t = 0; t < threads; ++t) {
    for (int64_t i = all * t / threads; i < all * (t + 1) / threads; ++i) {
      const int64_t start = i % runs * kColors;
      body(t, i / runs, start, std::min(kColors, pixels - start));
    }
  }
}

}  // namespace

void nearest(const LabelTables& tables, int64_t axis, int64_t k, const Colors& colors, int64_t n, int32_t* index,
             float* squared, int64_t stride) {
  constexpr int64_t kFew = 64;
  alignas(64) int32_t few[kFew];
  std::vector<int32_t> many(tables.width > kFew ? tables.width : 0);
  function_for(tables.width)(tables, axis, k, colors, n, many.empty() ? few : many.data(), index, squared, stride);
}

void nearest_labels(const LabelTables& tables, const float* ab, bool interleaved, int64_t images, int64_t pixels,
                    int64_t k, int64_t* index, float* squared, int threads) {
  std::vector<int32_t> indices(threads * k * kColors);
  std::vector<float> distances(threads * k * kColors);
  for_each(images, pixels, threads, [&](int thread, int64_t image, int64_t start, int64_t n) {
    int32_t* found = indices.data() + thread * k * kColors;
    float* far = distances.data() + thread * k * kColors;
    for (int64_t axis = 0; axis < tables.axes; ++axis) {
      nearest(tables, axis, k, colors_of(ab, interleaved, image, pixels, start), n, found, far, kColors);
      const int64_t to = ((axis * images + image) * pixels + start) * k;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < k; ++j) {
          index[to + i * k + j] = found[j * kColors + i];
          squared[to + i * k + j] = far[j * kColors + i];
        }
      }
    }
  });
}

void label_histogram(const LabelTables& tables, const float* ab, bool interleaved, int64_t images, int64_t pixels,
                     int64_t* counts, int threads) {
  const int64_t labels = tables.axes * tables.count;
  std::vector<int32_t> indices(threads * kColors);
  std::vector<float> distances(threads * kColors);
  std::vector<int64_t> own(threads * labels);
  for_each(images, pixels, threads, [&](int thread, int64_t image, int64_t start, int64_t n) {
    int32_t* found = indices.data() + thread * kColors;
    for (int64_t axis = 0; axis < tables.axes; ++axis) {
      nearest(tables, axis, 1, colors_of(ab, interleaved, image, pixels, start), n, found,
              distances.data() + thread * kColors, kColors);
      int64_t* count = own.data() + thread * labels + axis * tables.count;
      for (int64_t i = 0; i < n; ++i) ++count[found[i]];
    }
  });
  std::fill_n(counts, labels, 0);
  for (int t = 0; t < threads; ++t) {
    for (int64_t l = 0; l < labels; ++l) counts[l] += own[t * labels + l];
  }
}

}  // namespace fastcolor::cpu
