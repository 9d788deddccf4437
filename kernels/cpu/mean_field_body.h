// Rows of the mean field. No include guard: see simd_body.h.

constexpr int kPixels = kLanes == 16 ? 4 : 2;  // at a time, SIMD over labels: a table is loaded once for all of them

constexpr int64_t kTerms = 20;               // of a sum that is added to others
constexpr int kGroup = kLanes == 16 ? 4 : 2;  // exponentials side by side: one by itself is a long chain of operations

FC_INLINE I lane_numbers() {
  I lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// --- the stencil: H_i = (1 - damping) (Σ_j w_ij F_j + prior_i) + damping H_i, SIMD over pixels -----------------------

// w_ij of kLanes pixels with the neighbour at one offset.
FC_INLINE V pair_weight(const float* guide, const float* other, float sharpness, float space) {
  const V d = (load(guide) - load(other)) * sharpness;
  return space * exp2_of(d * d * (-0.5f * kLog2E));
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

// What the field adds to the scores of P pixels: RC columns of A H.
template <int RC, int P>
struct LinearField {
  const float* a;
  V at[P][RC], columns[RC];
  FC_INLINE LinearField(const float* a, const float* h, float scale, int64_t plane, int64_t apart) : a(a) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) at[p][r] = splat(h[r * plane + p * apart] * scale);
    }
  }
  FC_INLINE void read(int64_t v) {
#pragma GCC unroll 4
    for (int r = 0; r < RC; ++r) columns[r] = load(a + (v * RC + r) * kLanes);
  }
  FC_INLINE V add(V t, int p) const {
#pragma GCC unroll 4
    for (int r = 0; r < RC; ++r) t += columns[r] * at[p][r];
    return t;
  }
};

// −κ H₀ |(x, y) − (H₁, H₂) / H₀|². Where no neighbour is felt H₀ is 0; nan in H₁ and H₂ stays.
template <typename F>
struct Parabola {
  F x, y, slope;
  FC_INLINE Parabola() = default;
  FC_INLINE Parabola(F h0, F h1, F h2, float curvature) {
    const F size = h0 < 0.0f ? -h0 : h0;
    const F inverse = size <= 1e-30f ? F{} : 1.0f / h0;
    x = h1 * inverse, y = h2 * inverse, slope = h0 * -curvature;
  }
};

template <int P>
struct QuadraticField {
  const float* b;
  V x[P], y[P], slope[P], label_x, label_y;
  FC_INLINE QuadraticField(const float* b, const float* h, float curvature, int64_t plane, int64_t apart) : b(b) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const float* at = h + p * apart;
      const Parabola<float> field(at[0], at[plane], at[2 * plane], curvature);
      x[p] = splat(field.x), y[p] = splat(field.y), slope[p] = splat(field.slope);
    }
  }
  FC_INLINE void read(int64_t v) {
    label_x = load(b + (v * 3 + 1) * kLanes);
    label_y = load(b + (v * 3 + 2) * kLanes);
  }
  FC_INLINE V add(V t, int p) const {
    const V dx = label_x - x[p], dy = label_y - y[p];
    return t + slope[p] * (dx * dx + dy * dy);
  }
};

// t = c u + what the field adds, or that added to t, and its largest. The units are those of exp2: c and the field have
// log2(e) in them.
template <typename T, int P, bool kFirst, typename Field>
FC_INLINE void score_chunk(const Run& run, const T* u, int64_t step, float c, Field field, float* t, V (&most)[P]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) most[p] = splat(-kInfinity);
  const int64_t length = run.vectors * kLanes;
  const V unary = splat(c);
  for (int64_t v = 0; v < run.whole; ++v) {
    field.read(v);  // before t is written, which the compiler must take for the same memory
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      float* to = t + p * length + v * kLanes;
      const V x = field.add(kFirst ? unary * load(u + p * step + v * kLanes) : load(to), p);
      most[p] = maximum(x, most[p]);
      store(to, x);
    }
  }
  if (run.whole == run.vectors) return;
  const int64_t v = run.whole;
  field.read(v);
#pragma GCC unroll 4
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
      x = lane_numbers() < int32_t(run.repeated) ? splat(-kInfinity) : x;
    }
    x = field.add(x, p);
    most[p] = maximum(x, most[p]);
    store(to, x);
  }
}

template <typename T, int RC, int P>
FC_INLINE void linear_scores(const Job& job, const Table& table, const Run& run, const T* u, int64_t step, float c,
                             const float* h, float scale, int64_t apart, float* t, V (&most)[P]) {
  const int64_t chunk = run.vectors * RC * kLanes;
  score_chunk<T, P, true>(run, u, step, c, LinearField<RC, P>(table.a, h, scale, job.stride, apart), t, most);
  for (int64_t r0 = RC; r0 < job.rank; r0 += RC) {
    const LinearField<RC, P> field(table.a + r0 / RC * chunk, h + r0 * job.stride, scale, job.stride, apart);
    score_chunk<T, P, false>(run, u, step, c, field, t, most);
  }
}

