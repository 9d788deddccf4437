#include "cpu/mean_field.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "common/lab_math.h"
#include "cpu/multiversion.h"
#include "cpu/vectors.h"

namespace fastcolor::cpu {
namespace {

constexpr int64_t kLarge = 1 << 22;
constexpr int64_t kColumns = 16;  // rows are cut between threads, and padded, in units of the widest vector

// Label tables of one axis, zero where R is rounded up. Labels side by side: [chunks][vectors][RC][lanes], the last
// vector covering the last labels of the axis; pixels side by side: [count][R], colors [count][RC]. Colors begin in the
// second column where the similarity is quadratic.
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
  float annealed_scale;  // log2(e) / T
  float curvature;       // of a quadratic similarity, else 0
  int64_t stride;        // floats from one plane of a row to the next
  int64_t first_read;    // the update whose rows are the first to read the logits; the last one in the backward
  int64_t padded_width;
  bool large;  // marginals: no cache will keep them until they are read
  // backward only
  bool pairs, factors;          // whether gradients of weights and guide, and of A and B, are asked for
  const int64_t* table_starts;  // [axes] of a table in the sums of gradients
};

// What the rows of one image share. A row of H or F is [R, stride], pixel 0 after a margin that stays 0.
struct Image {
  const void* logits;
  const float* guide;  // pixel (0, 0) of rows of `stride` floats
  const float* prior;  // [R, H, W] or null
  float* states;       // pixel 0 of [updates + 1, 2, ring, R, stride]
  int64_t ring, row;   // rows that are kept, floats in one
  char* tiles;         // pixels side by side: copies of logits, [tile_rows, padded_width / lanes, K, lanes]
  int64_t tile_rows;
  void* marginals;
  float* ab;
  // backward only
  const void* grad;
  float *grad_logits, *grad_prior, *grad_guide;
  float* sums;      // of grad_logits, as the tiles lie: planes get them when they are complete
  float* adjoints;  // pixel 0 of [updates + 1, 3, adjoint_ring, R, stride]
  int64_t adjoint_ring;
  float* scores(int64_t k, int64_t y) const { return states + (k * 2 * ring + y % ring) * row; }
  float* features(int64_t k, int64_t y) const { return states + ((k * 2 + 1) * ring + y % ring) * row; }
  float* adjoint(int64_t k, int64_t y, int64_t which) const {
    return adjoints + ((k * 3 + which) * adjoint_ring + y % adjoint_ring) * row;
  }
  float* grad_h(int64_t k, int64_t y) const { return adjoint(k, y, 0); }
  float* grad_g(int64_t k, int64_t y) const { return adjoint(k, y, 1); }  // of what an update gathers
  float* grad_f(int64_t k, int64_t y) const { return adjoint(k, y, 2); }
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
  // backward only
  float* s;                 // as t
  const float** receivers;  // [O] dG of the neighbours
  int64_t* places;          // [O] their offsets
  float* pair_sums;         // [O + 1, lanes] of a run of pixels
  double* grad_pairs;       // [O + 1] dL/dw / w · space of each offset, and dL/dsharpness
  float *grad_a, *grad_b;   // tables
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
  RowFunction (*forward)(Storage, bool labels_last, int columns, bool quadratic);
  RowFunction (*backward)(Storage, bool labels_last, int columns);
  void (*exponentials)(const float*, float*, int64_t);
};

#define FC_KERNELS(level) \
  {level::kLanes, level::kPixels, level::forward_function, level::backward_function, level::exponentials}

const Kernels& kernels() {
#if FC_HAS_MULTIVERSION
  static const Kernels of_avx512 = FC_KERNELS(avx512), of_avx2 = FC_KERNELS(avx2);
  if (simd() == Simd::kAvx512) return of_avx512;
  if (simd() == Simd::kAvx2) return of_avx2;
#endif
  static const Kernels of_baseline = FC_KERNELS(baseline);
  return of_baseline;
}
#undef FC_KERNELS

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Columns of A and B that a pass over the labels takes at once: 3 or 4, whichever wastes less.
int chunk_of(int64_t rank) { return round_up(rank, 3) < round_up(rank, 4) ? 3 : 4; }

// κ where the factors are B = [1, x, y], A = [−κ (x² + y²), 2 κ x, 2 κ y] up to their rounding, else 0. Then the first
// column of B sums up q, one product less, and A H = −κ H₀ |(x, y) − (H₁, H₂) / H₀|² up to a term that all labels
// share: as many products as A H, without its large terms that nearly cancel.
float curvature_of(const MeanFieldProblem& p) {
  if (p.rank != 3 || p.axes != 1) return 0.0f;
  double below = 0, above = 0, most = 0;
  for (int64_t l = 0; l < p.labels; ++l) {
    const float *a = p.a + l * 3, *b = p.b + l * 3;
    above -= a[0];
    below += double(b[1]) * b[1] + double(b[2]) * b[2];
    most = std::max({most, double(std::abs(a[0])), double(std::abs(a[1])), double(std::abs(a[2]))});
  }
  const double curvature = above / below, slack = 4 * std::numeric_limits<float>::epsilon();
  bool quadratic = std::isfinite(curvature);
  for (int64_t l = 0; l < p.labels; ++l) {
    const float *a = p.a + l * 3, *b = p.b + l * 3;
    const double squares = double(b[1]) * b[1] + double(b[2]) * b[2];
    quadratic = quadratic && b[0] == 1.0f && std::abs(a[0] + curvature * squares) <= slack * most &&
                std::abs(a[1] - 2 * curvature * b[1]) <= slack * most &&
                std::abs(a[2] - 2 * curvature * b[2]) <= slack * most;
  }
  return quadratic ? float(curvature) : 0.0f;
}

int64_t updates_of(const MeanFieldProblem& p) { return p.sweeps * (p.checkerboard ? 2 : 1); }

int64_t margin_of(const MeanFieldProblem& p) {
  int64_t most = 0;
  for (int64_t o = 0; o < p.offsets; ++o) most = std::max(most, std::abs(p.dx[o]));
  return most;
}

int64_t stride_of(const MeanFieldProblem& p) { return round_up(p.width + 2 * margin_of(p) + kColumns, kColumns); }

int64_t bytes_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 2; }

