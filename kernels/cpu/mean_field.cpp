#include "cpu/mean_field.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/lab_math.h"
#include "cpu/multiversion.h"

#if FC_HAS_MULTIVERSION
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of _mm512_undefined_ps in the header of GCC 12
#endif

namespace fastcolor::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896f;
constexpr int64_t kColumns = 16;  // rows are cut between threads, and padded, in units of the widest vector

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Label tables of one axis, zero where R is rounded up. Labels side by side: [chunks][vectors][RC][lanes], the last
// vector covering the last labels of the axis; pixels side by side: [count][R], colors [count][RC].
struct Table {
  int64_t first, count;
  const float *a, *b, *colors;
};

// What all rows share.
struct Job {
  const void* zeros;  // as many as labels
  int64_t labels, height, width;
  int64_t axes;
  const Table* tables;
  int64_t rank, prior_rank;  // R rounded up to whole chunks, and R
  int64_t offsets;
  const int64_t *dy, *dx;
  const float* space;
  float sharpness, damping;
  bool checkerboard;
  int64_t updates;       // k = 0 is the start
  const float* unary;    // [updates + 1], scores are t = unary · u + A H
  float annealed_scale2;  // log2(e) / T
  int64_t stride;        // floats from one plane of a row to the next
};

// What the rows of one image share. A row of H or F is [R, stride], pixel 0 after a margin that stays 0.
struct Image {
  const void* logits;
  const float* guide;  // pixel (0, 0) of rows of `stride` floats
  const float* prior;  // [R, H, W] or null
  float* states;       // pixel 0 of [updates + 1, 2, ring, R, stride]
  int64_t ring, row;   // rows that are kept, floats in one
  void* marginals;
  float* ab;
  float* scores(int64_t k, int64_t y) const { return states + (k * 2 * ring + y % ring) * row; }
  float* features(int64_t k, int64_t y) const { return states + ((k * 2 + 1) * ring + y % ring) * row; }
};

struct Neighbor {
  const float *features, *guide;
  float space;
};

// Of one thread.
struct Scratch {
  Neighbor* neighbors;  // [O]
  float* weights;       // [O, lanes]
  float* t;             // scores of a few pixels
};

using RowFunction = void (*)(const Job&, const Image&, int64_t k, int64_t y, int64_t x0, int64_t x1, Scratch&);

// The same code for each instruction set. Not target_clones: widths of vectors are types here.
namespace baseline {
#define FC_LANES 4
#include "cpu/simd_body.h"
#include "cpu/mean_field_body.h"
#undef FC_LANES
}  // namespace baseline

#if FC_HAS_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define FC_LANES 8
#include "cpu/simd_body.h"
#include "cpu/mean_field_body.h"
#undef FC_LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define FC_LANES 16
#include "cpu/simd_body.h"
#include "cpu/mean_field_body.h"
#undef FC_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Kernels {
  int lanes, pixels;
  RowFunction (*row)(Storage, bool, int);
  void (*exponentials)(const float*, float, float*, int64_t);
};

const Kernels& kernels() {
  static const Kernels chosen = [] {
#if FC_HAS_MULTIVERSION
    if (__builtin_cpu_supports("x86-64-v4")) {
      return Kernels{avx512::kLanes, avx512::kPixels, avx512::row_function, avx512::exponentials};
    }
    if (__builtin_cpu_supports("x86-64-v3")) {
      return Kernels{avx2::kLanes, avx2::kPixels, avx2::row_function, avx2::exponentials};
    }
#endif
    return Kernels{baseline::kLanes, baseline::kPixels, baseline::row_function, baseline::exponentials};
  }();
  return chosen;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Columns of A and B that a pass over the labels takes at once: 3 or 4, whichever wastes less.
int chunk_of(int64_t rank) { return round_up(rank, 3) < round_up(rank, 4) ? 3 : 4; }

int64_t updates_of(const MeanFieldProblem& p) { return p.sweeps * (p.checkerboard ? 2 : 1); }

int64_t margin_of(const MeanFieldProblem& p) {
  int64_t most = 0;
  for (int64_t o = 0; o < p.offsets; ++o) most = std::max(most, std::abs(p.dx[o]));
  return most;
}

int64_t stride_of(const MeanFieldProblem& p) { return round_up(p.width + 2 * margin_of(p) + kColumns, kColumns); }

int64_t bytes_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 2; }

