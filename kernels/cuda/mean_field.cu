#include "cuda/mean_field.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace fastcolor::cuda {
namespace {

// A warp takes four strips of pixels, of 16 bytes of logits each. The eight lanes of a strip share its labels: lane s
// has those with l = s (mod 8), and all pixels of the strip. So a row of a table is read once for a whole strip, logits
// are read 16 bytes at a time, and a sum over labels is a sum over a lane's own registers, then over eight lanes.
constexpr int kSplits = 8, kStrips = 4;
constexpr int kThreads = 256;  // of a multiprocessor: 255 registers for each
constexpr int kOffsets = 256;  // of the neighbourhood, in shared memory; those beyond are read from memory
constexpr int kMostBlocks = 4096;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kLowest = -FLT_MAX;
constexpr float kMost = 0x1p64f;  // of a sum of exponentials, before its scale is changed
constexpr float kLarge = 0x1p22f;  // scores whose rounding alone would move an exponential out of range

template <typename T>
constexpr int kPixels = 16 / sizeof(T);  // of a strip

template <typename T>
constexpr int kTile = kStrips * kPixels<T>;  // pixels of a warp

struct alignas(16) Offset {
  int dy, dx;
  float space;
};

// Where the parts of shared memory begin, in bytes.
struct Layout {
  int a, b, rows, tile, grads, bytes;
  int row;       // from one label to the next in a tile, in elements
  int warp_rows; // rows of kTile floats that each warp has to itself
};

struct Job {
  MeanFieldProblem p;
  Layout layout;
  int64_t plane;  // H W
  int64_t updates;
  int64_t groups, images;  // images of a group, all of whose pixels are visited before the next one's
  int64_t pixels;          // of a block, in a group
  int tile;                // pixels of a block at a time: the same number where logits stay in shared memory
  bool vectors;            // planes and strips are aligned to 16 bytes in all of memory
  int64_t reach;           // to the farthest neighbour, in pixels of the image in a row
  float* states;           // [B, slots, 2, R, H, W]: H and F
  int64_t slots;           // U + 1, or two that are used in turn
  bool keep_h;
  int* done;  // [blocks] updates that a block has finished
  // forward
  void* marginals;
  const float* colors;
  float annealed_scale;
  float* ab;
  // backward
  const void* grad;
  MeanFieldGradients to;
  float* adjoints;  // [B, U + 1, 2, R, H, W]: dF and dH
  float* stats;     // [B, U + 1, axes, 3, H, W]: the largest score, 1 / Σ and Σ q dq of each softmax
};

// --- values ----------------------------------------------------------------------------------------------------------

__device__ float ex2(float x) { return exp2f(x); }

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// A strip of one label, in one access.
template <typename T>
struct alignas(16) Strip {
  T v[kPixels<T>];
};

template <typename T>
__device__ Strip<T> get(const T* from) {
  const uint4 word = *reinterpret_cast<const uint4*>(from);
  Strip<T> strip;
  memcpy(&strip, &word, sizeof strip);
  return strip;
}

template <typename T>
__device__ void put(T* to, const Strip<T>& strip) {
  uint4 word;
  memcpy(&word, &strip, sizeof word);
  *reinterpret_cast<uint4*>(to) = word;
}

// A strip as floats. Of two bfloat16 in a word each is one instruction away; from single values nvcc takes two.
template <typename T>
__device__ void get_floats(const T* from, float (&to)[kPixels<T>]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint4 word = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned low = words[i] << 16, high = words[i] & 0xffff0000u;
      memcpy(&to[2 * i], &low, sizeof low);
      memcpy(&to[2 * i + 1], &high, sizeof high);
    }
  } else {
    const Strip<T> strip = get(from);
#pragma unroll
    for (int p = 0; p < kPixels<T>; ++p) to[p] = to_float(strip.v[p]);
  }
}

// Floats of a strip's pixels from a row of the warp.
template <int P>
__device__ void get_row(const float* from, float (&to)[P]) {
#pragma unroll
  for (int p = 0; p < P; p += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + p);
    to[p] = v.x, to[p + 1] = v.y, to[p + 2] = v.z, to[p + 3] = v.w;
  }
}

// The sum over the eight lanes of a strip of what each has for pixel `lane % P`: every step sends half of what is left.
template <int P>
__device__ float scatter_sum(float (&v)[P]) {
  const int split = threadIdx.x % kSplits;
  if constexpr (P == 4) {
#pragma unroll
    for (int i = 0; i < P; ++i) v[i] += __shfl_xor_sync(kAll, v[i], 4);
  }
#pragma unroll
  for (int half = P / 2; half > 0; half /= 2) {
    const bool upper = split & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? v[i + half] : v[i], sent = upper ? v[i] : v[i + half];
      v[i] = kept + __shfl_xor_sync(kAll, sent, half);
    }
  }
  return v[0];
}

// --- shared memory ---------------------------------------------------------------------------------------------------

template <typename T>
struct Shared {
  Offset* offsets;
  float4 *a, *b;  // [K], for up to four columns
  float* rows;    // of this warp, [warp_rows, kTile]
  T *tile, *grads;
};

template <typename T>
__device__ Shared<T> shared_memory(const Layout& at) {
  extern __shared__ uint4 memory[];
  char* base = reinterpret_cast<char*>(memory);
  return {reinterpret_cast<Offset*>(base),
          reinterpret_cast<float4*>(base + at.a),
          reinterpret_cast<float4*>(base + at.b),
          reinterpret_cast<float*>(base + at.rows) + threadIdx.x / 32 * at.warp_rows * kTile<T>,
          reinterpret_cast<T*>(base + at.tile),
          reinterpret_cast<T*>(base + at.grads)};
}

// B as [1, b1, b2] is kept as b1, b2, b0, so that eight bytes are enough where b0 is known.
template <int N>
__device__ float4 turned(float b0, float b1, float b2, float b3) {
  return N == 3 ? float4{b1, b2, b0, 0.0f} : float4{b0, b1, b2, b3};
}

// Columns of a table in registers' order. All threads of the block take part.
template <int N>
__device__ void read_tables(const Job& job, const float* b, int64_t columns, int first, float4* to_a, float4* to_b) {
  for (int64_t l = threadIdx.x; l < job.p.labels; l += blockDim.x) {
    float a[4] = {}, c[4] = {};
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (to_a && r < job.p.rank) a[r] = __ldg(job.p.a + l * job.p.rank + r);
      if (r >= first && r - first < columns) c[r] = __ldg(b + l * columns + r - first);
    }
    if (first) c[0] = 1.0f;
    if (to_a) to_a[l] = float4{a[0], a[1], a[2], a[3]};
    to_b[l] = turned<N>(c[0], c[1], c[2], c[3]);
  }
}

template <typename T>
__device__ void read_offsets(const Job& job, const Shared<T>& shared) {
  const int *dy = job.p.whole + job.p.axes, *dx = dy + job.p.offsets;
  for (int64_t o = threadIdx.x; o < job.p.offsets && o < kOffsets; o += blockDim.x) {
    shared.offsets[o] = Offset{dy[o], dx[o], __ldg(job.p.space + o)};
  }
}

template <typename T>
__device__ Offset offset_at(const Job& job, const Shared<T>& shared, int64_t o) {
  if (o < kOffsets) return shared.offsets[o];
  const int* dy = job.p.whole + job.p.axes;
  return Offset{__ldg(dy + o), __ldg(dy + job.p.offsets + o), __ldg(job.p.space + o)};
}

