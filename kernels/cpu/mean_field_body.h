// Rows of the mean field. No include guard: see simd_body.h.

constexpr int kPixels = kLanes == 16 ? 4 : 2;  // at a time, SIMD over labels: a table is loaded once for all of them

FC_INLINE I lane_numbers() {
  I lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// --- the stencil: H_i = (1 - damping) (Σ_j w_ij F_j + prior_i) + damping H_i, SIMD over pixels ----------------------------

// w_ij of kLanes pixels with the neighbour at one offset.
FC_INLINE V pair_weight(const float* guide, const float* other, float sharpness, float space) {
  const V d = (load(guide) - load(other)) * sharpness;
  return space * exp_scaled(-d * d, splat(0.5f * kLog2E), splat(-127.0f / (0.5f * kLog2E)));
}

template <int RC>
void gather(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1, Scratch& scratch) {
  int64_t n = 0;
  for (int64_t o = 0; o < job.offsets; ++o) {
    const int64_t yy = y + job.dy[o];
    if (yy < 0 || yy >= job.height) continue;
    scratch.neighbors[n++] = {image.features(k - 1, yy) + job.dx[o], image.guide + yy * job.stride + job.dx[o],
                              job.space[o]};
  }
  const float* guide = image.guide + y * job.stride;
  const float* before = image.scores(k - 1, y);
  float* after = image.scores(k, y);
  const V keep = splat(job.damping), take = splat(1.0f - job.damping);
  for (int64_t x = x0; x < x1; x += kLanes) {
    for (int64_t o = 0; o < n; ++o) {
      const Neighbor& j = scratch.neighbors[o];
      store(scratch.weights + o * kLanes, pair_weight(guide + x, j.guide + x, job.sharpness, j.space));
    }
    const int64_t inside = x1 - x < kLanes ? x1 - x : kLanes;
    const I skipped = ((lane_numbers() + int32_t((y + x + k + 1) & 1)) & 1) != 0;  // of the other colour of the board
    for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
      V g[RC] = {};
      for (int64_t o = 0; o < n; ++o) {
        const V w = load(scratch.weights + o * kLanes);
        const float* f = scratch.neighbors[o].features + x;
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) g[r] += w * load(f + (r0 + r) * job.stride);
      }
      for (int r = 0; r < RC; ++r) {
        const int64_t at = (r0 + r) * job.stride + x;
        if (image.prior && r0 + r < job.prior_rank) {
          g[r] += load_some(image.prior + ((r0 + r) * job.height + y) * job.width + x, inside, 0.0f);
        }
        const V old = load(before + at);
        V h = g[r];
        if (job.damping != 0) h = take * g[r] + keep * old;
        if (job.checkerboard) h = skipped ? old : h;
        if (inside == kLanes) {
          store(after + at, h);
        } else {
          store_some(after + at, h, 0, inside);
        }
      }
    }
  }
}

// --- labels side by side: SIMD over labels ---------------------------------------------------------------------------

// What the tables say of one axis: for each chunk of RC columns and each vector of labels, RC vectors.
// The last vector of an axis covers its last kLanes labels: those that a vector before it has too are masked there.
struct Run {
  int64_t count, whole, vectors;  // labels, whole vectors, vectors
  int64_t repeated;               // lanes of the last vector that are masked
};

FC_INLINE Run run_of(int64_t count) {
  const int64_t whole = count / kLanes, vectors = (count + kLanes - 1) / kLanes;
  return {count, whole, vectors, count < kLanes ? 0 : vectors * kLanes - count};
}

