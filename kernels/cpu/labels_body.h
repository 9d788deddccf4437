// No include guard: included once for each instruction set, inside a namespace and under `#pragma GCC target`.

// Distances are never negative, so that their bits compare as they do; loops over integers become vectors.
template <int W>
FC_INLINE void nearest_in_cell(const float* __restrict__ cell_a, const float* __restrict__ cell_b,
                               const int32_t* __restrict__ labels, int64_t width, float a, float b, int64_t k,
                               int32_t* __restrict__ distance, int32_t* index, float* squared, int64_t stride) {
  const int64_t w = W ? W : width;
  for (int64_t i = 0; i < w; ++i) {
    const float da = a - cell_a[i], db = b - cell_b[i];
    const float d = da * da + db * db;
    memcpy(distance + i, &d, sizeof d);
  }
  for (int64_t j = 0; j < k; ++j) {
    int32_t least = kTaken;
    for (int64_t i = 0; i < w; ++i) least = distance[i] < least ? distance[i] : least;
    int32_t at = int32_t(w);  // the first of equals
    for (int64_t i = 0; i < w; ++i) {
      const int32_t here = distance[i] == least ? int32_t(i) : int32_t(w);
      at = here < at ? here : at;
    }
    distance[at] = kTaken;
    index[j * stride] = labels[at];
    memcpy(squared + j * stride, &least, sizeof least);
  }
}

template <int W>
void nearest_run(const LabelTables& t, int64_t axis, int64_t k, const Colors& colors, int64_t n, int32_t* scratch,
                 int32_t* index, float* squared, int64_t stride) {
  const float* cells = t.cells + axis * t.side * t.side * 2 * t.width;
  const int32_t* labels = t.cell_labels + axis * t.side * t.side * t.width;
  const float* centers = t.centers + axis * 2 * t.count;
  const bool joint = t.axes == 1;
  for (int64_t i = 0; i < n; ++i) {
    const float a = joint || axis == 0 ? colors.a[i * colors.step] : colors.b[i * colors.step];
    const float b = joint ? colors.b[i * colors.step] : 0.0f;
    const int64_t cell = cell_of(t, a, b);
    if (cell < 0) {
      nearest_of_all(centers, t.count, a, b, k, index + i, squared + i, stride);
      continue;
    }
    const float* from = cells + cell * 2 * t.width;
    nearest_in_cell<W>(from, from + t.width, labels + cell * t.width, t.width, a, b, k, scratch, index + i, squared + i,
                       stride);
  }
}

inline RunFunction run_function(int64_t width) {
  return width == kTableLanes ? nearest_run<kTableLanes> : nearest_run<0>;
}