// Logits of the next pixels are fetched here, where no load waits for memory.
// e = 2^(t − max t), in place of t if it is to be kept, its sum, and Σ_l B[l] e_l of the first chunk. The first column
// of a quadratic similarity is all ones: its sum is that of e.
template <typename T, int RC, int P, bool kQuadratic, bool kKeep>
FC_INLINE void exp_chunk(const Run& run, const float* b, const float (&most)[P], const T* next, int64_t step, float* t,
                         V (&total)[P], V (&f)[P][RC]) {
  const int64_t length = run.vectors * kLanes;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    total[p] = V{};
#pragma GCC unroll 4
    for (int r = 0; r < RC; ++r) f[p][r] = V{};
  }
  for (int64_t v = 0; v < run.vectors; ++v) {
    V e[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(next + p * step + v * kLanes);
      e[p] = load(t + p * length + v * kLanes) - most[p];
    }
    exp2_of(e);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if (kKeep) store(t + p * length + v * kLanes, e[p]);
      total[p] += e[p];
    }
#pragma GCC unroll 4
    for (int r = kQuadratic; r < RC; ++r) {
      const V column = load(b + (v * RC + r) * kLanes);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) f[p][r] += e[p] * column;
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

// The sums of f[p][r] over lanes for one r.
template <int RC, int P>
FC_INLINE void column_sums(const V (&f)[P][RC], int r, float (&out)[P]) {
  V column[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) column[p] = f[p][r];
  sums(column, out);
}

// q = e · scale of one pixel past the caches, in whole cache lines but for its ends. Takes the gap out of e.
template <typename T>
FC_INLINE void stream_labels(const Run& run, float* e, float scale, T* to) {
  float* last = e + run.whole * kLanes;
  if (run.whole < run.vectors) store(last, load(last + run.repeated));
  constexpr int64_t kLine = sizeof(V) / sizeof(T);
  int64_t l = (kLine - reinterpret_cast<uintptr_t>(to) / sizeof(T) % kLine) % kLine;
  store_first(to, load(e) * scale, l);
  for (; l + kLanes <= run.count; l += kLanes) stream(to + l, load(e + l) * scale);
  store_first(to + l, load(e + l) * scale, run.count - l);
}