// Memory that is written before it is read, from the start of a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(new char[bytes + kLine]) { expect_writes(data(), bytes); }
  char* data() const { return memory_.get() + (kLine - reinterpret_cast<uintptr_t>(memory_.get()) % kLine) % kLine; }

 private:
  static constexpr uintptr_t kLine = 64;
  std::unique_ptr<char[]> memory_;
};

// The label of lane 0 of a vector: the last one covers the last labels.
int64_t first_label(int64_t vector, int64_t count, int64_t lanes) {
  return std::max<int64_t>(0, std::min(vector * lanes, count - lanes));
}

// The tables of a problem, in the order that a kernel reads them.
class Tables {
 public:
  Tables(const MeanFieldProblem& p, const float* colors, int chunk, bool quadratic, int lanes) {
    const int64_t rank = round_up(p.rank, chunk);
    int64_t first = 0;
    for (int64_t axis = 0; axis < p.axes; ++axis) {
      const int64_t count = p.counts[axis];
      Table table{first, count, nullptr, nullptr, nullptr};
      table.a = arrange(p.labels_last, p.a + first * p.rank, p.rank, 0, rank, count, chunk, lanes);
      table.b = arrange(p.labels_last, p.b + first * p.rank, p.rank, 0, rank, count, chunk, lanes);
      if (colors) table.colors = arrange(p.labels_last, colors + first * 2, 2, quadratic, chunk, count, chunk, lanes);
      tables_.push_back(table);
      first += count;
    }
  }
  const Table* data() const { return tables_.data(); }