// Logits, or what lies as they do, of `count` pixels from `first` on (of all images in a row) to [K, row] in shared
// memory. All threads of the block take part; they wait for each other before and after.
template <typename T>
__device__ void load(const Job& job, const void* memory, T* tile, int64_t first, int count) {
  constexpr int P = kPixels<T>;
  const T* from = static_cast<const T*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, row = job.layout.row;
  const int strips = (count + P - 1) / P;
  const int64_t labels = job.p.labels;
  __syncthreads();
  if (job.p.labels_last) {
    for (int s = warp; s < strips; s += warps) {
      for (int64_t l = lane; l < labels; l += 32) {
        Strip<T> strip;
#pragma unroll
        for (int p = 0; p < P; ++p) {
          strip.v[p] = s * P + p < count ? from[(first + s * P + p) * labels + l] : from_float<T>(0.0f);
        }
        put(tile + l * row + s * P, strip);
      }
    }
  } else if (job.vectors) {
    for (int s = lane; s < strips; s += 32) {
      const int64_t pixel = first + s * P;
      const T* at = from + pixel / job.plane * labels * job.plane + pixel % job.plane;
      for (int64_t l = warp; l < labels; l += warps) {
        __pipeline_memcpy_async(tile + l * row + s * P, at + l * job.plane, 16);
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
  } else {
    for (int i = lane; i < strips * P; i += 32) {
      const int64_t pixel = first + min(i, count - 1);
      const T* at = from + pixel / job.plane * labels * job.plane + pixel % job.plane;
      for (int64_t l = warp; l < labels; l += warps) tile[l * row + i] = at[l * job.plane];
    }
  }
  __syncthreads();
}

// The way back.
template <typename T>
__device__ void store(const Job& job, const T* tile, void* memory, int64_t first, int count) {
  constexpr int P = kPixels<T>;
  T* to = static_cast<T*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, row = job.layout.row;
  const int strips = (count + P - 1) / P;
  const int64_t labels = job.p.labels;
  __syncthreads();
  if (job.p.labels_last) {
    for (int s = warp; s < strips; s += warps) {
      for (int64_t l = lane; l < labels; l += 32) {
        const Strip<T> strip = get(tile + l * row + s * P);
#pragma unroll
        for (int p = 0; p < P; ++p) {
          if (s * P + p < count) to[(first + s * P + p) * labels + l] = strip.v[p];
        }
      }
    }
    return;
  }
  const int step = job.vectors ? P : 1;
  for (int i = lane * step; i < count; i += 32 * step) {
    const int64_t pixel = first + i;
    T* at = to + pixel / job.plane * labels * job.plane + pixel % job.plane;
    for (int64_t l = warp; l < labels; l += warps) {
      if (job.vectors) {
        put(at + l * job.plane, get(tile + l * row + i));
      } else {
        at[l * job.plane] = tile[l * row + i];
      }
    }
  }
}

// --- pixels and their neighbours -------------------------------------------------------------------------------------

struct Start {
  int64_t image, at;  // of the first pixel of a tile
};

struct Place {
  int64_t image, at;
  int y, x;
  bool inside;
};

__device__ Start start_of(const Job& job, int64_t pixel) { return {pixel / job.plane, pixel % job.plane}; }

__device__ Place place_of(const Job& job, const Start& start, int i, int count) {
  Place place{start.image, start.at, 0, 0, i < count};
  if (place.inside) place.at += i;
  if (place.at >= job.plane) place.image += place.at / job.plane, place.at %= job.plane;
  const int64_t width = job.p.width;
  const int64_t y = job.plane <= UINT_MAX ? unsigned(place.at) / unsigned(width) : place.at / width;
  place.y = int(y), place.x = int(place.at - y * width);
  return place;
}

// Whether update k changes a pixel.
__device__ bool changes(const Job& job, int64_t k, const Place& i) {
  return !job.p.checkerboard || ((i.y + i.x + k + 1) & 1) == 0;
}

__device__ float* state_of(const Job& job, const Place& i, int64_t k, int which) {
  const int64_t slot = job.slots > job.updates ? k : k & 1;
  return job.states + ((i.image * job.slots + slot) * 2 + which) * job.p.rank * job.plane + i.at;
}

__device__ float* adjoint_of(const Job& job, const Place& i, int64_t k, int which) {
  return job.adjoints + ((i.image * (job.updates + 1) + k) * 2 + which) * job.p.rank * job.plane + i.at;
}

__device__ float* stats_of(const Job& job, const Place& i, int64_t k, int64_t axis) {
  return job.stats + ((i.image * (job.updates + 1) + k) * job.p.axes + axis) * 3 * job.plane + i.at;
}

// Σ_j w_ij x_j of `columns` columns, x = planes of [H, W] at the pixel itself. `board`: the parity of y + x that
// counts, or -1 for both.
template <int N, typename T>
__device__ void gather(const Job& job, const Shared<T>& shared, const Place& i, const float* x, int64_t columns,
                       int board, float (&sum)[N]) {
  const float sharpness = __ldg(job.p.sharpness) * 0.849321800f;  // sqrt(log2(e) / 2)
  const float* guide = job.p.guide + i.image * job.plane + i.at;
  const float own = __ldg(guide);
#pragma unroll
  for (int r = 0; r < N; ++r) sum[r] = 0.0f;
  for (int64_t o = 0; o < job.p.offsets; ++o) {
    const Offset offset = offset_at(job, shared, o);
    const int y = i.y + offset.dy, x_ = i.x + offset.dx;
    if (y < 0 || y >= job.p.height || x_ < 0 || x_ >= job.p.width) continue;
    if (board >= 0 && ((y + x_) & 1) != board) continue;
    const int64_t to = offset.dy * job.p.width + offset.dx;
    const float z = (own - __ldg(guide + to)) * sharpness;
    const float w = offset.space * ex2(-z * z);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (r < columns) sum[r] += w * x[r * job.plane + to];
    }
  }
}

// --- between blocks --------------------------------------------------------------------------------------------------

// What this block has written is seen by those that wait for it.
__device__ void publish(const Job& job, int finished) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  atomicExch(job.done + blockIdx.x, finished);
}

// Until all blocks with pixels within reach have finished an update: all of them run, for the launch is cooperative. A
// barrier of the whole grid would wait for the slowest block anywhere, and for two more trips to the L2 cache. Since
// reach is mutual, those who wait for this block have also read what it is about to overwrite.
__device__ void wait(const Job& job, int finished, int64_t first, int64_t count, int64_t all) {
  const int64_t image = first / job.plane * job.plane, end = ((first + count - 1) / job.plane + 1) * job.plane;
  const int64_t from = max(image, first - job.reach), to = min(min(end, all), first + count + job.reach);
  for (int64_t block = from / job.pixels + threadIdx.x; block <= (to - 1) / job.pixels; block += blockDim.x) {
    while (*static_cast<volatile int*>(job.done + block) < finished) __nanosleep(40);
    __threadfence();  // also drops what the L1 cache holds of older features
  }
  __syncthreads();
}

// --- labels ----------------------------------------------------------------------------------------------------------

// Scores of a strip: c u + A H. With N columns, tables and H are in shared memory and in registers; N = 0 takes any
// number, from memory and from the rows of the warp.
template <typename T, int N>
struct Scores {
  static constexpr int P = kPixels<T>;
  const T* u;         // logits of the strip, [K, row]
  int row;
  float c;
  const float4* a;    // N > 0
  float h[N ? N : 1][P];
  const float* memory_a;  // N == 0: [K, rank]
  const float* rows;      // [rank, kTile] at the strip
  int rank;

  __device__ void read_rows(const float* from) {
    rows = from;
    if constexpr (N > 0) {
#pragma unroll
      for (int r = 0; r < N; ++r) get_row<P>(from + r * kTile<T>, h[r]);
    }
  }

  // Minus `base`, of the labels l, l + 8, l + 16, ...; those from `end` on are impossible.
  template <bool kTail, int kChunk>
  __device__ void get(int l, int end, const float (&base)[P], float (&x)[kChunk][P]) const {
    if (c != 0.0f) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int at = kTail ? min(l + i * kSplits, end - 1) : l + i * kSplits;
        float v[P];
        get_floats(u + at * row, v);
#pragma unroll
        for (int p = 0; p < P; ++p) x[i][p] = fmaf(v[p], c, -base[p]);
      }
    } else {  // a uniform start: −inf · 0 must not appear
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
#pragma unroll
        for (int p = 0; p < P; ++p) x[i][p] = -base[p];
      }
    }
    if constexpr (N > 0) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float4 v = a[kTail ? min(l + i * kSplits, end - 1) : l + i * kSplits];
        const float columns[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < N; ++r) {
#pragma unroll
          for (int p = 0; p < P; ++p) x[i][p] = fmaf(columns[r], h[r][p], x[i][p]);
        }
      }
    } else {
      add_product<kTail>(memory_a, rank, rows, l, end, x);
    }
    if constexpr (kTail) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
