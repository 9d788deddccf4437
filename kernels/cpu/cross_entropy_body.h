// Blocks of pixels of the cross-entropy. No include guard: see simd_body.h.

constexpr int kRows = kLanes == 16 ? 4 : 2;     // pixels at a time, SIMD over labels
constexpr int kColumns = kBlock / kLanes;       // vectors of a row of pixels
constexpr int kGroup = kLanes == 16 ? 4 : 2;    // exponentials side by side: one alone is a long chain of operations

FC_INLINE I lane_numbers() {
  I lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

FC_INLINE float one(const float* p) { return *p; }
FC_INLINE float one(const BFloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
FC_INLINE float one(const Float16* p) { return load_some(p, 1, 0.0f)[0]; }

// p of the soft-encoding from the squared distances [neighbors, kBlock], in their place.
inline void soft_encode(float* squared, int64_t neighbors, float sharpness) {
  const V scale = splat(-kLog2E * sharpness);
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const V nearest = load(squared + i);
    V total = {};
    for (int64_t j = 0; j < neighbors; ++j) {
      const V e = exp2_of((load(squared + j * kBlock + i) - nearest) * scale);
      store(squared + j * kBlock + i, e);
      total += e;
    }
    for (int64_t j = 0; j < neighbors; ++j) store(squared + j * kBlock + i, load(squared + j * kBlock + i) / total);
  }
}

// n numbers to memory, past the caches where that pays.
template <typename T>
FC_INLINE void write_out(const float* from, T* to, int64_t n, bool large) {
  int64_t i = 0;
  if (large && kStreams<T>) {
    constexpr int64_t kLine = sizeof(V) / sizeof(T);
    const int64_t ahead = (kLine - int64_t(reinterpret_cast<uintptr_t>(to) / sizeof(T)) % kLine) % kLine;
    if (ahead <= n) {
      store_some(to, load_some(from, ahead, 0.0f), 0, ahead);
      for (i = ahead; i + kLanes <= n; i += kLanes) stream(to + i, load(from + i));
    }
  }
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_some(to + i, load_some(from + i, n - i, 0.0f), 0, n - i);
}

// --- labels side by side: SIMD over labels ---------------------------------------------------------------------------

// One axis of P pixels: e = 2^((u − max u) log2 e) in `t` [P, job.labels] if it is to be kept, and what the loss is
// made of. The last vector covers the last kLanes labels; those that a vector before it has too do not count there.
template <typename T, int P, bool kKeep>
FC_INLINE void label_rows(const Job& job, const T* u, const Axis& axis, int64_t pixel, float* t) {
  const int64_t count = job.count, whole = count / kLanes, rest = count % kLanes, tail = count - kLanes;
  V most[P], total[P] = {};
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) most[p] = splat(-kInfinity);
  for (int64_t v = 0; v < whole; ++v) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) most[p] = maximum(load(u + p * job.labels + v * kLanes), most[p]);
  }
  if (rest) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const T* last = u + p * job.labels;
      most[p] = maximum(whole ? load(last + tail) : load_some(last, count, -kInfinity), most[p]);
    }
  }
  float highest[P], sum_of[P];
  largests(most, highest);
  for (int64_t v = 0; v < whole; ++v) {
    V e[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) e[p] = (load(u + p * job.labels + v * kLanes) - highest[p]) * kLog2E;
    exp2_of(e);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if (kKeep) store(t + p * job.labels + v * kLanes, e[p]);
      total[p] += e[p];
    }
  }
  if (rest) {
    const I counted = whole ? lane_numbers() >= int32_t(kLanes - rest) : lane_numbers() < int32_t(rest);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const T* last = u + p * job.labels;
      const V x = whole ? load(last + tail) : load_some(last, count, -kInfinity);
      const V e = exp2_of((x - highest[p]) * kLog2E);
      total[p] += counted ? e : V{};
      if (!kKeep) continue;
      if (whole) {
        store(t + p * job.labels + tail, e);
      } else {
        store_some(t + p * job.labels, e, 0, count);
      }
    }
  }
  sums(total, sum_of);
  for (int p = 0; p < P; ++p) {
    const int64_t i = pixel + p;
    float below = 0.0f;
    for (int64_t j = 0; j < job.neighbors; ++j) {
      const int32_t l = axis.index[j * kBlock + i];
      const float share = axis.share[j * kBlock + i];
      below += share * (highest[p] - one(u + p * job.labels + l));
      if (kKeep) t[p * job.labels + l] -= share * sum_of[p];
    }
    axis.below[i] = below;
    axis.total[i] = sum_of[p];
    if (!kKeep) continue;
    const V scale = splat(axis.factor[i] / sum_of[p]);
    float* row = t + p * job.labels;
    if (!whole) {
      store_some(row, load_some(row, count, 0.0f) * scale, 0, count);
      continue;
    }
    const V last = load(row + tail) * scale;  // before a part of it is scaled
    for (int64_t v = 0; v < whole; ++v) store(row + v * kLanes, load(row + v * kLanes) * scale);
    if (rest) store(row + tail, last);
  }
}