template <typename T, int RC, int P, bool kQuadratic>
FC_INLINE void label_pixels(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x, int64_t apart,
                            Scratch& scratch) {
  const bool last = k == job.updates;
  const bool annealed = last && image.ab;
  const float scale = annealed ? job.annealed_scale : kLog2E, c = job.unary[k] * scale;
  const T* u = (const T*)image.logits + (y * job.width + x) * job.labels;
  int64_t step = apart * job.labels;
  if (c == 0) u = (const T*)job.zeros, step = 0;  // a uniform start: −inf · 0 must not appear
  const float* h = image.scores(k, y) + x;
  float* features = last ? nullptr : image.features(k, y) + x;
  T* q = last && image.marginals ? (T*)image.marginals + (y * job.width + x) * job.labels : nullptr;
  float result[P][2] = {};
  for (int64_t axis = 0; axis < job.axes; ++axis) {
    const Table& table = job.tables[axis];
    const Run run = run_of(table.count);
    const int64_t chunk = run.vectors * RC * kLanes;
    V most[P];
    if constexpr (kQuadratic) {
      const QuadraticField<P> field(table.b, h, job.curvature * scale, job.stride, apart);
      score_chunk<T, P, true>(run, u, step, c, field, scratch.t, most);
    } else {
      linear_scores<T, RC, P>(job, table, run, u + table.first, step, c, h, scale, apart, scratch.t, most);
    }
    float highest[P], inverse[P], column[P];
    largests(most, highest);
    V total[P], f[P][RC];
    const float* b = annealed ? table.colors : table.b;
    const T* next = u + P * step + table.first;
    if (q || job.rank > RC) {
      exp_chunk<T, RC, P, kQuadratic, true>(run, b, highest, next, step, scratch.t, total, f);
    } else {
      exp_chunk<T, RC, P, kQuadratic, false>(run, b, highest, next, step, scratch.t, total, f);
    }
    sums(total, inverse);
    for (int p = 0; p < P; ++p) inverse[p] = 1.0f / inverse[p];
    if (annealed) {
#pragma GCC unroll 2
      for (int d = 0; d < 2; ++d) {
        column_sums(f, d + kQuadratic, column);
        for (int p = 0; p < P; ++p) result[p][d] += column[p] * inverse[p];
      }
    }
    if (features) {
      for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
        if (r0) feature_chunk<RC, P>(run, table.b + r0 / RC * chunk, scratch.t, f);
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) {
          if (!(kQuadratic && r == 0)) column_sums(f, r, column);
          for (int p = 0; p < P; ++p) {
            float& to = features[(r0 + r) * job.stride + p * apart];
            const float expected = kQuadratic && r == 0 ? 1.0f : column[p] * inverse[p];
            to = axis ? to + expected : expected;
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
      if (kStreams<T> && job.large) {
        stream_labels(run, scratch.t + p * run.vectors * kLanes, inverse[p], to);
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

template <typename T, int RC, bool kQuadratic>
void label_row(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1, Scratch& scratch) {
  if (k > 0) gather<RC>(job, image, k, y, x0, x1, scratch);
  int64_t apart = 1, x = x0;
  if (job.checkerboard && k > 0 && k < job.updates) {
    apart = 2;
    x += (x0 + y + k + 1) & 1;
    carry_over(job, image, k, y, x0, x1);
  }
  for (; x + (kPixels - 1) * apart < x1; x += kPixels * apart) {
    label_pixels<T, RC, kPixels, kQuadratic>(job, image, k, y, x, apart, scratch);
  }
  for (; x < x1; x += apart) label_pixels<T, RC, 1, kQuadratic>(job, image, k, y, x, apart, scratch);
  if (k == job.updates) streamed();
}

// --- pixels side by side: SIMD over pixels ---------------------------------------------------------------------------

// kLanes pixels of a row from x. At the end of a row they reach back, so that whole vectors are read.
struct Lanes {
  int64_t x;        // of lane 0
  int64_t from, n;  // the lanes that are meant
  bool whole;       // all lanes are in the row
};

FC_INLINE Lanes lanes_at(const Job& job, int64_t x, int64_t x1) {
  Lanes lanes = {x, 0, x1 - x < kLanes ? x1 - x : kLanes, true};
  if (x + kLanes > job.width) {
    lanes.whole = job.width >= kLanes;
    if (lanes.whole) lanes.x = job.width - kLanes, lanes.from = x - lanes.x;
  }
  return lanes;
}

// Values of a row at the lanes that are meant, 0 elsewhere.
FC_INLINE V at_lanes(const float* row, const Lanes& lanes) {
  float some[kLanes] = {};
  for (int64_t i = 0; i < lanes.n; ++i) some[lanes.from + i] = row[i];
  return load(some);
}

// Logits of kLanes pixels at a time lie together in memory of our own from when a row is first read until it is last
// read: planes lie pages apart, which no prefetcher follows, and at a power of two few of them share a cache.
template <typename T>
FC_INLINE T* tile_of(const Job& job, const Image& image, int64_t y, int64_t x) {
  return (T*)image.tiles + ((y % image.tile_rows) * job.padded_width + x / kLanes * kLanes) * job.labels;
}

constexpr int64_t kTiles = 4;  // that are copied at once: whole lines of 16 bits, and neighbours of a page

template <typename T>
void fill_tiles(const Job& job, const Image& image, int64_t y, int64_t x, int64_t x1) {
  Lanes lanes[kTiles];
  int64_t count = 0;
  for (; count < kTiles && x + count * kLanes < x1; ++count) lanes[count] = lanes_at(job, x + count * kLanes, x1);
  T* to = tile_of<T>(job, image, y, x);
  const T* from = (const T*)image.logits + y * job.width;
  for (int64_t l = 0; l < job.labels; ++l, to += kLanes, from += job.height * job.width) {
    for (int64_t i = 0; i < count; ++i) {
      T* tile = to + i * job.labels * kLanes;
      if (lanes[i].whole) {
        memcpy(tile, from + lanes[i].x, sizeof(T) * kLanes);
      } else {
        for (int64_t n = 0; n < kLanes; ++n) tile[n] = n < lanes[i].n ? from[lanes[i].x + n] : T{};
      }
    }
  }
}

template <typename T, int RC, bool kQuadratic>
FC_INLINE void pixel_tile(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x, const Lanes& lanes,
                          Scratch& scratch) {
  const bool last = k == job.updates;
  const bool annealed = last && image.ab;
  const float scale = annealed ? job.annealed_scale : kLog2E, c = job.unary[k] * scale;
  const V unary = splat(c);
  const T* u = tile_of<T>(job, image, y, x);
  const bool from_planes = k == job.first_read;  // so are the tiles after this one and those that are copied with it
  const T* next = from_planes ? (const T*)image.logits + y * job.width + x + kTiles * kLanes : u + job.labels * kLanes;
  const int64_t next_step = from_planes ? job.height * job.width : kLanes;
  int64_t step = kLanes;
  if (c == 0) u = (const T*)job.zeros, step = 0;
  const int64_t first = lanes.x + lanes.from;
  const float* scores = image.scores(k, y) + first;
  float* features = last ? nullptr : image.features(k, y) + first;
  T* q = last && image.marginals ? (T*)image.marginals + y * job.width + first : nullptr;
  const bool keep = q || job.rank > RC;
  V result[2] = {};
  for (int64_t axis = 0; axis < job.axes; ++axis) {
    const Table& table = job.tables[axis];
    float* t = scratch.t;
    V most = splat(-kInfinity);
    for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
      V h[RC];
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) h[r] = at_lanes(scores + (r0 + r) * job.stride, lanes);
      Parabola<V> parabola;
      if (kQuadratic) parabola = Parabola<V>(h[0], h[1], h[2], job.curvature * scale);
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) h[r] *= scale;
      most = splat(-kInfinity);
      const float *a = table.a + r0, *labels = table.b;
      const auto scored = [&](int64_t l, V x) __attribute__((always_inline)) {
        if (kQuadratic) {
          const V dx = parabola.x - labels[l * 3 + 1], dy = parabola.y - labels[l * 3 + 2];
          x += parabola.slope * (dx * dx + dy * dy);
        } else {
#pragma GCC unroll 4
          for (int r = 0; r < RC; ++r) x += a[l * job.rank + r] * h[r];
        }
        most = maximum(x, most);
        store(t + l * kLanes, x);
      };
      const T* from = u + table.first * step;
      if (r0 > 0) {
        for (int64_t l = 0; l < table.count; ++l) scored(l, load(t + l * kLanes));
      } else {
        for (int64_t l = 0; l < table.count; ++l) scored(l, unary * load(from + l * step));
      }
    }
    V total = {}, f[RC] = {};
    const float* b = annealed ? table.colors : table.b;
    const T* ahead = next + table.first * next_step;
    const int64_t columns = annealed ? RC : job.rank;
    V part, g[RC];
    const auto exponentials_of = [&](int64_t l, auto& e, bool kept) __attribute__((always_inline)) {
      constexpr int kCount = sizeof e / sizeof e[0];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        __builtin_prefetch(ahead + (l + i) * next_step);
        e[i] = load(t + (l + i) * kLanes) - most;
      }
      exp2_of(e);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        if (kept) store(t + (l + i) * kLanes, e[i]);
        part += e[i];
#pragma GCC unroll 4
        for (int r = kQuadratic; r < RC; ++r) g[r] += e[i] * b[(l + i) * columns + r];
      }
    };
    const auto exponentials = [&](bool kept) __attribute__((always_inline)) {
      // sums of sums: one after the other, 313 terms would round off ten times as much
      for (int64_t first = 0; first < table.count; first += kTerms) {
        const int64_t end = std::min(first + kTerms, table.count);
        part = V{};
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) g[r] = V{};
        int64_t l = first;
        for (V e[kGroup]; l + kGroup <= end; l += kGroup) exponentials_of(l, e, kept);
        for (V e[1]; l < end; ++l) exponentials_of(l, e, kept);
        total += part;
#pragma GCC unroll 4
        for (int r = kQuadratic; r < RC; ++r) f[r] += g[r];
      }
    };
    if (keep) {
      exponentials(true);
    } else {
      exponentials(false);
    }
    const V inverse = 1.0f / total;
    if (annealed) {
      for (int d = 0; d < 2; ++d) result[d] += f[d + kQuadratic] * inverse;
    }
    if (features) {
      for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
        if (r0) {
          for (int r = 0; r < RC; ++r) f[r] = V{};
          for (int64_t first = 0; first < table.count; first += kTerms) {
            const int64_t end = std::min(first + kTerms, table.count);
            V g[RC] = {};
            for (int64_t l = first; l < end; ++l) {
              const V e = load(t + l * kLanes);
#pragma GCC unroll 4
              for (int r = 0; r < RC; ++r) g[r] += e * b[l * columns + r0 + r];
            }
#pragma GCC unroll 4
            for (int r = 0; r < RC; ++r) f[r] += g[r];
          }
        }
        for (int r = 0; r < RC; ++r) {
          float some[kLanes];
          store(some, kQuadratic && r == 0 ? splat(1.0f) : f[r] * inverse);
          float* to = features + (r0 + r) * job.stride;
          for (int64_t i = 0; i < lanes.n; ++i) to[i] = (axis ? to[i] : 0.0f) + some[lanes.from + i];
        }
      }
    }
    if (!q) continue;
    const int64_t plane = job.height * job.width;
    T* to = q + table.first * plane;
    for (int64_t l = 0; l < table.count; ++l, to += plane) {
      const V x = load(t + l * kLanes) * inverse;
      if (lanes.n < kLanes) {
        store_some(to, x, lanes.from, lanes.n);
      } else if (job.large) {
        stream(to, x);
      } else {
        store(to, x);
      }
    }
  }
  if (!annealed) return;
  for (int d = 0; d < 2; ++d) {
    store_some(image.ab + (d * job.height + y) * job.width + first, result[d], lanes.from, lanes.n);
  }
}

