// The nearest labels of colours, exactly: equal distances go to the lower label, and distances are rounded as PyTorch
// rounds them (fastcolor/bins.py is the definition).
#pragma once
#include <cstdint>

namespace fastcolor::cpu {

// Joint labels are one axis of (a, b) colours; separable ones two axes of one coordinate, whose other is 0.
struct LabelTables {
  int64_t axes, count;         // labels of each axis
  const float* centers;        // [axes, 2, count]
  int64_t side, width;         // cells of the table along a and b, and labels in each: a multiple of kTableLanes
  float first, size;           // where the cells begin, and how large they are
  const float* cells;          // [axes, side², 2, width] coordinates of labels that may be nearest, inf past the last
  const int32_t* cell_labels;  // [axes, side², width], ascending
};

constexpr int64_t kTableLanes = 16;

// Colour i lies at [i * step] of a, and of b.
struct Colors {
  const float *a, *b;
  int64_t step;
  Colors from(int64_t i) const { return {a + i * step, b + i * step, step}; }
};

// The k nearest labels of n colours on one axis: index and squared distance, [k, stride] each, nearest first.
void nearest(const LabelTables& tables, int64_t axis, int64_t k, const Colors& colors, int64_t n, int32_t* index,
             float* squared, int64_t stride);

// ab: [images, 2, pixels], or [images, pixels, 2] with `interleaved`. index, squared: [axes, images, pixels, k].
void nearest_labels(const LabelTables& tables, const float* ab, bool interleaved, int64_t images, int64_t pixels,
                    int64_t k, int64_t* index, float* squared, int threads);

// counts: [axes · count], written.
void label_histogram(const LabelTables& tables, const float* ab, bool interleaved, int64_t images, int64_t pixels,
                     int64_t* counts, int threads);

}  // namespace fastcolor::cpu