template <typename T, bool kKeep>
void label_block(const Job& job, const Block& block, float* tile) {
  const T* logits = static_cast<const T*>(job.logits) + (block.image * job.pixels + block.first) * job.labels;
  T* grad = static_cast<T*>(job.grad) + (block.image * job.pixels + block.first) * job.labels;
  for (int64_t first = 0; first < block.n; first += kTile) {
    const int64_t n = block.n - first < kTile ? block.n - first : kTile;
    for (int64_t a = 0; a < job.axes; ++a) {
      const T* u = logits + first * job.labels + a * job.count;
      float* t = tile + a * job.count;
      int64_t i = 0;
      for (; i + kRows <= n; i += kRows) {
        label_rows<T, kRows, kKeep>(job, u + i * job.labels, block.axes[a], first + i, t + i * job.labels);
      }
      for (; i < n; ++i) {
        label_rows<T, 1, kKeep>(job, u + i * job.labels, block.axes[a], first + i, t + i * job.labels);
      }
    }
    if (!kKeep) continue;
    for (int64_t i = 0; block.ignore && i < n; ++i) {
      if (block.ignore[first + i]) memset(tile + i * job.labels, 0, sizeof(float) * job.labels);
    }
    write_out(tile, grad + first * job.labels, n * job.labels, job.large);
  }
}

// --- pixels side by side: SIMD over pixels ---------------------------------------------------------------------------

template <typename T, bool kKeep>
void pixel_block(const Job& job, const Block& block, float* tile) {  // [K, kBlock]
  const T* logits = static_cast<const T*>(job.logits) + block.image * job.labels * job.pixels + block.first;
  T* grad = static_cast<T*>(job.grad) + block.image * job.labels * job.pixels + block.first;
  const bool full = block.n == kBlock;
  for (int64_t a = 0; a < job.axes; ++a) {
    const Axis& axis = block.axes[a];
    const T* u = logits + a * job.count * job.pixels;
    float* t = tile + a * job.count * kBlock;
    V most[kColumns];
    for (int c = 0; c < kColumns; ++c) most[c] = splat(-kInfinity);
    for (int64_t l = 0; l < job.count; ++l) {
      const T* row = u + l * job.pixels;
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        const int64_t left = block.n - c * kLanes;
        const V x = full || left >= kLanes ? load(row + c * kLanes)
                                           : load_some(row + c * kLanes, left > 0 ? left : 0, 0.0f);
        store(t + l * kBlock + c * kLanes, x);
        most[c] = maximum(x, most[c]);
      }
    }
    for (int64_t i = 0; i < block.n; ++i) {
      const float highest = most[i / kLanes][i % kLanes];
      float below = 0.0f;
      for (int64_t j = 0; j < job.neighbors; ++j) {
        below += axis.share[j * kBlock + i] * (highest - t[axis.index[j * kBlock + i] * kBlock + i]);
      }
      axis.below[i] = below;
    }
    for (int c = 0; c < kColumns; c += kGroup) {
      V total[kGroup] = {};
      for (int64_t l = 0; l < job.count; ++l) {
        float* at = t + l * kBlock + c * kLanes;
        __builtin_prefetch(u + l * job.pixels + kBlock + c * kLanes);  // of the next block
        V e[kGroup];
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) e[g] = (load(at + g * kLanes) - most[c + g]) * kLog2E;
        exp2_of(e);
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) {
          if (kKeep) store(at + g * kLanes, e[g]);
          total[g] += e[g];
        }
      }
      for (int g = 0; g < kGroup; ++g) store(axis.total + (c + g) * kLanes, total[g]);
    }
    if (!kKeep) continue;
    for (int64_t i = 0; i < block.n; ++i) {
      for (int64_t j = 0; j < job.neighbors; ++j) {
        t[axis.index[j * kBlock + i] * kBlock + i] -= axis.share[j * kBlock + i] * axis.total[i];
      }
    }
    V scale[kColumns];
    I kept[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      scale[c] = load(axis.factor + c * kLanes) / load(axis.total + c * kLanes);
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = c * kLanes + i;
        kept[c][i] = block.ignore && at < block.n && block.ignore[at] ? 0 : -1;
      }
    }
    T* to = grad + a * job.count * job.pixels;
    for (int64_t l = 0; l < job.count; ++l) {
      float* at = t + l * kBlock;
      T* row = to + l * job.pixels;
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        const V g = load(at + c * kLanes) * scale[c];
        const V x = kept[c] ? g : V{};  // not a product with 0, which keeps nan
        const int64_t left = block.n - c * kLanes;
        if (full || left >= kLanes) {
          if (job.large) {
            stream(row + c * kLanes, x);
          } else {
            store(row + c * kLanes, x);
          }
        } else if (left > 0) {
          store_some(row + c * kLanes, x, 0, left);
        }
      }
    }
  }
}

template <typename T>
BlockFunction block_of(bool labels_last, bool keep) {
  if (labels_last) return keep ? label_block<T, true> : label_block<T, false>;
  return keep ? pixel_block<T, true> : pixel_block<T, false>;
}

inline BlockFunction block_function(Storage storage, bool labels_last, bool keep) {
  switch (storage) {
    case Storage::kFloat16: return block_of<Float16>(labels_last, keep);
    case Storage::kBFloat16: return block_of<BFloat16>(labels_last, keep);
    default: return block_of<float>(labels_last, keep);
  }
}

inline void finish_writes() { streamed(); }