// The tables of a problem, in the order that a kernel reads them.
class Tables {
 public:
  Tables(const MeanFieldProblem& p, const float* colors, int chunk, int lanes) {
    const int64_t rank = round_up(p.rank, chunk);
    int64_t first = 0;
    for (int64_t axis = 0; axis < p.axes; ++axis) {
      const int64_t count = p.counts[axis];
      Table table{first, count, nullptr, nullptr, nullptr};
      table.a = arrange(p.labels_last, p.a + first * p.rank, p.rank, rank, count, chunk, lanes);
      table.b = arrange(p.labels_last, p.b + first * p.rank, p.rank, rank, count, chunk, lanes);
      if (colors) table.colors = arrange(p.labels_last, colors + first * 2, 2, chunk, count, chunk, lanes);
      tables_.push_back(table);
      first += count;
    }
  }
  const Table* data() const { return tables_.data(); }

 private:
  const float* arrange(bool labels_last, const float* from, int64_t columns, int64_t padded, int64_t count, int chunk,
                       int lanes) {
    const int64_t vectors = (count + lanes - 1) / lanes;
    memory_.emplace_back(labels_last ? padded * vectors * lanes : padded * count, 0.0f);
    auto& table = memory_.back();
    for (int64_t r = 0; r < columns; ++r) {
      if (!labels_last) {
        for (int64_t l = 0; l < count; ++l) table[l * padded + r] = from[l * columns + r];
        continue;
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t start = std::max<int64_t>(0, std::min(v * lanes, count - lanes));
        for (int64_t i = 0; i < lanes && start + i < count; ++i) {
          table[((r / chunk * vectors + v) * chunk + r % chunk) * lanes + i] = from[(start + i) * columns + r];
        }
      }
    }
    return table.data();
  }
  std::vector<Table> tables_;
  std::vector<std::vector<float>> memory_;
};

class ThreadMemory {
 public:
  ThreadMemory(const MeanFieldProblem& p, const Kernels& k)
      : neighbors_(p.offsets),
        floats_(kColumns + p.offsets * k.lanes + (p.labels + kColumns) * std::max(k.lanes, k.pixels)) {
    // vectors that straddle two cache lines would cost a load each
    float* aligned = floats_.data() + (64 - reinterpret_cast<uintptr_t>(floats_.data()) % 64) % 64 / sizeof(float);
    scratch = {neighbors_.data(), aligned, aligned + p.offsets * k.lanes};
  }
  Scratch scratch;

 private:
  std::vector<Neighbor> neighbors_;
  std::vector<float> floats_;
};

}  // namespace

int64_t mean_field_state_size(const MeanFieldProblem& p) {
  return p.batch * (updates_of(p) + 1) * 2 * p.height * round_up(p.rank, chunk_of(p.rank)) * stride_of(p);
}