template <typename T, int RC, bool kQuadratic>
void pixel_row(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1, Scratch& scratch) {
  if (k > 0) gather<RC>(job, image, k, y, x0, x1, scratch);
  for (int64_t x = x0; x < x1; x += kLanes) {
    if (k == job.first_read && (x - x0) % (kTiles * kLanes) == 0) fill_tiles<T>(job, image, y, x, x1);
    pixel_tile<T, RC, kQuadratic>(job, image, k, y, x, lanes_at(job, x, x1), scratch);
  }
  if (job.checkerboard && k > 0 && k < job.updates) carry_over(job, image, k, y, x0, x1);
  if (k == job.updates) streamed();
}

// --- backward: from the gradient of q at the last update to those of logits, H and F, down to the start --------------

// dF of update k from dG of update k + 1, whose weights are symmetric; and the gradients of the weights w_ij
// themselves.
template <int RC>
void scatter(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1, Scratch& scratch) {
  int64_t n = 0;
  for (int64_t o = 0; o < job.offsets; ++o) {
    const int64_t yy = y + job.dy[o];
    if (yy < 0 || yy >= job.height) continue;
    scratch.neighbors[n] = {image.features(k, yy) + job.dx[o], image.guide + yy * job.stride + job.dx[o], job.space[o]};
    scratch.receivers[n] = image.grad_g(k + 1, yy) + job.dx[o];
    scratch.places[n++] = o;
  }
  const float* guide = image.guide + y * job.stride;
  const float* own_features = image.features(k, y);
  const float* own_grad = image.grad_g(k + 1, y);
  const float* after = image.grad_f(k + 1, y);
  float* to = image.grad_f(k, y);
  if (job.pairs) memset(scratch.pair_sums, 0, sizeof(float) * (job.offsets + 1) * kLanes);
  for (int64_t x = x0; x < x1; x += kLanes) {
    const int64_t inside = x1 - x < kLanes ? x1 - x : kLanes;
    for (int64_t o = 0; o < n; ++o) {
      const Neighbor& j = scratch.neighbors[o];
      store(scratch.weights + o * kLanes, pair_weight(guide + x, j.guide + x, job.sharpness, j.space));
    }
    const I skipped = ((lane_numbers() + int32_t((y + x + k) & 1)) & 1) != 0;  // by update k + 1
    for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
      V f[RC] = {};
      for (int64_t o = 0; o < n; ++o) {
        const V w = load(scratch.weights + o * kLanes);
        const float* g = scratch.receivers[o] + x;
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) f[r] += w * load(g + (r0 + r) * job.stride);
      }
      for (int r = 0; r < RC; ++r) {
        const int64_t at = (r0 + r) * job.stride + x;
        // the last update hands on marginals, not features: nothing to carry
        if (job.checkerboard && k + 1 < job.updates) f[r] += skipped ? load(after + at) : V{};
        if (inside == kLanes) {
          store(to + at, f[r]);
        } else {
          store_some(to + at, f[r], 0, inside);
        }
      }
    }
    if (!job.pairs) continue;
    // dL/dw of a pair seen from both of its ends. Past the end of a row features and gradients are 0.
    V of_guide = {}, of_sharpness = load(scratch.pair_sums + job.offsets * kLanes);
    for (int64_t o = 0; o < n; ++o) {
      V sent = {}, received = {};
      for (int64_t r = 0; r < job.rank; ++r) {
        const int64_t at = r * job.stride + x;
        sent += load(scratch.receivers[o] + at) * load(own_features + at);
        received += load(own_grad + at) * load(scratch.neighbors[o].features + at);
      }
      const V d = load(guide + x) - load(scratch.neighbors[o].guide + x);
      const V w = load(scratch.weights + o * kLanes);
      // received, where this pixel is i: each ordered pair (i, j) is counted once
      float* sums = scratch.pair_sums + scratch.places[o] * kLanes;
      const V scaled = d * job.sharpness;
      store(sums, load(sums) + received * exp2_of(scaled * scaled * (-0.5f * kLog2E)));
      const V slope = w != 0.0f ? w * scaled : V{};  // scaled may be inf where w is 0
      of_sharpness -= received * slope * d;
      of_guide -= (sent + received) * slope * job.sharpness;
    }
    store(scratch.pair_sums + job.offsets * kLanes, of_sharpness);
    float* grad_guide = image.grad_guide + y * job.width + x;
    store_some(grad_guide, load_some(grad_guide, inside, 0.0f) + of_guide, 0, inside);
  }
  if (!job.pairs) return;
  for (int64_t o = 0; o <= job.offsets; ++o) scratch.grad_pairs[o] += sum(load(scratch.pair_sums + o * kLanes));
}