#pragma unroll
        for (int p = 0; p < P; ++p) x[i][p] = l + i * kSplits < end ? x[i][p] : -INFINITY;
      }
    }
  }

  // x += Σ_r m[l, r] rows[r], m [K, columns] in memory.
  template <bool kTail, int kChunk>
  static __device__ void add_product(const float* m, int columns, const float* rows, int l, int end,
                                     float (&x)[kChunk][P]) {
    for (int r = 0; r < columns; ++r) {
      float h[P];
      get_row<P>(rows + r * kTile<T>, h);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int at = kTail ? min(l + i * kSplits, end - 1) : l + i * kSplits;
        const float v = __ldg(m + int64_t(at) * columns + r);
#pragma unroll
        for (int p = 0; p < P; ++p) x[i][p] = fmaf(v, h[p], x[i][p]);
      }
    }
  }
};

// function(l) for a lane's labels of an axis, kChunk at a time: l, l + 8, l + 16, ...
template <int kChunk, typename Function>
__device__ void each_chunk(int first, int end, Function function) {
  for (int l = first; l < end; l += kSplits * kChunk) function(l + int(threadIdx.x % kSplits));
}

__device__ bool is_large(float most) { return fabsf(most) > kLarge && fabsf(most) < FLT_MAX; }

// Scores minus `most`. Taken off from the start, `most` leaves digits that a score itself rounds away; but of scores
// beyond 2^22 what it leaves may be anything, and they have to be rounded as `most` was.
template <int P>
struct Near {
  float before[P], after[P];  // what is taken off
  bool large = false;         // any of it after

  __device__ explicit Near(const float (&most)[P]) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const bool late = is_large(most[p]);
      before[p] = late ? 0.0f : most[p], after[p] = late ? most[p] : 0.0f;
      large = large || late;
    }
  }
  template <typename S, int kChunk>
  __device__ void get(const S& scores, int l, int end, float (&x)[kChunk][P]) const {
    scores.template get<true>(l, end, before, x);
    if (!large) return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
#pragma unroll
      for (int p = 0; p < P; ++p) x[i][p] -= after[p];
    }
  }
};

enum class Features { kNone, kAll, kOnes };  // kOnes: the first column of B is 1, so its sum is that of q

// One pass over the labels of an axis: the softmax of a strip, and Σ_l B[l] q_l by the way. `most` is the largest score
// or one near it, for all pixels of the strip; Σ 2^(t − most) is returned, and features are set, for the lane's own
// pixel. The largest score need not be known: exponentials are taken relative to that of the first label until their
// sum grows beyond 2^64, which is rare; then relative to the largest one so far.
template <Features kFeatures, int kChunk, typename T, int N>
__device__ float softmax(const Scores<T, N>& scores, const float4* b, int first, int end, float (&most)[kPixels<T>],
                         float (&features)[N ? N : 1]) {
  constexpr int P = kPixels<T>;
  constexpr int kFrom = kFeatures == Features::kOnes ? 1 : 0, kTo = kFeatures == Features::kNone ? 0 : N;
  const int split = threadIdx.x % kSplits;
  float total[P], f[N ? N : 1][P], sum[P], x[kChunk][P];
  bool large = false;
  {
    const float zero[P] = {};
    float one[1][P];
    scores.template get<true>(first + split, end, zero, one);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      most[p] = fmaxf(one[0][p], kLowest), total[p] = 0.0f;
      large = large || is_large(most[p]);
#pragma unroll
      for (int r = 0; r < kTo; ++r) f[r][p] = 0.0f;
    }
  }
  const auto exponentials = [&] {
    bool fits = true;
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i][p] = ex2(x[i][p]), sum[p] = i ? sum[p] + x[i][p] : x[i][p];
      fits = fits && !(sum[p] > kMost);
    }
    return fits;
  };
  const auto add = [&](int l, auto tail) {
    if constexpr (kTo > 0) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float4 v = b[decltype(tail)::value ? min(l + i * kSplits, end - 1) : l + i * kSplits];
        const float columns[4] = {N == 3 ? v.z : v.x, N == 3 ? v.x : v.y, N == 3 ? v.y : v.z, v.w};
#pragma unroll
        for (int r = kFrom; r < kTo; ++r) {
#pragma unroll
          for (int p = 0; p < P; ++p) f[r][p] = fmaf(columns[r], x[i][p], f[r][p]);
        }
      }
    }
  };
  for (int l = first + split; l - split < end; l += kSplits * kChunk) {
    const bool whole = l - split + kSplits * kChunk <= end;
    bool again = large;
    if (!again) {
      if (whole) {
        scores.template get<false>(l, end, most, x);
      } else {
        scores.template get<true>(l, end, most, x);
      }
      again = !exponentials();
    }
    if (again) {
      const float zero[P] = {};
      scores.template get<true>(l, end, zero, x);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        float top = most[p];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) top = fmaxf(top, x[i][p]);
        const float factor = ex2(most[p] - top);
        most[p] = top, total[p] *= factor;
#pragma unroll
        for (int r = kFrom; r < kTo; ++r) f[r][p] *= factor;
      }
      const Near<P> near(most);
      near.get(scores, l, end, x);
      large = near.large;
      exponentials();
    }
#pragma unroll
    for (int p = 0; p < P; ++p) total[p] += sum[p];
    if (whole) {
      add(l, std::false_type());
    } else {
      add(l, std::true_type());
    }
  }
#pragma unroll
  for (int p = 0; p < P; ++p) {
    float top = most[p];
#pragma unroll
    for (int step = 1; step < kSplits; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, step));
    const float factor = ex2(most[p] - top);
    most[p] = top, total[p] *= factor;
#pragma unroll
    for (int r = kFrom; r < kTo; ++r) f[r][p] *= factor;
  }
  const float all = scatter_sum<P>(total);
  if (kFeatures == Features::kOnes) features[0] = 1.0f;
#pragma unroll
  for (int r = kFrom; r < kTo; ++r) features[r] = scatter_sum<P>(f[r]) * (1.0f / all);
  return all;
}

// What each of the strip's pixels has, from the lanes that look after them.
template <int P>
__device__ void share(float own, float (&all)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) all[p] = __shfl_sync(kAll, own, p, kSplits);
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct Lane {
  int strip, own;  // of the warp's strips, and which of the strip's pixels this lane looks after
  bool first;      // with four pixels and eight lanes, two look after each
  __device__ Lane() : strip(threadIdx.x % 32 / kSplits), own(threadIdx.x % kPixels<T>) {
    first = threadIdx.x % kSplits < kPixels<T>;
  }
  __device__ int pixel() const { return strip * kPixels<T> + own; }
};