 private:
  const float* arrange(bool labels_last, const float* from, int64_t columns, int64_t before, int64_t padded,
                       int64_t count, int chunk, int lanes) {
    const int64_t vectors = (count + lanes - 1) / lanes;
    memory_.emplace_back(labels_last ? padded * vectors * lanes : padded * count, 0.0f);
    auto& table = memory_.back();
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t r = before + c;
      if (!labels_last) {
        for (int64_t l = 0; l < count; ++l) table[l * padded + r] = from[l * columns + c];
        continue;
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t start = first_label(v, count, lanes);
        for (int64_t i = 0; i < lanes && start + i < count; ++i) {
          table[((r / chunk * vectors + v) * chunk + r % chunk) * lanes + i] = from[(start + i) * columns + c];
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
  ThreadMemory(const MeanFieldProblem& p, const Kernels& k, int64_t table_floats)
      : neighbors_(p.offsets), receivers_(p.offsets), places_(p.offsets), grad_pairs_(p.offsets + 1) {
    const int64_t tile = (p.labels + kColumns) * std::max(k.lanes, k.pixels), pairs = (p.offsets + 1) * k.lanes;
    floats_.resize(kColumns + 2 * (pairs + tile + table_floats));
    // vectors that straddle two cache lines would cost a load each
    float* next = floats_.data() + (64 - reinterpret_cast<uintptr_t>(floats_.data()) % 64) % 64 / sizeof(float);
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    scratch.t = take(tile);
    scratch.s = take(tile);
    scratch.weights = take(pairs);
    scratch.pair_sums = take(pairs);
    scratch.grad_a = take(table_floats);
    scratch.grad_b = take(table_floats);
    scratch.neighbors = neighbors_.data();
    scratch.receivers = receivers_.data();
    scratch.places = places_.data();
    scratch.grad_pairs = grad_pairs_.data();
  }
  ThreadMemory(const ThreadMemory&) = delete;
  Scratch scratch;

 private:
  std::vector<Neighbor> neighbors_;
  std::vector<const float*> receivers_;
  std::vector<int64_t> places_;
  std::vector<double> grad_pairs_;
  std::vector<float> floats_;
};

// What follows from a problem: tables, sizes, and the order in which rows are visited.
class Plan {
 public:
  Plan(const MeanFieldProblem& problem, const float* colors, float temperature, bool backward = false,
       bool pairs = false, bool factors = false)
      : p(problem),
        kernel(kernels()),
        chunk(chunk_of(p.rank)),
        curvature(curvature_of(p)),
        tables_(p, colors, chunk, curvature != 0, kernel.lanes),
        zeros_(p.labels + kColumns),
        updates(updates_of(p)),
        margin(margin_of(p)),
        stride(stride_of(p)),
        row(round_up(p.rank, chunk) * stride),
        unary_(updates + 1, p.uniform ? 0.0f : 1.0f) {
    const int64_t boards = p.checkerboard ? 2 : 1;
    for (int64_t k = 1; k <= updates; ++k) {
      unary_[k] = (1.0f - p.damping) + p.damping * unary_[(k - 1) / boards * boards];
    }
    for (int64_t o = 0; o < p.offsets; ++o) reach = std::max(reach, std::abs(p.dy[o]));
    ring = std::min(p.height, 2 * reach + 2);
    tile_rows = std::min(p.height, updates * (reach + 1) + 1);
    if (factors) {
      for (int64_t axis = 0; axis < p.axes; ++axis) {
        starts_.push_back(table_floats);
        const int64_t count = p.labels_last ? round_up(p.counts[axis], kernel.lanes) : p.counts[axis] * kernel.lanes;
        // the kernel for pixels side by side counts in labels, and keeps a vector of sums for each entry
        table_floats += count * (row / stride);
      }
      if (!p.labels_last) for (auto& start : starts_) start /= kernel.lanes;
    }
    const bool large = p.batch * p.labels * p.height * p.width * bytes_of(p.storage) >= kLarge;
    job = Job{zeros_.data(),  p.labels,   p.height,       p.width,  p.axes,
              tables_.data(), row / stride, p.rank,       p.offsets, p.dy,
              p.dx,           p.space,    p.sharpness,    p.damping, p.checkerboard,
              updates,        unary_.data(), kLog2E / temperature, curvature, stride,
              backward ? updates : int64_t(p.uniform), round_up(p.width, kColumns), large, pairs, factors,
              starts_.data()};
    // Whole images to each thread where they are many, else the columns of one.
    const int64_t blocks = (p.width + kColumns - 1) / kColumns;
    by_image_ = p.threads == 1 || p.batch % p.threads == 0 || p.batch >= 4 * p.threads;
    threads = int(std::min<int64_t>(p.threads, by_image_ ? p.batch : blocks));
    teams = by_image_ ? threads : 1;
    for (int t = 0; t < threads; ++t) memory.push_back(std::make_unique<ThreadMemory>(p, kernel, table_floats));
    guides_.resize(teams * p.height * stride);
  }
  Plan(const Plan&) = delete;

  // Visits all rows of all images for all updates. Update k of a row follows update k - 1 of the rows within reach: all
  // updates pass over the image together, `lag` rows apart, so that logits come from memory once and then from the
  // cache. `image_of(n, team, guide)` makes the n-th image.
  template <typename ImageOf>
  void visit(RowFunction function, bool backward, ImageOf image_of) {
    const int64_t lag = reach + 1, steps = p.height + updates * lag;
    const auto step = [&](const Image& image, int64_t at, int64_t x0, int64_t x1, Scratch& scratch) {
      for (int64_t i = 0; i <= updates; ++i) {
        const int64_t y = at - i * lag;
        if (y >= 0 && y < p.height && x0 < x1) {
          function(job, image, backward ? updates - i : i, y, x0, x1, scratch);
        }
      }
    };
    // threads == 1 must not enter OpenMP: a forked data-loader worker would hang in it
    if (by_image_) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
      for (int t = 0; t < threads; ++t) {
        for (int64_t n = p.batch * t / threads; n < p.batch * (t + 1) / threads; ++n) {
          const Image image = image_of(n, t, guide_of(n, t));
          for (int64_t at = 0; at < steps; ++at) step(image, at, 0, p.width, memory[t]->scratch);
        }
      }
      return;
    }
    const int64_t blocks = (p.width + kColumns - 1) / kColumns;
    for (int64_t n = 0; n < p.batch; ++n) {
      const Image image = image_of(n, int64_t(0), guide_of(n, 0));
#pragma omp parallel num_threads(threads) if (threads > 1)
      for (int64_t at = 0; at < steps; ++at) {
#pragma omp for schedule(static)
        for (int t = 0; t < threads; ++t) {
          const int64_t x0 = blocks * t / threads * kColumns;
          const int64_t x1 = std::min(p.width, blocks * (t + 1) / threads * kColumns);
          step(image, at, x0, x1, memory[t]->scratch);
        }
      }
    }
  }

  // Adds sums in the order of the tables to [K, R].
  void add_tables(const float* sums, float* to) const {
    const int64_t rank = row / stride, lanes = kernel.lanes;
    for (int64_t axis = 0; axis < p.axes; ++axis) {
      const auto [first, count] = std::pair(job.tables[axis].first, job.tables[axis].count);
      const int64_t vectors = (count + lanes - 1) / lanes;
      for (int64_t r = 0; r < p.rank; ++r) {
        for (int64_t v = 0; p.labels_last && v < vectors; ++v) {
          const float* from = sums + job.table_starts[axis] + ((r / chunk * vectors + v) * chunk + r % chunk) * lanes;
          const int64_t start = first_label(v, count, lanes);
          for (int64_t i = 0; i < lanes && start + i < count; ++i) to[(first + start + i) * p.rank + r] += from[i];
        }
        for (int64_t l = 0; !p.labels_last && l < count; ++l) {
          const float* from = sums + (job.table_starts[axis] + l * rank + r) * lanes;
          for (int64_t i = 0; i < lanes; ++i) to[(first + l) * p.rank + r] += from[i];
        }
      }
    }
  }

 private:
  // A copy of the guide with margins.
  const float* guide_of(int64_t n, int64_t team) {
    float* guide = guides_.data() + team * p.height * stride + margin;
    for (int64_t y = 0; y < p.height; ++y) {
      std::copy_n(p.guide + (n * p.height + y) * p.width, p.width, guide + y * stride);
    }
    return guide;
  }

 public:
  const MeanFieldProblem& p;
  const Kernels& kernel;
  const int chunk;
  const float curvature;

 private:
  const Tables tables_;
  const std::vector<float> zeros_;

 public:
  const int64_t updates, margin, stride, row;
  int64_t reach = 0, ring = 1, tile_rows = 1, table_floats = 0, teams = 1;
  int threads = 1;
  Job job;
  std::vector<std::unique_ptr<ThreadMemory>> memory;

 private:
  std::vector<float> unary_, guides_;
  std::vector<int64_t> starts_;
  bool by_image_ = true;
};

}  // namespace

int64_t mean_field_state_size(const MeanFieldProblem& p) {
  return p.batch * (updates_of(p) + 1) * 2 * p.height * round_up(p.rank, chunk_of(p.rank)) * stride_of(p);
}

void mean_field(const MeanFieldProblem& p, void* marginals, const float* colors, float temperature, float* ab,
                float* states) {
  const int64_t pixels = p.height * p.width;
  if (p.batch * pixels == 0) return;
  Plan plan(p, colors, temperature);
  const int64_t ring = states ? p.height : plan.ring, state = (plan.updates + 1) * 2 * ring * plan.row;
  std::vector<float> rings(states ? 0 : plan.teams * state);
  const int64_t image_bytes = p.labels * pixels * bytes_of(p.storage);
  const int64_t row_bytes = plan.job.padded_width * p.labels * bytes_of(p.storage);
  const int64_t tile_bytes = p.labels_last ? 0 : plan.tile_rows * row_bytes;
  const Buffer tiles(plan.teams * tile_bytes);
  if (marginals) expect_writes(marginals, p.batch * image_bytes);
  plan.visit(plan.kernel.forward(p.storage, p.labels_last, plan.chunk, plan.curvature != 0), false,
             [&](int64_t n, int64_t team, const float* guide) {
               Image image{};
               image.logits = static_cast<const char*>(p.logits) + n * image_bytes;
               image.guide = guide;
               image.prior = p.prior ? p.prior + n * p.rank * pixels : nullptr;
               image.states = (states ? states + n * state : rings.data() + team * state) + plan.margin;
               image.ring = ring;
               image.row = plan.row;
               image.tiles = tiles.data() + team * tile_bytes;
               image.tile_rows = plan.tile_rows;
               image.marginals = marginals ? static_cast<char*>(marginals) + n * image_bytes : nullptr;
               image.ab = ab ? ab + n * 2 * pixels : nullptr;
               return image;
             });
}

void mean_field_backward(const MeanFieldProblem& p, const void* grad, const float* states,
                         const MeanFieldGradients& to) {
  const int64_t pixels = p.height * p.width;
  if (p.batch * pixels == 0) return;
  Plan plan(p, nullptr, 1.0f, true, to.guide != nullptr, to.a != nullptr);
  const int64_t state = (plan.updates + 1) * 2 * p.height * plan.row;
  const int64_t adjoint = (plan.updates + 1) * 3 * plan.ring * plan.row;
  std::vector<float> adjoints(plan.teams * adjoint);
  const int64_t image_bytes = p.labels * pixels * bytes_of(p.storage);
  const int64_t tile_size = p.labels_last ? 0 : plan.tile_rows * plan.job.padded_width * p.labels;
  const Buffer tiles(plan.teams * tile_size * bytes_of(p.storage)), sums(plan.teams * tile_size * 4);
  expect_writes(to.logits, p.batch * p.labels * pixels * 4);
  plan.visit(plan.kernel.backward(p.storage, p.labels_last, plan.chunk), true,
             [&](int64_t n, int64_t team, const float* guide) {
               Image image{};
               image.logits = static_cast<const char*>(p.logits) + n * image_bytes;
               image.guide = guide;
               image.states = const_cast<float*>(states) + n * state + plan.margin;  // the backward only reads them
               image.ring = p.height;
               image.row = plan.row;
               image.tiles = tiles.data() + team * tile_size * bytes_of(p.storage);
               image.tile_rows = plan.tile_rows;
               image.sums = reinterpret_cast<float*>(sums.data()) + team * tile_size;
               image.grad = static_cast<const char*>(grad) + n * image_bytes;
               image.grad_logits = to.logits + n * p.labels * pixels;
               image.grad_prior = to.prior ? to.prior + n * p.rank * pixels : nullptr;
               image.grad_guide = to.guide ? to.guide + n * pixels : nullptr;
               image.adjoints = adjoints.data() + team * adjoint + plan.margin;
               image.adjoint_ring = plan.ring;
               return image;
             });
  for (const auto& thread : plan.memory) {
    const Scratch& scratch = thread->scratch;
    for (int64_t o = 0; to.guide && o < p.offsets; ++o) to.space[o] += float(scratch.grad_pairs[o]);
    if (to.guide) *to.sharpness += float(scratch.grad_pairs[p.offsets]);
    if (to.a) {
      plan.add_tables(scratch.grad_a, to.a);
      plan.add_tables(scratch.grad_b, to.b);
    }
  }
}

void exp2_of(const float* x, float* out, int64_t n) { kernels().exponentials(x, out, n); }

}  // namespace fastcolor::cpu