// dH and dG of update k from what the label pass left in dH and from update k + 1.
inline void hand_on(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1) {
  if (k == 0) return;  // the start has no field
  const float take = 1.0f - job.damping;
  for (int64_t r = 0; r < job.rank; ++r) {
    float* dh = image.grad_h(k, y) + r * job.stride;
    float* dg = image.grad_g(k, y) + r * job.stride;
    const float* later = k < job.updates ? image.grad_h(k + 1, y) + r * job.stride : nullptr;
    float* prior = image.grad_prior && r < job.prior_rank
                       ? image.grad_prior + (r * job.height + y) * job.width
                       : nullptr;
    for (int64_t x = x0; x < x1; ++x) {
      const bool here = !job.checkerboard || ((y + x + k + 1) & 1) == 0;
      const bool next = !job.checkerboard || !here;  // update k + 1 has the other colour of the board
      if (later) dh[x] += next ? job.damping * later[x] : later[x];
      dg[x] = here ? take * dh[x] : 0.0f;
      if (prior) prior[x] += dg[x];
    }
  }
}

template <typename T, int RC, int P>
FC_INLINE void label_pixels_backward(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x,
                                     int64_t apart, Scratch& scratch) {
  const bool last = k == job.updates;
  const float c = job.unary[k];
  const int64_t pixel = (y * job.width + x) * job.labels;
  const T* u = (const T*)image.logits + pixel;
  int64_t step = apart * job.labels;
  const int64_t grad_step = step;
  if (c == 0) u = (const T*)job.zeros, step = 0;
  const float* h = image.scores(k, y) + x;
  const float* df = image.grad_f(k, y) + x;
  float* dh = image.grad_h(k, y) + x;
  for (int64_t axis = 0; axis < job.axes; ++axis) {
    const Table& table = job.tables[axis];
    const Run run = run_of(table.count);
    const int64_t chunk = run.vectors * RC * kLanes, length = run.vectors * kLanes;
    const int64_t tail = run.count < kLanes ? 0 : run.count - kLanes;  // first label of the last vector
    float *t = scratch.t, *s = scratch.s;
    V most[P];
    linear_scores<T, RC, P>(job, table, run, u + table.first, step, c * kLog2E, h, kLog2E, apart, t, most);
    // s = dL/dq
    if (last) {
      const T* g = (const T*)image.grad + pixel + table.first;
      for (int p = 0; p < P; ++p, g += grad_step) {
        for (int64_t v = 0; v < run.whole; ++v) store(s + p * length + v * kLanes, load(g + v * kLanes));
        if (run.whole == run.vectors) continue;
        store(s + p * length + run.whole * kLanes,
              run.count < kLanes ? load_some(g, run.count, 0.0f) : load(g + tail));
      }
    }
    for (int64_t r0 = 0; r0 < job.rank && !last; r0 += RC) {
      V at[P][RC];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) at[p][r] = splat(df[(r0 + r) * job.stride + p * apart]);
      }
      const float* b = table.b + r0 / RC * chunk;
      for (int64_t v = 0; v < run.vectors; ++v) {
        V columns[RC];
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) columns[r] = load(b + (v * RC + r) * kLanes);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          float* to = s + p * length + v * kLanes;
          V sum = r0 ? load(to) : V{};
#pragma GCC unroll 4
          for (int r = 0; r < RC; ++r) sum += columns[r] * at[p][r];
          store(to, sum);
        }
      }
    }
    V total[P] = {}, dot[P] = {};
    float highest[P], inverse[P], mean[P], column[P];
    largests(most, highest);
    for (int64_t v = 0; v < run.vectors; ++v) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const int64_t at = p * length + v * kLanes;
        const V e = exp2_of(load(t + at) - highest[p]);
        store(t + at, e);
        total[p] += e;
        dot[p] += e * load(s + at);
      }
    }
    sums(total, inverse);
    sums(dot, mean);
    for (int p = 0; p < P; ++p) {
      inverse[p] = 1.0f / inverse[p];
      mean[p] *= inverse[p];
    }
    // q in place of t, dt in place of s; du is written by the last update and added to by those before it
    float* du = image.grad_logits + pixel + table.first;
    for (int p = 0; p < P; ++p, du += grad_step) {
      float *e = t + p * length, *d = s + p * length;
      const auto differentiate = [&](int64_t v) __attribute__((always_inline)) {
        const V q = load(e + v * kLanes) * inverse[p];
        const V dt = q * (load(d + v * kLanes) - mean[p]);
        store(e + v * kLanes, q);
        store(d + v * kLanes, dt);
        return dt * c;
      };
      if (run.whole < run.vectors) {  // first: its masked lanes are 0
        const V x = differentiate(run.whole);
        if (run.count < kLanes) {
          store_some(du, last ? x : load_some(du, run.count, 0.0f) + x, 0, run.count);
        } else {
          store(du + tail, last ? x : load(du + tail) + x);
        }
      }
      for (int64_t v = 0; v < run.whole; ++v) {
        const V x = differentiate(v);
        store(du + v * kLanes, last ? x : load(du + v * kLanes) + x);
      }
    }
    for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
      V f[P][RC];
      feature_chunk<RC, P>(run, table.a + r0 / RC * chunk, s, f);
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) {
        column_sums(f, r, column);
        for (int p = 0; p < P; ++p) {
          float& to = dh[(r0 + r) * job.stride + p * apart];
          to = (axis ? to : 0.0f) + column[p];
        }
      }
      if (!job.factors) continue;
      float* grad_a = scratch.grad_a + job.table_starts[axis] + r0 / RC * chunk;
      float* grad_b = scratch.grad_b + job.table_starts[axis] + r0 / RC * chunk;
      for (int64_t v = 0; v < run.vectors; ++v) {
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) {
          V a = load(grad_a + (v * RC + r) * kLanes), b = load(grad_b + (v * RC + r) * kLanes);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            const int64_t at = p * length + v * kLanes, place = (r0 + r) * job.stride + p * apart;
            a += load(s + at) * h[place];
            if (!last) b += load(t + at) * df[place];
          }
          store(grad_a + (v * RC + r) * kLanes, a);
          store(grad_b + (v * RC + r) * kLanes, b);
        }
      }
    }
  }
}