// H of update k of the lane's pixel, to memory and, times `scale`, to the warp's rows.
template <typename T, int N>
__device__ void make_scores(const Job& job, const Shared<T>& shared, const Lane<T>& lane, const Place& i, int64_t k,
                            float scale) {
  constexpr int C = N ? N : 4;
  const int64_t rank = job.p.rank;
  const bool changed = changes(job, k, i);
  const float damping = job.p.damping;
  for (int64_t r0 = 0; r0 < (N ? 1 : rank); r0 += C) {
    float g[C] = {};
    if (k > 0 && i.inside) {
      if (changed) {
        gather(job, shared, i, state_of(job, i, k - 1, 1) + r0 * job.plane, rank - r0, -1, g);
      }
#pragma unroll
      for (int r = 0; r < C; ++r) {
        if (r0 + r >= rank) continue;
        if (changed && job.p.prior) g[r] += __ldg(job.p.prior + (i.image * rank + r0 + r) * job.plane + i.at);
        if (job.keep_h) {
          if (damping != 0.0f || !changed) {
            const float old = state_of(job, i, k - 1, 0)[(r0 + r) * job.plane];
            g[r] = changed ? (1.0f - damping) * g[r] + damping * old : old;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < C; ++r) {
      if (!lane.first || (N == 0 && r0 + r >= rank)) continue;
      shared.rows[(r0 + r) * kTile<T> + lane.pixel()] = g[r] * scale;
      if (job.keep_h && i.inside && r0 + r < rank) state_of(job, i, k, 0)[(r0 + r) * job.plane] = g[r];
    }
  }
}

// q of a strip and an axis in place of its logits.
template <int kChunk, typename T, int N>
__device__ void write_marginals(const Scores<T, N>& scores, T* tile, int first, int end,
                                const float (&most)[kPixels<T>],
                                const float (&inverse)[kPixels<T>]) {
  constexpr int P = kPixels<T>;
  const Near<P> near(most);
  each_chunk<kChunk>(first, end, [&](int l) {
    float x[kChunk][P];
    near.get(scores, l, end, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (l + i * kSplits >= end) continue;
      Strip<T> q;
#pragma unroll
      for (int p = 0; p < P; ++p) q.v[p] = from_float<T>(ex2(x[i][p]) * inverse[p]);
      put(tile + (l + i * kSplits) * scores.row, q);
    }
  });
}

// sums[r] += Σ_l q_l m[l, r] for columns beyond registers; sums are rows of the warp, each lane adds to its own pixel.
template <int kChunk, typename T>
__device__ void add_expected(const float* m, int columns, int l, int end, const float (&q)[kChunk][kPixels<T>],
                             float* sums, const Lane<T>& lane) {
  constexpr int P = kPixels<T>;
  for (int r = 0; r < columns; ++r) {
    float v[P] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int at = min(l + i * kSplits, end - 1);
      const float column = __ldg(m + int64_t(at) * columns + r);
#pragma unroll
      for (int p = 0; p < P; ++p) v[p] = fmaf(column, q[i][p], v[p]);
    }
    const float sum = scatter_sum<P>(v);
    if (lane.first) sums[r * kTile<T> + lane.pixel()] += sum;
  }
}

// Update k of the pixels of a tile; each warp goes its own way.
template <typename T, int N>
__device__ void update(const Job& job, const Shared<T>& shared, int64_t k, float unary, const Start& start, int count,
                       bool ones) {
  constexpr int P = kPixels<T>, kChunk = 4;
  const bool last = k == job.updates, annealed = last && job.ab;
  const float scale = annealed ? job.annealed_scale : kLog2E;
  const Lane<T> lane;
  const int rank = int(job.p.rank), strips = (count + P - 1) / P;
  const int step = blockDim.x / 32 * kTile<T>;
  for (int from = threadIdx.x / 32 * kTile<T>; from < count; from += step) {
    const Place i = place_of(job, start, from + lane.pixel(), count);
    __syncwarp();  // rows of the pixels before have been read
    make_scores<T, N>(job, shared, lane, i, k, scale);
    __syncwarp();
    const int strip = from / P + lane.strip;
    T* tile = shared.tile + min(strip, strips - 1) * P;
    Scores<T, N> scores;
    scores.u = tile, scores.row = job.layout.row, scores.c = unary * scale;
    scores.a = shared.a, scores.memory_a = job.p.a, scores.rank = rank;
    scores.read_rows(shared.rows + lane.strip * P);
    float features[N ? N : 1] = {};
    const int columns = annealed ? 2 : rank;
    float* sums = shared.rows + rank * kTile<T>;
    if (N == 0 && lane.first) {
      for (int r = 0; r < columns; ++r) sums[r * kTile<T> + lane.pixel()] = 0.0f;
    }
    for (int64_t axis = 0, first = 0; axis < job.p.axes; ++axis) {
      const int end = int(first) + job.p.whole[axis];
      float most[P], inverse[P], more[N ? N : 1] = {}, total;
      if constexpr (N == 0) {
        total = softmax<Features::kNone, kChunk>(scores, shared.b, int(first), end, most, more);
      } else if (N == 3 && (ones || annealed)) {
        total = softmax<Features::kOnes, kChunk>(scores, shared.b, int(first), end, most, more);
      } else {
        total = softmax<Features::kAll, kChunk>(scores, shared.b, int(first), end, most, more);
      }
#pragma unroll
      for (int r = 0; r < N; ++r) features[r] += more[r];
      const bool marginals = last && job.marginals;
      if (N == 0 || marginals) share(1.0f / total, inverse);
      if (N == 0 && !marginals) {
        const float* m = annealed ? job.colors : job.p.b;
        const Near<P> near(most);
        each_chunk<kChunk>(int(first), end, [&](int l) {
          float x[kChunk][P];
          near.get(scores, l, end, x);
#pragma unroll
          for (int c = 0; c < kChunk; ++c) {
#pragma unroll
            for (int p = 0; p < P; ++p) x[c][p] = ex2(x[c][p]) * inverse[p];
          }
          add_expected(m, columns, l, end, x, sums, lane);
        });
      }
      if (marginals && strip < strips) write_marginals<kChunk>(scores, tile, int(first), end, most, inverse);
      first = end;
    }
    if (!i.inside || !lane.first) continue;
    const auto feature = [&](int r) { return sums[r * kTile<T> + lane.pixel()]; };
    if (annealed) {
      constexpr int kFirst = N == 3 ? 1 : 0;
      float* ab = job.ab + i.image * 2 * job.plane + i.at;
      for (int d = 0; d < 2; ++d) {
        if constexpr (N > 0) {
          ab[d * job.plane] = d ? features[kFirst + 1] : features[kFirst];
        } else {
          ab[d * job.plane] = feature(d);
        }
      }
    }
    if (last) continue;
    float* f = state_of(job, i, k, 1);
    if (k > 0 && !changes(job, k, i)) {
      const float* before = state_of(job, i, k - 1, 1);
      for (int r = 0; r < rank; ++r) f[r * job.plane] = before[r * job.plane];
    } else if constexpr (N > 0) {
#pragma unroll
      for (int r = 0; r < N; ++r) {
        if (r < rank) f[r * job.plane] = features[r];
      }
    } else {
      for (int r = 0; r < rank; ++r) f[r * job.plane] = feature(r);
    }
  }
}

// The weight of the logits in the scores of update k, from that of the update before.
__device__ float next_unary(const Job& job, int64_t k, float unary) {
  const bool new_sweep = !job.p.checkerboard || (k & 1) != 0;
  return new_sweep ? (1.0f - job.p.damping) + job.p.damping * unary : unary;
}

// What a block has of a group: a run of its pixels, of all images in a row.
struct Part {
  int64_t begin;   // first pixel of the group
  int64_t first;   // of the block, from there
  int64_t count;   // none where it is <= 0
  int64_t all;     // of the group
};

__device__ Part part_of(const Job& job, int64_t group) {
  const int64_t image = group * job.images, images = min(job.images, job.p.batch - image);
  const int64_t all = images * job.plane, first = blockIdx.x * job.pixels;
  return {image * job.plane, first, min(job.pixels, all - first), all};
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ Job job) {
  const Shared<T> shared = shared_memory<T>(job.layout);
  read_offsets(job, shared);
  if (N > 0) read_tables<N>(job, job.p.b, job.p.rank, 0, shared.a, shared.b);
  bool ones = N == 3 && job.p.axes == 1;
  for (int64_t l = threadIdx.x; l < job.p.labels; l += blockDim.x) ones = ones && job.p.b[l * job.p.rank] == 1.0f;
  ones = __syncthreads_and(ones);
  int finished = 0;
  for (int64_t group = 0; group < job.groups; ++group) {
    const Part part = part_of(job, group);
    if (part.count <= 0) return;  // none in the groups that follow either
    const bool resident = part.count <= job.tile;
    float unary = job.p.uniform ? 0.0f : 1.0f;
    if (resident) load(job, job.p.logits, shared.tile, part.begin + part.first, int(part.count));
    for (int64_t k = 0; k <= job.updates; ++k) {
      const bool last = k == job.updates;
      if (k > 0) {
        wait(job, finished, part.first, part.count, part.all);
        unary = next_unary(job, k, unary);
      }
      if (N > 0 && last && job.ab) {
        __syncthreads();
        read_tables<N>(job, job.colors, 2, N == 3 ? 1 : 0, nullptr, shared.b);
        __syncthreads();
      }
      for (int64_t at = 0; at < part.count; at += job.tile) {
        const int64_t first = part.begin + part.first + at;
        const int count = int(min(int64_t(job.tile), part.count - at));
        if (!resident) load(job, job.p.logits, shared.tile, first, count);
        update<T, N>(job, shared, k, unary, start_of(job, first), count, ones);
        if (last && job.marginals) store(job, shared.tile, job.marginals, first, count);
      }
      ++finished;
      if (!last) publish(job, finished);
    }
    if (N > 0 && job.ab && group + 1 < job.groups) {
      __syncthreads();
      read_tables<N>(job, job.p.b, job.p.rank, 0, nullptr, shared.b);
      __syncthreads();
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------
// From the last update to the start, only adjoints of H and F and three numbers of each softmax are made and kept,
// R-sized all; then one pass over the labels makes every q once more, for the gradients of the logits and of A and B.

// A lane's choice among the values of its strip.
template <int P>
__device__ float pick(const float (&v)[P], int own) {
  float picked = v[0];
#pragma unroll
  for (int p = 1; p < P; ++p) picked = p == own ? v[p] : picked;
  return picked;
}

// Gradients of the marginals of a strip as they come from F, B dF, or from memory at the last update.
template <typename T, int N>
struct Upstream {
  static constexpr int P = kPixels<T>;
  const T* grads;  // null but at the last update: [K, row]
  int row;
  const float4* b;
  float df[N ? N : 1][P];
  const float* memory_b;
  const float* rows;
  int rank;

  __device__ void read_rows(const float* from) {
    rows = from;
    if constexpr (N > 0) {
#pragma unroll
      for (int r = 0; r < N; ++r) get_row<P>(from + r * kTile<T>, df[r]);
    }
  }

  template <int kChunk>
  __device__ void get(int l, int end, float (&s)[kChunk][P]) const {
    if (grads) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        get_floats(grads + min(l + i * kSplits, end - 1) * row, s[i]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
#pragma unroll
      for (int p = 0; p < P; ++p) s[i][p] = 0.0f;
    }
    if constexpr (N > 0) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float4 v = b[min(l + i * kSplits, end - 1)];
        const float columns[4] = {N == 3 ? v.z : v.x, N == 3 ? v.x : v.y, N == 3 ? v.y : v.z, v.w};
#pragma unroll
        for (int r = 0; r < N; ++r) {
#pragma unroll
          for (int p = 0; p < P; ++p) s[i][p] = fmaf(columns[r], df[r][p], s[i][p]);
        }
      }
    } else {
      Scores<T, 0>::template add_product<true>(memory_b, rank, rows, l, end, s);
    }
  }
};

// What the label passes of the backward read, but for the rows.
template <typename T, int N, int M>
__device__ void prepare(const Job& job, const Shared<T>& shared, int strip, Scores<T, N>& scores,
                        Upstream<T, M>& upstream) {
  scores.u = shared.tile + strip * kPixels<T>, upstream.grads = shared.grads + strip * kPixels<T>;
  scores.row = upstream.row = job.layout.row;
  scores.a = shared.a, upstream.b = shared.b;
  scores.memory_a = job.p.a, upstream.memory_b = job.p.b;
  scores.rank = upstream.rank = int(job.p.rank);
}

// dF of update k of the lane's pixel, from dH of update k + 1: w is symmetric.
template <typename T, int N>
__device__ void make_adjoints(const Job& job, const Shared<T>& shared, const Lane<T>& lane, const Place& i, int64_t k) {
  constexpr int C = N ? N : 4;
  const int64_t rank = job.p.rank, columns = N ? N : rank;
  const bool carried = job.p.checkerboard && k + 1 < job.updates && !changes(job, k + 1, i);
  for (int64_t r0 = 0; r0 < (N ? 1 : rank); r0 += C) {
    float g[C] = {};
    if (k < job.updates && i.inside) {
      gather(job, shared, i, adjoint_of(job, i, k + 1, 1) + r0 * job.plane, rank - r0,
             job.p.checkerboard ? int(k & 1) : -1, g);
#pragma unroll
      for (int r = 0; r < C; ++r) {
        if (r0 + r >= rank) continue;
        g[r] *= 1.0f - job.p.damping;
        if (carried) g[r] += adjoint_of(job, i, k + 1, 0)[(r0 + r) * job.plane];
      }
    }
#pragma unroll
    for (int r = 0; r < C; ++r) {
      if (!lane.first || r0 + r >= columns) continue;
      const bool there = i.inside && r0 + r < rank;
      shared.rows[(columns + r0 + r) * kTile<T> + lane.pixel()] = g[r];
      shared.rows[(r0 + r) * kTile<T> + lane.pixel()] =
          there ? state_of(job, i, k, 0)[(r0 + r) * job.plane] * kLog2E : 0.0f;
      if (there) adjoint_of(job, i, k, 0)[(r0 + r) * job.plane] = g[r];
    }
  }
}

// Adjoints and softmaxes of update k of the pixels of a tile.
template <typename T, int N>
__device__ void step_back(const Job& job, const Shared<T>& shared, int64_t k, float unary, const Start& start,
                          int count) {
  constexpr int P = kPixels<T>, kChunk = P == 4 ? 4 : N == 4 ? 1 : 2;
  const bool last = k == job.updates;
  const Lane<T> lane;
  const int rank = int(job.p.rank), columns = N ? N : rank, strips = (count + P - 1) / P;
  const int step = blockDim.x / 32 * kTile<T>;
  for (int from = threadIdx.x / 32 * kTile<T>; from < count; from += step) {
    const Place i = place_of(job, start, from + lane.pixel(), count);
    const bool counts = i.inside && (k == 0 || last || changes(job, k, i)), mine = i.inside && lane.first;
    __syncwarp();
    make_adjoints<T, N>(job, shared, lane, i, k);
    __syncwarp();
    Scores<T, N> scores;
    Upstream<T, P == 8 && N == 4 ? 0 : N> upstream;  // where registers are too few for dF, from the rows
    prepare(job, shared, min(from / P + lane.strip, strips - 1), scores, upstream);
    scores.c = unary * kLog2E;
    if (!last) upstream.grads = nullptr;
    scores.read_rows(shared.rows + lane.strip * P);
    // dH, without what this update's softmaxes add: scores that update k + 1 has kept, or damped
    float* dh = i.inside ? adjoint_of(job, i, k, 1) : nullptr;
    for (int r = 0; mine && r < rank; ++r) {
      const float later = last ? 0.0f : adjoint_of(job, i, k + 1, 1)[r * job.plane];
      dh[r * job.plane] = changes(job, k + 1, i) ? job.p.damping * later : later;
    }
    float* sums = shared.rows + 2 * columns * kTile<T>;
    for (int64_t axis = 0, first = 0; axis < job.p.axes; ++axis) {
      const int end = int(first) + job.p.whole[axis];
      float none[N ? N : 1], most[P], inverse[P], mean[P], e1[N ? N : 1][P], e2[N ? N : 1][P];
      const float total = softmax<Features::kNone, kChunk>(scores, shared.b, int(first), end, most, none);
      share(counts ? 1.0f / total : 0.0f, inverse);
      upstream.read_rows(shared.rows + columns * kTile<T> + lane.strip * P);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        mean[p] = 0.0f;
#pragma unroll
        for (int r = 0; r < N; ++r) e1[r][p] = e2[r][p] = 0.0f;
      }
      if (N == 0) {
        __syncwarp();
        for (int r = 0; lane.first && r < 2 * rank; ++r) sums[r * kTile<T> + lane.pixel()] = 0.0f;
      }
      const Near<P> near(most);
      // with s = dL/dq: dt = q (s − Σ q s), and Aᵀ dt = Σ q s a − (Σ q s) Σ q a in one pass
      each_chunk<kChunk>(int(first), end, [&](int l) {
        float q[kChunk][P], s[kChunk][P];
        near.get(scores, l, end, q);
        upstream.get(l, end, s);
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
#pragma unroll
          for (int p = 0; p < P; ++p) {
            q[c][p] = ex2(q[c][p]) * inverse[p];
            s[c][p] *= q[c][p];
            mean[p] += s[c][p];
          }
        }
        if constexpr (N > 0) {
#pragma unroll
          for (int c = 0; c < kChunk; ++c) {
            const float4 v = shared.a[min(l + c * kSplits, end - 1)];
            const float a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int r = 0; r < N; ++r) {
#pragma unroll
              for (int p = 0; p < P; ++p) {
                e1[r][p] = fmaf(a[r], s[c][p], e1[r][p]);
                e2[r][p] = fmaf(a[r], q[c][p], e2[r][p]);
              }
            }
          }
        } else {
          add_expected(job.p.a, rank, l, end, s, sums, lane);
          add_expected(job.p.a, rank, l, end, q, sums + rank * kTile<T>, lane);
        }
      });
      const float expected = scatter_sum<P>(mean);
      if constexpr (N > 0) {
#pragma unroll
        for (int r = 0; r < N; ++r) {
          const float of_a = scatter_sum<P>(e1[r]) - expected * scatter_sum<P>(e2[r]);
          if (mine && counts && r < rank) dh[r * job.plane] += of_a;
        }
      } else {
        for (int r = 0; mine && counts && r < rank; ++r) {
          const float* sum = sums + r * kTile<T> + lane.pixel();
          dh[r * job.plane] += sum[0] - expected * sum[rank * kTile<T>];
        }
      }
      const float own_most = pick<P>(most, lane.own);
      if (mine) {
        float* stats = stats_of(job, i, k, axis);
        stats[0] = counts ? own_most : FLT_MAX;  // then every exponential is 0
        stats[job.plane] = counts ? 1.0f / total : 0.0f;
        stats[2 * job.plane] = counts ? expected : 0.0f;
      }
      first = end;
    }
    if (!job.to.prior || k == 0 || !changes(job, k, i)) continue;
    for (int r = 0; mine && r < rank; ++r) {
      job.to.prior[(i.image * rank + r) * job.plane + i.at] += (1.0f - job.p.damping) * dh[r * job.plane];
    }
  }
}