// t = c u + A H of one chunk of columns, and its largest.
template <typename T, int RC, int P, bool kFirst>
FC_INLINE void score_chunk(const Run& run, const T* u, int64_t step, float c, const float* a, const float* h,
                           int64_t plane, int64_t apart, float* t, V (&most)[P]) {
  V at[P][RC];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    most[p] = splat(-kInfinity);
#pragma GCC unroll 4
    for (int r = 0; r < RC; ++r) at[p][r] = splat(h[r * plane + p * apart]);
  }
  const int64_t length = run.vectors * kLanes;
  const V unary = splat(c);
  const auto add = [&](int64_t v, int p, V x) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < RC; ++r) x += load(a + (v * RC + r) * kLanes) * at[p][r];
    return x;
  };
  for (int64_t v = 0; v < run.whole; ++v) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      float* to = t + p * length + v * kLanes;
      const V x = add(v, p, kFirst ? unary * load(u + p * step + v * kLanes) : load(to));
      most[p] = maximum(x, most[p]);
      store(to, x);
    }
  }
  if (run.whole == run.vectors) return;
  const int64_t v = run.whole;
  const I masked = lane_numbers() < int32_t(run.repeated);
  for (int p = 0; p < P; ++p) {
    float* to = t + p * length + v * kLanes;
    V x;
    if (!kFirst) {
      x = load(to);
    } else if (run.count < kLanes) {
      x = unary * load_some(u + p * step, run.count, 0.0f);
      x = lane_numbers() >= int32_t(run.count) ? splat(-kInfinity) : x;
    } else {
      x = unary * load(u + p * step + run.count - kLanes);
      x = masked ? splat(-kInfinity) : x;
    }
    x = add(v, p, x);
    most[p] = maximum(x, most[p]);
    store(to, x);
  }
}

// e = exp(scale (t − max t)) in place of t, its sum, and Σ_l B[l] e_l of the first chunk.
template <int RC, int P>
FC_INLINE void exp_chunk(const Run& run, const float* b, float scale2, const float (&most)[P], float* t,
                         V (&total)[P], V (&f)[P][RC], bool keep) {
  const int64_t length = run.vectors * kLanes;
  const V scale = splat(scale2), least = splat(-127.0f / scale2);
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    total[p] = V{};
#pragma GCC unroll 4
    for (int r = 0; r < RC; ++r) f[p][r] = V{};
  }
  for (int64_t v = 0; v < run.vectors; ++v) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      float* at = t + p * length + v * kLanes;
      const V e = exp_scaled(load(at) - most[p], scale, least);
      if (keep) store(at, e);
      total[p] += e;
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) f[p][r] += e * load(b + (v * RC + r) * kLanes);
    }
  }
}

// Σ_l B[l] e_l of one chunk after the first.
template <int RC, int P>
FC_INLINE void feature_chunk(const Run& run, const float* b, const float* e, V (&f)[P][RC]) {
  const int64_t length = run.vectors * kLanes;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int r = 0; r < RC; ++r) f[p][r] = V{};
  }
  for (int64_t v = 0; v < run.vectors; ++v) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const V x = load(e + p * length + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) f[p][r] += x * load(b + (v * RC + r) * kLanes);
    }
  }
}

template <typename T, int RC, int P>
FC_INLINE void label_pixels(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x, int64_t apart,
                            Scratch& scratch) {
  const bool last = k == job.updates;
  const float c = job.unary[k];
  const T* u = (const T*)image.logits + (y * job.width + x) * job.labels;
  int64_t step = apart * job.labels;
  if (c == 0) u = (const T*)job.zeros, step = 0;  // a uniform start: −inf · 0 must not appear
  const float* h = image.scores(k, y) + x;
  float* features = last ? nullptr : image.features(k, y) + x;
  T* q = last && image.marginals ? (T*)image.marginals + (y * job.width + x) * job.labels : nullptr;
  const bool annealed = last && image.ab;
  const float scale2 = annealed ? job.annealed_scale2 : kLog2E;
  float result[P][2] = {};
  for (int64_t axis = 0; axis < job.axes; ++axis) {
    const Table& table = job.tables[axis];
    const Run run = run_of(table.count);
    const int64_t chunk = run.vectors * RC * kLanes;
    V most[P];
    score_chunk<T, RC, P, true>(run, u + table.first, step, c, table.a, h, job.stride, apart, scratch.t, most);
    for (int64_t r0 = RC; r0 < job.rank; r0 += RC) {
      score_chunk<T, RC, P, false>(run, nullptr, 0, c, table.a + r0 / RC * chunk, h + r0 * job.stride, job.stride,
                                   apart, scratch.t, most);
    }
    float highest[P], inverse[P];
    for (int p = 0; p < P; ++p) highest[p] = largest(most[p]);
    V total[P], f[P][RC];
    const bool keep = q || job.rank > RC;
    exp_chunk<RC, P>(run, annealed ? table.colors : table.b, scale2, highest, scratch.t, total, f, keep);
    for (int p = 0; p < P; ++p) inverse[p] = 1.0f / sum(total[p]);
    if (annealed) {
      for (int p = 0; p < P; ++p) {
        for (int d = 0; d < 2; ++d) result[p][d] += sum(f[p][d]) * inverse[p];
      }
    }
    if (features) {
      for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
        if (r0) feature_chunk<RC, P>(run, table.b + r0 / RC * chunk, scratch.t, f);
        for (int p = 0; p < P; ++p) {
          for (int r = 0; r < RC; ++r) {
            float& to = features[(r0 + r) * job.stride + p * apart];
            to = (axis ? to : 0.0f) + sum(f[p][r]) * inverse[p];
          }
        }
      }
    }
    if (!q) continue;
    for (int p = 0; p < P; ++p) {
      T* to = q + p * apart * job.labels + table.first;
      const float* e = scratch.t + p * run.vectors * kLanes;
      if (run.count < kLanes) {
        store_some(to, load(e) * inverse[p], 0, run.count);
        continue;
      }
      // before the whole ones, since its masked lanes are 0
      if (run.whole < run.vectors) store(to + run.count - kLanes, load(e + run.whole * kLanes) * inverse[p]);
      for (int64_t v = 0; v < run.whole; ++v) store(to + v * kLanes, load(e + v * kLanes) * inverse[p]);
    }
  }
  if (!annealed) return;
  for (int p = 0; p < P; ++p) {
    for (int d = 0; d < 2; ++d) image.ab[(d * job.height + y) * job.width + x + p * apart] = result[p][d];
  }
}