template <typename T, int RC>
void label_row_backward(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1,
                        Scratch& scratch) {
  if (k < job.updates) scatter<RC>(job, image, k, y, x0, x1, scratch);
  int64_t apart = 1, x = x0;
  if (job.checkerboard && k > 0 && k < job.updates) {
    apart = 2;
    x += (x0 + y + k + 1) & 1;
    for (int64_t r = 0; r < job.rank; ++r) {
      memset(image.grad_h(k, y) + r * job.stride + x0, 0, sizeof(float) * (x1 - x0));
    }
  }
  for (; x + (kPixels - 1) * apart < x1; x += kPixels * apart) {
    label_pixels_backward<T, RC, kPixels>(job, image, k, y, x, apart, scratch);
  }
  for (; x < x1; x += apart) label_pixels_backward<T, RC, 1>(job, image, k, y, x, apart, scratch);
  hand_on(job, image, k, y, x0, x1);
}

template <typename T>
FC_INLINE V load_lanes(const T* p, const Lanes& lanes) {
  return lanes.whole ? load(p) : load_some(p, lanes.n, 0.0f);
}

template <typename T, int RC>
FC_INLINE void pixel_tile_backward(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x,
                                   const Lanes& lanes, Scratch& scratch) {
  const bool last = k == job.updates;
  const float c = job.unary[k];
  const int64_t plane = job.height * job.width, pixel = y * job.width + lanes.x, first = lanes.x + lanes.from;
  const T* u = tile_of<T>(job, image, y, x);
  float* sums = (float*)image.sums + (u - (const T*)image.tiles);  // of du, as the tiles lie
  int64_t step = kLanes;
  if (c == 0) u = (const T*)job.zeros, step = 0;
  const float* h = image.scores(k, y) + first;
  const float* df = image.grad_f(k, y) + first;
  float* dh = image.grad_h(k, y) + first;
  float *t = scratch.t, *s = scratch.s;
  // lanes of another colour of the board, or outside the row, must add nothing
  I meant = (lane_numbers() >= int32_t(lanes.from)) & (lane_numbers() < int32_t(lanes.from + lanes.n));
  if (job.checkerboard && k > 0 && !last) {
    meant &= ((lane_numbers() + int32_t((y + lanes.x + k + 1) & 1)) & 1) == 0;
  }
  for (int64_t axis = 0; axis < job.axes; ++axis) {
    const Table& table = job.tables[axis];
    V most = {};
    for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
      V at[RC], grad[RC];
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) {
        at[r] = at_lanes(h + (r0 + r) * job.stride, lanes) * kLog2E;
        grad[r] = last ? V{} : at_lanes(df + (r0 + r) * job.stride, lanes);
      }
      most = splat(-kInfinity);
      for (int64_t l = 0; l < table.count; ++l) {
        V x, y;
        if (r0) {
          x = load(t + l * kLanes), y = load(s + l * kLanes);
        } else {
          x = c * kLog2E * load(u + (table.first + l) * step);
          y = last ? load_lanes((const T*)image.grad + (table.first + l) * plane + pixel, lanes) : V{};
        }
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) {
          x += table.a[l * job.rank + r0 + r] * at[r];
          y += table.b[l * job.rank + r0 + r] * grad[r];
        }
        most = maximum(x, most);
        store(t + l * kLanes, x);
        store(s + l * kLanes, y);
      }
    }
    V total = {}, dot = {};
    for (int64_t l = 0; l < table.count; ++l) {
      const V e = exp2_of(load(t + l * kLanes) - most);
      store(t + l * kLanes, e);
      total += e;
      dot += e * load(s + l * kLanes);
    }
    const V inverse = meant ? 1.0f / total : V{}, mean = dot * inverse;
    float* du = image.grad_logits + table.first * plane + y * job.width + first;
    for (int64_t l = 0; l < table.count; ++l, du += plane) {
      const V q = meant ? load(t + l * kLanes) * inverse : V{};
      const V dt = meant ? q * (load(s + l * kLanes) - mean) : V{};
      store(t + l * kLanes, q);
      store(s + l * kLanes, dt);
      float* sum = sums + (table.first + l) * kLanes;
      const V grad = last ? dt * c : load(sum) + dt * c;
      if (k > 0) {
        store(sum, grad);
      } else if (lanes.n < kLanes) {
        store_some(du, grad, lanes.from, lanes.n);
      } else if (job.large) {
        stream(du, grad);
      } else {
        store(du, grad);
      }
    }
    for (int64_t r0 = 0; r0 < job.rank; r0 += RC) {
      V f[RC] = {}, at[RC], grad[RC];
#pragma GCC unroll 4
      for (int r = 0; r < RC; ++r) {
        at[r] = at_lanes(h + (r0 + r) * job.stride, lanes);
        grad[r] = last ? V{} : at_lanes(df + (r0 + r) * job.stride, lanes);
      }
      for (int64_t l = 0; l < table.count; ++l) {
        const V dt = load(s + l * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < RC; ++r) f[r] += dt * table.a[l * job.rank + r0 + r];
        if (!job.factors) continue;
        // sums over pixels stay apart in lanes, and are added up at the end
        const V q = load(t + l * kLanes);
        const int64_t place = (job.table_starts[axis] + l * job.rank + r0) * kLanes;
        for (int r = 0; r < RC; ++r) {
          float *a = scratch.grad_a + place + r * kLanes, *b = scratch.grad_b + place + r * kLanes;
          store(a, load(a) + dt * at[r]);
          store(b, load(b) + q * grad[r]);
        }
      }
      for (int r = 0; r < RC; ++r) {
        float some[kLanes];
        store(some, f[r]);
        float* to = dh + (r0 + r) * job.stride;
        for (int64_t i = 0; i < lanes.n; ++i) to[i] = (axis ? to[i] : 0.0f) + some[lanes.from + i];
      }
    }
  }
}