// Σ over the strips of the warp and, by an atomic, over all.
__device__ void add_to_all(float v, float* to) {
  v += __shfl_xor_sync(kAll, v, 8);
  v += __shfl_xor_sync(kAll, v, 16);
  if (threadIdx.x % 32 < kSplits && to) atomicAdd(to, v);
}

// Gradients of the logits of a tile, Σ_k unary_k dt_k, and of A and B, Σ_k dt_k H_k and Σ_k q_k dF_k.
template <typename T, int N>
__device__ void finish(const Job& job, const Shared<T>& shared, const Start& start, int64_t pixel, int count) {
  constexpr int P = kPixels<T>, kChunk = P == 4 ? 4 : N == 4 ? 1 : 2;
  constexpr int C = N ? N : 1;
  const Lane<T> lane;
  const int rank = int(job.p.rank), columns = N ? N : rank, strips = (count + P - 1) / P;
  const int step = blockDim.x / 32 * kTile<T>;
  float* rows = shared.rows + lane.pixel();
  for (int from = threadIdx.x / 32 * kTile<T>; from < count; from += step) {
    const Place i = place_of(job, start, from + lane.pixel(), count);
    const int strip = from / P + lane.strip;
    Scores<T, N> scores;
    Upstream<T, N> upstream;
    prepare(job, shared, min(strip, strips - 1), scores, upstream);
    const T* grads = upstream.grads;
    const bool factors = job.to.a != nullptr;
    for (int64_t axis = 0, first = 0; axis < job.p.axes; ++axis) {
      const int end = int(first) + job.p.whole[axis];
      each_chunk<kChunk>(int(first), end, [&](int l) {
        float du[kChunk][P] = {};
        [[maybe_unused]] float ga[kChunk][C] = {}, gb[kChunk][C] = {};
        float unary = job.p.uniform ? 0.0f : 1.0f;
        for (int64_t k = 0; k <= job.updates; ++k) {
          if (k > 0) unary = next_unary(job, k, unary);
          __syncwarp();
          if (lane.first) {
            const float *h = nullptr, *df = nullptr, *stats = nullptr;
            if (i.inside) h = state_of(job, i, k, 0), df = adjoint_of(job, i, k, 0), stats = stats_of(job, i, k, axis);
            for (int r = 0; r < columns; ++r) {
              const bool there = i.inside && r < rank;
              rows[r * kTile<T>] = there ? h[r * job.plane] * kLog2E : 0.0f;
              rows[(columns + r) * kTile<T>] = there ? df[r * job.plane] : 0.0f;
            }
            for (int n = 0; n < 3; ++n) {
              rows[(2 * columns + n) * kTile<T>] = i.inside ? stats[n * job.plane] : n ? 0.0f : FLT_MAX;
            }
          }
          __syncwarp();
          const float* from_rows = shared.rows + lane.strip * P;
          float most[P], inverse[P], mean[P], q[kChunk][P], dt[kChunk][P];
          scores.c = unary * kLog2E;
          upstream.grads = k == job.updates ? grads : nullptr;
          scores.read_rows(from_rows);
          upstream.read_rows(from_rows + columns * kTile<T>);
          get_row<P>(from_rows + 2 * columns * kTile<T>, most);
          get_row<P>(from_rows + (2 * columns + 1) * kTile<T>, inverse);
          get_row<P>(from_rows + (2 * columns + 2) * kTile<T>, mean);
          const Near<P> near(most);
          near.get(scores, l, end, q);
          upstream.get(l, end, dt);
#pragma unroll
          for (int c = 0; c < kChunk; ++c) {
#pragma unroll
            for (int p = 0; p < P; ++p) {
              q[c][p] = ex2(q[c][p]) * inverse[p];
              dt[c][p] = q[c][p] * (dt[c][p] - mean[p]);
              du[c][p] = fmaf(unary, dt[c][p], du[c][p]);
            }
          }
          if (factors) {
            const bool of_b = k < job.updates;  // the last update hands on marginals, not F
            if constexpr (N > 0) {
#pragma unroll
              for (int c = 0; c < kChunk; ++c) {
#pragma unroll
                for (int r = 0; r < N; ++r) {
#pragma unroll
                  for (int p = 0; p < P; ++p) {
                    ga[c][r] = fmaf(dt[c][p], scores.h[r][p], ga[c][r]);
                    if (of_b) gb[c][r] = fmaf(q[c][p], upstream.df[r][p], gb[c][r]);
                  }
                }
              }
            } else {
              for (int r = 0; r < rank; ++r) {
                float h[P], df[P];
                get_row<P>(from_rows + r * kTile<T>, h);
                get_row<P>(from_rows + (rank + r) * kTile<T>, df);
#pragma unroll
                for (int c = 0; c < kChunk; ++c) {
                  float of_a = 0.0f, of_f = 0.0f;
#pragma unroll
                  for (int p = 0; p < P; ++p) of_a = fmaf(dt[c][p], h[p], of_a), of_f = fmaf(q[c][p], df[p], of_f);
                  const bool there = l + c * kSplits < end;
                  const int64_t at = int64_t(l + c * kSplits) * rank + r;
                  add_to_all(of_a * kLn2, there ? job.to.a + at : nullptr);
                  if (of_b) add_to_all(of_f, there ? job.to.b + at : nullptr);
                }
              }
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
          const int label = l + c * kSplits;
          const bool there = label < end;
          if (N > 0 && factors) {
#pragma unroll
            for (int r = 0; r < N; ++r) {
              const int64_t at = int64_t(label) * rank + r;
              add_to_all(ga[c][r] * kLn2, there && r < rank ? job.to.a + at : nullptr);
              add_to_all(gb[c][r], there && r < rank ? job.to.b + at : nullptr);
            }
          }
          if (!there || strip >= strips) continue;
          if (job.p.labels_last) {
            float* to = job.to.logits + (pixel + strip * P) * job.p.labels + label;
#pragma unroll
            for (int p = 0; p < P; ++p) {
              if (strip * P + p < count) to[p * job.p.labels] = du[c][p];
            }
          } else if (job.vectors) {
            const Start at = start_of(job, pixel + strip * P);
            float* to = job.to.logits + (at.image * job.p.labels + label) * job.plane + at.at;
#pragma unroll
            for (int p = 0; p < P; p += 4) {
              *reinterpret_cast<float4*>(to + p) = float4{du[c][p], du[c][p + 1], du[c][p + 2], du[c][p + 3]};
            }
          } else {
#pragma unroll
            for (int p = 0; p < P; ++p) {
              if (strip * P + p >= count) continue;
              const Start at = start_of(job, pixel + strip * P + p);
              job.to.logits[(at.image * job.p.labels + label) * job.plane + at.at] = du[c][p];
            }
          }
        }
      });
      first = end;
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 1) backward(const __grid_constant__ Job job) {
  const Shared<T> shared = shared_memory<T>(job.layout);
  read_offsets(job, shared);
  if (N > 0) read_tables<N>(job, job.p.b, job.p.rank, 0, shared.a, shared.b);
  __syncthreads();
  int finished = 0;
  for (int64_t group = 0; group < job.groups; ++group) {
    const Part part = part_of(job, group);
    if (part.count <= 0) return;
    const bool resident = part.count <= job.tile;
    const auto each_tile = [&](bool grads, auto function) {
      for (int64_t at = 0; at < part.count; at += job.tile) {
        const int64_t first = part.begin + part.first + at;
        const int count = int(min(int64_t(job.tile), part.count - at));
        if (!resident) {
          load(job, job.p.logits, shared.tile, first, count);
          if (grads) load(job, job.grad, shared.grads, first, count);
        }
        function(first, count);
      }
    };
    if (resident) {
      load(job, job.p.logits, shared.tile, part.begin + part.first, int(part.count));
      load(job, job.grad, shared.grads, part.begin + part.first, int(part.count));
    }
    for (int64_t k = job.updates; k >= 0; --k) {
      if (k < job.updates) wait(job, finished, part.first, part.count, part.all);
      float unary = job.p.uniform ? 0.0f : 1.0f;
      for (int64_t n = 1; n <= k; ++n) unary = next_unary(job, n, unary);
      each_tile(k == job.updates, [&](int64_t first, int count) {
        step_back<T, N>(job, shared, k, unary, start_of(job, first), count);
      });
      ++finished;
      if (k > 0) publish(job, finished);
    }
    each_tile(true, [&](int64_t first, int count) {
      finish<T, N>(job, shared, start_of(job, first), first, count);
    });
  }
}

// Gradients of the weights w_ij, and through them of the guide, the weights of the offsets and the sharpness. A thread
// has pixel i and sees each pair from both of its ends: what i receives from j counts as w_ij, what it sends as w_ji.
__global__ void __launch_bounds__(256) pairs(const __grid_constant__ Job job) {
  const float sharpness = *job.p.sharpness, take = 1.0f - job.p.damping;
  const int64_t all = job.p.batch * job.plane, rank = job.p.rank;
  const int *dy = job.p.whole + job.p.axes, *dx = dy + job.p.offsets;
  for (int64_t from = blockIdx.x * int64_t(blockDim.x); from < all; from += gridDim.x * int64_t(blockDim.x)) {
    const int64_t pixel = from + threadIdx.x;
    const Place i = place_of(job, start_of(job, min(pixel, all - 1)), 0, pixel < all ? 1 : 0);
    const float* guide = job.p.guide + i.image * job.plane + i.at;
    float of_guide = 0.0f, of_sharpness = 0.0f;
    for (int64_t o = 0; o < job.p.offsets; ++o) {
      const int y = i.y + dy[o], x = i.x + dx[o];
      float of_space = 0.0f;
      if (i.inside && y >= 0 && y < job.p.height && x >= 0 && x < job.p.width) {
        const int64_t to = dy[o] * job.p.width + dx[o];
        const Place j{i.image, i.at + to, y, x, true};
        float sent = 0.0f, received = 0.0f;
        for (int64_t k = 0; k < job.updates; ++k) {
          const float *own_f = state_of(job, i, k, 1), *other_f = state_of(job, j, k, 1);
          const float *own_h = adjoint_of(job, i, k + 1, 1), *other_h = adjoint_of(job, j, k + 1, 1);
          const bool own = changes(job, k + 1, i), other = changes(job, k + 1, j);
          for (int64_t r = 0; r < rank; ++r) {
            if (own) received += own_h[r * job.plane] * other_f[r * job.plane];
            if (other) sent += other_h[r * job.plane] * own_f[r * job.plane];
          }
        }
        sent *= take, received *= take;
        const float d = guide[0] - guide[to], z = d * sharpness, g = ex2(z * z * (-0.5f * kLog2E));
        const float w = __ldg(job.p.space + o) * g;
        const float slope = w != 0.0f ? w * z : 0.0f;  // z may be inf where w is 0
        of_space = received * g;
        of_sharpness -= received * slope * d;
        of_guide -= (sent + received) * slope * sharpness;
      }
      for (int step = 16; step > 0; step /= 2) of_space += __shfl_xor_sync(kAll, of_space, step);
      if (threadIdx.x % 32 == 0) atomicAdd(job.to.space + o, of_space);
    }
    for (int step = 16; step > 0; step /= 2) of_sharpness += __shfl_xor_sync(kAll, of_sharpness, step);
    if (threadIdx.x % 32 == 0) atomicAdd(job.to.sharpness, of_sharpness);
    if (i.inside) job.to.guide[pixel] += of_guide;
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

struct Device {
  int multiprocessors, shared, shared_of_block, reserved;  // bytes
};

cudaError_t this_device(Device& device) {
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, id);
  };
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(device.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(device.reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  return error;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Columns that registers hold; 0 for more.
int columns_of(int64_t rank) { return rank <= 3 ? 3 : rank == 4 ? 4 : 0; }

struct Shape {
  int64_t labels, rank, offsets, plane, batch;
  int pixels;     // of a strip
  bool backward;  // has rows for more, and the gradients of the marginals beside the logits
};

// Shared memory of a block with so many warps and pixels; false where 32 bits do not hold it.
bool lay_out(const Shape& s, int warps, int64_t pixels, Layout& layout) {
  const int columns = columns_of(s.rank), tile = kStrips * s.pixels;
  const int64_t table = columns ? s.labels * int64_t(sizeof(float4)) : 0;
  int64_t rows = columns ? (s.backward ? 2 * columns + 3 : columns) : (s.backward ? 4 * s.rank + 3 : 2 * s.rank + 2);
  const int64_t strips = (pixels + s.pixels - 1) / s.pixels | 1;  // odd: eight labels of a strip are in eight banks
  const int64_t a = std::min<int64_t>(s.offsets, kOffsets) * int64_t(sizeof(Offset)), b = a + table;
  const int64_t first_row = b + table, one = s.labels * strips * 16;
  const int64_t first = first_row + warps * rows * tile * int64_t(sizeof(float)), grads = first + one;
  const int64_t bytes = s.backward ? grads + one : grads;
  if (bytes > INT_MAX) return false;
  layout = Layout{int(a),     int(b),     int(first_row),          int(first),
                  int(grads), int(bytes), int(strips * s.pixels), int(rows)};
  return true;
}

// The most pixels of a block with so much shared memory; 0 where not one strip fits.
int64_t capacity(const Shape& s, int warps, int64_t bytes) {
  Layout layout{};
  int64_t low = 0, high = bytes / (16 * s.labels);  // strips
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (lay_out(s, warps, middle * s.pixels, layout) && layout.bytes <= bytes) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low * s.pixels;
}

struct Plan {
  int threads = 0, blocks = 0;
  int64_t groups = 1, images = 1, pixels = 0;
  int tile = 0;
  Layout layout{};
};

int64_t budget_of(const Shape& s, const Device& d, int of_multiprocessor) {
  // tables of many columns are read through the L1 cache, which has what shared memory leaves
  const int64_t all = columns_of(s.rank) ? d.shared : d.shared / 2;
  return std::min<int64_t>(d.shared_of_block, all / of_multiprocessor - d.reserved);
}

// Logits of whole images in shared memory, in the fewest turns; where not one image fits, tiles that take turns in it.
bool plan(const Shape& s, const Device& d, Plan& best) {
  const int tile = kStrips * s.pixels, most_warps = kThreads / 32;
  double least = INFINITY;
  for (int each : {1, 2}) {  // blocks of a multiprocessor: while one waits, another works
    const int warps = most_warps / each;
    const int64_t blocks = std::min<int64_t>(int64_t(d.multiprocessors) * each, kMostBlocks);
    const int64_t room = capacity(s, warps, budget_of(s, d, each));
    Plan p;
    p.images = std::min(s.batch, room * blocks / s.plane);
    if (p.images == 0) continue;
    p.groups = (s.batch + p.images - 1) / p.images;
    p.images = (s.batch + p.groups - 1) / p.groups;
    const int64_t share = round_up((p.images * s.plane + blocks - 1) / blocks, s.pixels);
    p.pixels = std::max<int64_t>(share, std::min<int64_t>(room, tile));
    p.tile = int(p.pixels);
    p.blocks = int((p.images * s.plane + p.pixels - 1) / p.pixels);
    const int64_t tiles = (p.pixels + tile - 1) / tile, used = std::min<int64_t>(warps, tiles);
    p.threads = 32 * int(used);
    // four schedulers share the warps; a block alone on its multiprocessor leaves it idle while it waits
    const int64_t turns = (tiles + used - 1) / used * ((used * each + 3) / 4);
    const double cost = double(p.groups * turns) * (each == 1 ? 1.15 : 1.0);
    if (cost < least) least = cost, best = p;
  }
  if (least == INFINITY) {
    for (int each = 4; each > 0 && best.pixels == 0; each /= 2) {  // reading and computing take turns
      Plan p;
      for (int warps = most_warps / each; warps > 0 && p.tile == 0; --warps) {
        p.tile = int(std::min<int64_t>(capacity(s, warps, budget_of(s, d, each)), int64_t(warps) * tile));
        if (each > 1 && p.tile < tile) p.tile = 0;
        p.threads = 32 * warps;
      }
      if (p.tile == 0) continue;
      const int64_t all = s.batch * s.plane, most = std::min<int64_t>(int64_t(d.multiprocessors) * each, kMostBlocks);
      p.images = s.batch;
      p.pixels = round_up((all + most - 1) / most, s.pixels);
      p.tile = int(std::min<int64_t>(p.tile, p.pixels));
      p.blocks = int((all + p.pixels - 1) / p.pixels);
      best = p;
    }
  }
  return best.pixels > 0 && lay_out(s, best.threads / 32, best.tile, best.layout);
}

int64_t updates_of(const MeanFieldProblem& p) { return p.sweeps * (p.checkerboard ? 2 : 1); }

int64_t state_floats(const MeanFieldProblem& p, int64_t slots) {
  return p.batch * slots * 2 * p.rank * p.height * p.width;
}

int pixels_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 8; }

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

cudaError_t run(void (*kernel)(Job), const Plan& plan, const Job& job, cudaStream_t stream) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.layout.bytes);
  if (error == cudaSuccess) error = cudaMemsetAsync(job.done, 0, sizeof(int) * plan.blocks, stream);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;  // an error, not a hang, should not all blocks fit at once
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.blocks));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.layout.bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, job);
}

template <typename T>
void (*kernel_of(int columns, bool is_backward))(Job) {
  if (is_backward) return columns == 3 ? backward<T, 3> : columns == 4 ? backward<T, 4> : backward<T, 0>;
  return columns == 3 ? forward<T, 3> : columns == 4 ? forward<T, 4> : forward<T, 0>;
}

// What both directions have in common. `others`: what else is read or written 16 bytes at a time.
cudaError_t make_job(const MeanFieldProblem& p, bool is_backward, const void* other, Plan& chosen, Job& job) {
  Device device{};
  const cudaError_t error = this_device(device);
  if (error != cudaSuccess) return error;
  if (std::max(p.height, p.width) > INT_MAX / 2 || p.labels > INT_MAX / 2) return cudaErrorInvalidValue;
  const int64_t plane = p.height * p.width;
  const int strip = pixels_of(p.storage);
  const Shape shape{p.labels, p.rank, p.offsets, plane, p.batch, strip, is_backward};
  if (!plan(shape, device, chosen)) return cudaErrorInvalidConfiguration;
  job.p = p;
  job.layout = chosen.layout;
  job.plane = plane;
  job.updates = updates_of(p);
  job.groups = chosen.groups, job.images = chosen.images;
  job.pixels = chosen.pixels, job.tile = chosen.tile;
  job.vectors = !p.labels_last && plane % strip == 0 && aligned(p.logits) && aligned(other);
  job.reach = p.reach_y * p.width + p.reach_x;
  return cudaSuccess;
}

cudaError_t launch(const MeanFieldProblem& p, bool is_backward, const Plan& plan, const Job& job, cudaStream_t stream) {
  const int columns = columns_of(p.rank);
  switch (p.storage) {
    case Storage::kFloat32:
      return run(kernel_of<float>(columns, is_backward), plan, job, stream);
    case Storage::kFloat16:
      return run(kernel_of<__half>(columns, is_backward), plan, job, stream);
    case Storage::kBFloat16:
      return run(kernel_of<__nv_bfloat16>(columns, is_backward), plan, job, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t mean_field_scratch(const MeanFieldProblem& p, bool states) {
  return kMostBlocks + (states ? 0 : state_floats(p, 2));
}

int64_t mean_field_backward_scratch(const MeanFieldProblem& p) {
  const int64_t slots = updates_of(p) + 1;
  return kMostBlocks + state_floats(p, slots) + p.batch * slots * p.axes * 3 * p.height * p.width;
}

cudaError_t mean_field_resident_pixels(Storage storage, int64_t labels, int64_t rank, bool backward, int64_t* pixels) {
  Device device{};
  const cudaError_t error = this_device(device);
  if (error != cudaSuccess) return error;
  const Shape shape{labels, rank, kOffsets, 1, 1, pixels_of(storage), backward};
  *pixels = device.multiprocessors * capacity(shape, kThreads / 32, budget_of(shape, device, 1));
  return cudaSuccess;
}

cudaError_t mean_field(const MeanFieldProblem& p, void* marginals, const float* colors, float temperature, float* ab,
                       float* states, float* scratch, cudaStream_t stream) {
  if (p.batch * p.height * p.width == 0) return cudaSuccess;
  Plan plan;
  Job job{};
  const cudaError_t error = make_job(p, false, marginals, plan, job);
  if (error != cudaSuccess) return error;
  job.slots = states ? job.updates + 1 : 2;
  job.done = reinterpret_cast<int*>(scratch);
  job.states = states ? states : scratch + kMostBlocks;
  job.keep_h = states || p.checkerboard || p.damping != 0.0f;
  job.marginals = marginals, job.colors = colors, job.ab = ab;
  job.annealed_scale = kLog2E / temperature;
  return launch(p, false, plan, job, stream);
}

cudaError_t mean_field_backward(const MeanFieldProblem& p, const void* grad, const float* states,
                                const MeanFieldGradients& to, float* scratch, cudaStream_t stream) {
  if (p.batch * p.height * p.width == 0) return cudaSuccess;
  Plan plan;
  Job job{};
  cudaError_t error = make_job(p, true, grad, plan, job);
  if (error != cudaSuccess) return error;
  job.vectors = job.vectors && aligned(to.logits);
  job.slots = job.updates + 1;
  job.states = const_cast<float*>(states);  // the backward only reads them
  job.grad = grad, job.to = to;
  job.done = reinterpret_cast<int*>(scratch);
  job.adjoints = scratch + kMostBlocks;
  job.stats = job.adjoints + state_floats(p, job.slots);
  error = launch(p, true, plan, job, stream);
  if (error != cudaSuccess || !to.guide || p.offsets == 0) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min<int64_t>((p.batch * job.plane + 255) / 256, 1 << 16)));
  config.blockDim = dim3(256);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, pairs, job);
}

}  // namespace fastcolor::cuda