// Features of the pixels that an update leaves alone.
inline void carry_over(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1) {
  const float* before = image.features(k - 1, y);
  float* after = image.features(k, y);
  for (int64_t r = 0; r < job.rank; ++r) {
    for (int64_t x = x0 + ((x0 + y + k) & 1); x < x1; x += 2) {
      after[r * job.stride + x] = before[r * job.stride + x];
    }
  }
}

template <typename T, int RC>
void label_row(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1, Scratch& scratch) {
  if (k > 0) gather<RC>(job, image, k, y, x0, x1, scratch);
  int64_t apart = 1, x = x0;
  if (job.checkerboard && k > 0 && k < job.updates) {
    apart = 2;
    x += (x0 + y + k + 1) & 1;
    carry_over(job, image, k, y, x0, x1);
  }
  for (; x + (kPixels - 1) * apart < x1; x += kPixels * apart) {
    label_pixels<T, RC, kPixels>(job, image, k, y, x, apart, scratch);
  }
  for (; x < x1; x += apart) label_pixels<T, RC, 1>(job, image, k, y, x, apart, scratch);
}

// --- pixels side by side: SIMD over pixels ------------------------------------------------------------------------------

// kLanes pixels of a row from x. At the end of a row they reach back, so that whole vectors are read.
struct Lanes {
  int64_t x;        // of lane 0
  int64_t from, n;  // the lanes that are meant
  bool whole;       // all lanes are in the row
};