template <typename T, int RC>
void pixel_row_backward(const Job& job, const Image& image, int64_t k, int64_t y, int64_t x0, int64_t x1,
                        Scratch& scratch) {
  if (k < job.updates) scatter<RC>(job, image, k, y, x0, x1, scratch);
  for (int64_t x = x0; x < x1; x += kLanes) {
    if (k == job.first_read && (x - x0) % (kTiles * kLanes) == 0) fill_tiles<T>(job, image, y, x, x1);
    pixel_tile_backward<T, RC>(job, image, k, y, x, lanes_at(job, x, x1), scratch);
  }
  if (k == 0) streamed();
  hand_on(job, image, k, y, x0, x1);
}

// --- the functions of a problem --------------------------------------------------------------------------------------

template <typename T, int RC>
RowFunction backward_of(bool labels_last) {
  return labels_last ? label_row_backward<T, RC> : pixel_row_backward<T, RC>;
}

inline RowFunction backward_function(Storage storage, bool labels_last, int columns) {
  const bool three = columns == 3;
  switch (storage) {
    case Storage::kFloat16: return three ? backward_of<Float16, 3>(labels_last) : backward_of<Float16, 4>(labels_last);
    case Storage::kBFloat16:
      return three ? backward_of<BFloat16, 3>(labels_last) : backward_of<BFloat16, 4>(labels_last);
    default: return three ? backward_of<float, 3>(labels_last) : backward_of<float, 4>(labels_last);
  }
}

template <int RC, bool kQuadratic>
RowFunction forward_of(Storage storage, bool labels_last) {
  switch (storage) {
    case Storage::kFloat16:
      return labels_last ? label_row<Float16, RC, kQuadratic> : pixel_row<Float16, RC, kQuadratic>;
    case Storage::kBFloat16:
      return labels_last ? label_row<BFloat16, RC, kQuadratic> : pixel_row<BFloat16, RC, kQuadratic>;
    default: return labels_last ? label_row<float, RC, kQuadratic> : pixel_row<float, RC, kQuadratic>;
  }
}

inline RowFunction forward_function(Storage storage, bool labels_last, int columns, bool quadratic) {
  if (columns == 4) return forward_of<4, false>(storage, labels_last);
  return quadratic ? forward_of<3, true>(storage, labels_last) : forward_of<3, false>(storage, labels_last);
}

inline void exponentials(const float* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp2_of(load(x + i)));
  if (i < n) store_some(out + i, exp2_of(load_some(x + i, n - i, 0.0f)), 0, n - i);
}
