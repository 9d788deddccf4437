#include "cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/lab_math.h"
#include "cpu/multiversion.h"
#include "cpu/vectors.h"

namespace fastcolor::cpu {
namespace {

constexpr int64_t kBlock = 64;        // pixels whose targets are looked up together, and a row of the tile of planes
constexpr int64_t kTile = 16;         // pixels of the tile where labels lie side by side: it stays in the first cache
constexpr int64_t kLarge = 1 << 22;   // bytes of gradients that no cache will keep until they are read

// What all blocks share.
struct Job {
  const void* logits;
  void* grad;
  int64_t labels, axes, count;  // K, and the labels of each axis
  int64_t pixels, neighbors;
  bool large;
};

// One axis of labels of a block of pixels.
struct Axis {
  const int32_t* index;  // [neighbors, kBlock]
  const float* share;    // [neighbors, kBlock] p of the labels at `index`
  const float* factor;   // [kBlock] of the gradient
  float* below;          // [kBlock] Σ p (max u − u)
  float* total;          // [kBlock] Σ exp(u − max u)
};

struct Block {
  int64_t image, first, n;
  const uint8_t* ignore;  // [n] or null
  Axis axes[2];
};

using BlockFunction = void (*)(const Job&, const Block&, float* tile);

// The same code for each instruction set. Not target_clones: widths of vectors are types here.
namespace baseline {
#define FC_LANES 4
#include "cpu/simd_body.h"
#include "cpu/cross_entropy_body.h"
#undef FC_LANES
}  // namespace baseline

#if FC_HAS_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define FC_LANES 8
#include "cpu/simd_body.h"
#include "cpu/cross_entropy_body.h"
#undef FC_LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define FC_LANES 16
#include "cpu/simd_body.h"
#include "cpu/cross_entropy_body.h"
#undef FC_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Kernels {
  BlockFunction (*block)(Storage, bool labels_last, bool keep);
  void (*encode)(float* squared, int64_t neighbors, float sharpness);
  void (*finish)();
};

const Kernels& kernels() {
#if FC_HAS_MULTIVERSION
  static const Kernels of_avx512{avx512::block_function, avx512::soft_encode, avx512::finish_writes};
  static const Kernels of_avx2{avx2::block_function, avx2::soft_encode, avx2::finish_writes};
  if (simd() == Simd::kAvx512) return of_avx512;
  if (simd() == Simd::kAvx2) return of_avx2;
#endif
  static const Kernels of_baseline{baseline::block_function, baseline::soft_encode, baseline::finish_writes};
  return of_baseline;
}

// Of one thread.
struct Scratch {
  std::vector<int32_t> index;
  std::vector<float> floats;
  float *share, *factor, *below, *total, *tile;
  Scratch(const CrossEntropyProblem& p, int64_t tile_floats)
      : index(p.tables.axes * p.neighbors * kBlock),
        floats(p.tables.axes * (p.neighbors + 3) * kBlock + tile_floats + 16) {
    const int64_t axes = p.tables.axes;
    share = floats.data() + (64 - reinterpret_cast<uintptr_t>(floats.data()) % 64) % 64 / sizeof(float);
    factor = share + axes * p.neighbors * kBlock;
    below = factor + axes * kBlock;
    total = below + axes * kBlock;
    tile = total + axes * kBlock;
  }
};

// Looks up the targets of a block: its axes.
void look_up(const CrossEntropyProblem& p, const Kernels& kernel, float scale, Block& block, Scratch& scratch) {
  const float* ab = p.ab + block.image * 2 * p.pixels + block.first;
  for (int64_t a = 0; a < p.tables.axes; ++a) {
    int32_t* index = scratch.index.data() + a * p.neighbors * kBlock;
    float *share = scratch.share + a * p.neighbors * kBlock, *factor = scratch.factor + a * kBlock;
    nearest(p.tables, a, p.neighbors, {ab, ab + p.pixels, 1}, block.n, index, share, kBlock);
    kernel.encode(share, p.neighbors, p.sharpness);
    for (int64_t i = 0; i < block.n; ++i) {
      factor[i] = scale * (p.weights ? p.weights[a * p.tables.count + index[i]] : 1.0f);
      if (p.upstream) factor[i] *= p.upstream[block.image * p.pixels + block.first + i];
    }
    block.axes[a] = {index, share, factor, scratch.below + a * kBlock, scratch.total + a * kBlock};
  }
}

// The losses of a block, written where they are asked for, and their sum.
double losses_of(const CrossEntropyProblem& p, const Block& block, float* losses) {
  double sum = 0.0;
  for (int64_t i = 0; i < block.n; ++i) {
    float loss = 0.0f;
    if (!(block.ignore && block.ignore[i])) {
      for (int64_t a = 0; a < p.tables.axes; ++a) {
        const Axis& axis = block.axes[a];
        const float weight = p.weights ? p.weights[a * p.tables.count + axis.index[i]] : 1.0f;
        loss += weight * (axis.below[i] + std::log(axis.total[i]));
      }
    }
    if (losses) losses[block.image * p.pixels + block.first + i] = loss;
    sum += loss;
  }
  return sum;
}

}  // namespace

void cross_entropy(const CrossEntropyProblem& p, float* loss, float* losses, void* grad) {
  const int64_t all = p.images * p.pixels, labels = p.tables.axes * p.tables.count;
  const auto ignored = [](uint8_t x) { return x != 0; };
  const int64_t counted = p.ignore ? all - std::count_if(p.ignore, p.ignore + all, ignored) : all;
  const int64_t bytes = all * labels * (p.storage == Storage::kFloat32 ? 4 : 2);
  if (grad) expect_writes(grad, bytes);
  const Kernels& kernel = kernels();
  const BlockFunction function = kernel.block(p.storage, p.labels_last, grad != nullptr);
  const Job job{p.logits, grad, labels, p.tables.axes, p.tables.count, p.pixels, p.neighbors, bytes >= kLarge};
  const float scale = p.mean ? float(1.0 / double(std::max<int64_t>(counted, 1))) : 1.0f;
  const int64_t blocks = (p.pixels + kBlock - 1) / kBlock, tasks = p.images * blocks;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p.threads, tasks)));
  std::vector<double> sums(tasks);
  // threads == 1 must not enter OpenMP: a forked data-loader worker would hang in it
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int t = 0; t < threads; ++t) {
    Scratch scratch(p, labels * (p.labels_last ? kTile : kBlock));
    for (int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; ++task) {
      const int64_t image = task / blocks, first = task % blocks * kBlock;
      Block block{image, first, std::min(kBlock, p.pixels - first), nullptr, {}};
      if (p.ignore) block.ignore = p.ignore + image * p.pixels + first;
      look_up(p, kernel, scale, block, scratch);
      function(job, block, scratch.tile);
      sums[task] = losses_of(p, block, losses);
    }
    kernel.finish();
  }
  if (!loss) return;
  double sum = 0.0;
  for (const double part : sums) sum += part;
  *loss = float(p.mean ? sum / double(counted) : sum);
}

}  // namespace fastcolor::cpu