template <typename T, int RC>
FC_INLINE void pixel_tile(const Job& job, const Image& image, int64_t k, int64_t y, const Lanes& lanes,
                          Scratch& scratch) {
  const bool last = k == job.updates;
  const float c = job.unary[k];
  const V unary = splat(c);
  int64_t plane = job.height * job.width;
  const T* u = (const T*)image.logits + y * job.width + lanes.x;
  if (c == 0) u = (const T*)job.zeros, plane = 0;
  const int64_t first = lanes.x + lanes.from;
  const float* scores = image.scores(k, y) + first;
  float* features = last ? nullptr : image.features(k, y) + first;
  T* q = last && image.marginals ? (T*)image.marginals + y * job.width + first : nullptr;
  const bool annealed = last && image.ab;
  const float scale2 = annealed ? job.annealed_scale2 : kLog2E;
  const V scale = splat(scale2), least = splat(-127.0f / scale2);
  const bool keep = q || job.rank > RC;
  V result[2] = {};
  for (int64_t axis = 0; axis < job.axes; ++axis) {
    const Table& table = job.tables[axis];
    float* t = scratch.t;
    V most = splat(-kInfinity);
    for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
      V h[RC];
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) {
        float some[kLanes] = {};
        for (int64_t i = 0; i < lanes.n; ++i) some[lanes.from + i] = scores[(r0 + r) * job.stride + i];
        h[r] = load(some);
      }
      most = splat(-kInfinity);
      const float* a = table.a + r0;
      const auto scored = [&](int64_t l, V x) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) x += a[l * job.rank + r] * h[r];
        most = maximum(x, most);
        store(t + l * kLanes, x);
      };
      const T* from = u + table.first * plane;
      if (r0 > 0) {
        for (int64_t l = 0; l < table.count; ++l) scored(l, load(t + l * kLanes));
      } else if (lanes.whole) {
        for (int64_t l = 0; l < table.count; ++l) {
          // planes lie pages apart, which no prefetcher follows
          __builtin_prefetch(from + l * plane + kLanes);
          scored(l, unary * load(from + l * plane));
        }
      } else {
        for (int64_t l = 0; l < table.count; ++l) scored(l, unary * load_some(from + l * plane, lanes.n, 0.0f));
      }
    }
    V total = {}, f[RC] = {};
    const float* b = annealed ? table.colors : table.b;
    const int64_t columns = annealed ? RC : job.rank;
    const auto exponentials = [&](bool kept) __attribute__((always_inline)) {
      for (int64_t l = 0; l < table.count; ++l) {
        const V e = exp_scaled(load(t + l * kLanes) - most, scale, least);
        if (kept) store(t + l * kLanes, e);
        total += e;
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) f[r] += e * b[l * columns + r];
      }
    };
    if (keep) {
      exponentials(true);
    } else {
      exponentials(false);
    }
    const V inverse = 1.0f / total;
    if (annealed) {
      for (int d = 0; d < 2; ++d) result[d] += f[d] * inverse;
    }
    if (features) {
      for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
        if (r0) {
          for (int r = 0; r < RC; ++r) f[r] = V{};
          for (int64_t l = 0; l < table.count; ++l) {
            const V e = load(t + l * kLanes);
#pragma GCC unroll 4
            for (int r = 0; r < RC; ++r) f[r] += e * b[l * columns + r0 + r];
          }
        }
        for (int r = 0; r < RC; ++r) {
          float some[kLanes];
          store(some, f[r] * inverse);
          float* to = features + (r0 + r) * job.stride;
          for (int64_t i = 0; i < lanes.n; ++i) to[i] = (axis ? to[i] : 0.0f) + some[lanes.from + i];
        }
      }
    }
    if (!q) continue;
    T* to = q + table.first * job.height * job.width;
    for (int64_t l = 0; l < table.count; ++l) {
      const V x = load(t + l * kLanes) * inverse;
      if (lanes.n == kLanes) {
        store(to + l * job.height * job.width, x);
      } else {
        store_some(to + l * job.height * job.width, x, lanes.from, lanes.n);
      }
    }
  }
  if (!annealed) return;
  for (int d = 0; d < 2; ++d) {
    store_some(image.ab + (d * job.height + y) * job.width + first, result[d], lanes.from, lanes.n);
  }
}

template <typename T, int RC>
void pixel_row(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1, Scratch& scratch) {
  if (k > 0) gather<RC>(job, image, k, y, x0, x1, scratch);
  for (int64_t x = x0; x < x1; x += kLanes) {
    Lanes lanes = {x, 0, x1 - x < kLanes ? x1 - x : kLanes, true};
    if (x + kLanes > job.width) {
      lanes.whole = job.width >= kLanes;
      if (lanes.whole) lanes.x = job.width - kLanes, lanes.from = x - lanes.x;
    }
    pixel_tile<T, RC>(job, image, k, y, lanes, scratch);
  }
  if (job.checkerboard && k > 0 && k < job.updates) carry_over(job, image, k, y, x0, x1);
}

template <int RC>
RowFunction row_of_storage(Storage storage, bool labels_last) {
  switch (storage) {
    case Storage::kFloat16: return labels_last ? label_row<Float16, RC> : pixel_row<Float16, RC>;
    case Storage::kBFloat16: return labels_last ? label_row<BFloat16, RC> : pixel_row<BFloat16, RC>;
    default: return labels_last ? label_row<float, RC> : pixel_row<float, RC>;
  }
}

inline RowFunction row_function(Storage storage, bool labels_last, int columns) {
  return columns == 3 ? row_of_storage<3>(storage, labels_last) : row_of_storage<4>(storage, labels_last);
}

inline void exponentials(const float* x, float scale, float* out, int64_t n) {
  const V scale2 = splat(scale * kLog2E), least = splat(-127.0f / (scale * kLog2E));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp_scaled(load(x + i), scale2, least));
  if (i < n) store_some(out + i, exp_scaled(load_some(x + i, n - i, 0.0f), scale2, least), 0, n - i);
}