void mean_field(const MeanFieldProblem& p, void* marginals, const float* colors, float temperature, float* ab,
                float* states) {
  const int64_t pixels = p.height * p.width;
  if (p.batch * pixels == 0) return;
  const Kernels& kernel = kernels();
  const int chunk = chunk_of(p.rank);
  const Tables tables(p, colors, chunk, kernel.lanes);
  const std::vector<float> zeros(p.labels + kColumns);
  const int64_t updates = updates_of(p), margin = margin_of(p), stride = stride_of(p);
  std::vector<float> unary(updates + 1, p.uniform ? 0.0f : 1.0f);
  for (int64_t k = 1; k <= updates; ++k) {
    const int64_t boards = p.checkerboard ? 2 : 1, sweep_before = (k - 1) / boards * boards;
    unary[k] = (1.0f - p.damping) + p.damping * unary[sweep_before];
  }
  int64_t reach = 0;
  for (int64_t o = 0; o < p.offsets; ++o) reach = std::max(reach, std::abs(p.dy[o]));
  const int64_t rank = round_up(p.rank, chunk);
  const Job job{
      zeros.data(), p.labels,    p.height,  p.width,       p.axes,  tables.data(),          rank,         p.rank,
      p.offsets,    p.dy,        p.dx,      p.space,       p.sharpness, p.damping, p.checkerboard, updates, unary.data(),
      kLog2E / temperature, stride,
  };
  const RowFunction row = kernel.row(p.storage, p.labels_last, chunk);

  // Update k of a row follows update k - 1 of the rows within reach: all updates pass over the image together, `lag` rows
  // apart, so that logits come from memory once and then from the cache.
  const int64_t lag = reach + 1;
  const int64_t ring = states ? p.height : std::min(p.height, 2 * reach + 2);
  const int64_t state = (updates + 1) * 2 * ring * rank * stride;

  // Whole images to each thread where they are many, else the columns of one.
  const int64_t blocks = (p.width + kColumns - 1) / kColumns;
  const bool by_image = p.threads == 1 || p.batch % p.threads == 0 || p.batch >= 4 * p.threads;
  const int threads = int(std::min<int64_t>(p.threads, by_image ? p.batch : blocks));
  const int64_t teams = by_image ? threads : 1;
  std::vector<float> rings(states ? 0 : teams * state), guides(teams * p.height * stride);
  std::vector<std::unique_ptr<ThreadMemory>> memory;
  for (int t = 0; t < threads; ++t) memory.push_back(std::make_unique<ThreadMemory>(p, kernel));

  const auto image_of = [&](int64_t n, int64_t team) {
    float* guide = guides.data() + team * p.height * stride + margin;
    for (int64_t y = 0; y < p.height; ++y) {
      std::copy_n(p.guide + (n * p.height + y) * p.width, p.width, guide + y * stride);
    }
    const int64_t plane = p.labels * pixels * bytes_of(p.storage);
    return Image{static_cast<const char*>(p.logits) + n * plane,
                 guide,
                 p.prior ? p.prior + n * p.rank * pixels : nullptr,
                 (states ? states + n * state : rings.data() + team * state) + margin,
                 ring,
                 rank * stride,
                 marginals ? static_cast<char*>(marginals) + n * plane : nullptr,
                 ab ? ab + n * 2 * pixels : nullptr};
  };
  const auto step = [&](const Image& image, int64_t at, int64_t x0, int64_t x1, Scratch& scratch) {
    for (int64_t k = 0; k <= updates; ++k) {
      const int64_t y = at - k * lag;
      if (y >= 0 && y < p.height && x0 < x1) row(job, image, k, y, x0, x1, scratch);
    }
  };
  const int64_t steps = p.height + updates * lag;

  // threads == 1 must not enter OpenMP: a forked data-loader worker would hang in it
  if (by_image) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < threads; ++t) {
      for (int64_t n = p.batch * t / threads; n < p.batch * (t + 1) / threads; ++n) {
        const Image image = image_of(n, t);
        for (int64_t at = 0; at < steps; ++at) step(image, at, 0, p.width, memory[t]->scratch);
      }
    }
    return;
  }
  for (int64_t n = 0; n < p.batch; ++n) {
    const Image image = image_of(n, 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < steps; ++at) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < threads; ++t) {
        const int64_t x0 = blocks * t / threads * kColumns;
        const int64_t x1 = std::min(p.width, blocks * (t + 1) / threads * kColumns);
        step(image, at, x0, x1, memory[t]->scratch);
      }
    }
  }
}

void exp_scaled(const float* x, float scale, float* out, int64_t n) { kernels().exponentials(x, scale, out, n); }

}  // namespace fastcolor::cpu
