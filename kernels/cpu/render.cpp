#include "cpu/render.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "common/render_math.h"
#include "cpu/lab_kernels.h"
#include "cpu/multiversion.h"
#include "cpu/vectors.h"

namespace fastcolor::cpu {
namespace {

constexpr int64_t kBand = 16;  // rows of a piece of work: low-resolution rows are expanded anew for each

// Of a low-resolution row, the values left and right of each column of a piece.
struct alignas(64) Expanded {
  float guide[2][kRun], a[2][kRun], b[2][kRun];
};

// The low-resolution columns about each column of a piece, and the share of the right one.
struct alignas(64) Columns {
  int32_t left[kRun], right[kRun];  // in ascending order
  float share[kRun];
  int32_t all;  // in a low-resolution row
};

// The functions of render_body.h.
struct RenderKernels {
  void (*expand)(const float*, const float*, const float*, const Columns&, Expanded&, int64_t);
  void (*upsample)(const Expanded&, const Expanded&, const Columns&, float, float, float, const float*, float*, float*,
                   int64_t);
  void (*mix_bytes)(const uint8_t*, const uint8_t*, const uint8_t*, const float*, float*, int64_t);
  void (*mix_words)(const uint16_t*, const uint16_t*, const uint16_t*, const float*, float*, int64_t);
  void (*halve_columns)(const float*, const float*, float, float, float*, int64_t);
  void (*lightness_of)(const float*, float*, int64_t);
  void (*chroma_levels)(const UvJob&, const float*, const float*, float*, float*, int64_t);
  void (*store_bytes)(const float*, uint8_t*, int64_t);
  void (*store_words)(const float*, uint16_t*, int64_t);
  void (*exp2_run)(const float*, float*, int64_t);
};

namespace baseline {
#define FC_LANES 4
#include "cpu/simd_body.h"
#include "cpu/render_body.h"
#undef FC_LANES
}  // namespace baseline

#if FC_HAS_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define FC_LANES 8
#include "cpu/simd_body.h"
#include "cpu/render_body.h"
#undef FC_LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define FC_LANES 16
#include "cpu/simd_body.h"
#include "cpu/render_body.h"
#undef FC_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

const RenderKernels& kernels() {
#if FC_HAS_MULTIVERSION
  if (simd() == Simd::kAvx512) return avx512::kKernels;
  if (simd() == Simd::kAvx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

// The low-resolution position before a place, and the share of the one behind it.
std::pair<int64_t, float> before(const Places& places, int64_t i) {
  const float beyond = places.beyond[i];
  return beyond < 0.0f ? std::pair<int64_t, float>(places.at[i] - int64_t(1), 1.0f + beyond)
                       : std::pair<int64_t, float>(places.at[i], beyond);
}

int64_t inside(int64_t i, int64_t size) { return std::clamp<int64_t>(i, 0, size - 1); }

// Upsampled chroma for the rows of a band, one after the other: the low-resolution rows about a row are mostly those
// about the next one.
class Band {
 public:
  Band(const RenderProblem& problem, const RenderKernels& k, int64_t image, int64_t start, int64_t n)
      : p_(problem), k_(k), n_(n), low_(problem.low_height * problem.low_width),
        guide_(problem.guide + image * low_), ab_(problem.ab + image * 2 * low_) {
    columns_.all = int32_t(p_.low_width);
    for (int64_t i = 0; i < n; ++i) {
      const auto [left, share] = before(p_.columns, start + i);
      columns_.left[i] = int32_t(inside(left, p_.low_width));
      columns_.right[i] = int32_t(inside(left + 1, p_.low_width));
      columns_.share[i] = share;
    }
  }

  // a and b of row y, given its lightness.
  void row(int64_t y, const float* L, float* a, float* b) {
    const auto [above, share] = before(p_.rows, y);
    const Expanded& first = expanded(inside(above, p_.low_height));
    const Expanded& second = expanded(inside(above + 1, p_.low_height));
    k_.upsample(first, second, columns_, share, p_.sharpness, p_.floor, L, a, b, n_);
  }

 private:
  // Two neighbouring rows never share a slot.
  const Expanded& expanded(int64_t low_row) {
    const int slot = int(low_row % 2);
    if (held_[slot] != low_row) {
      const float* a = ab_ + low_row * p_.low_width;
      k_.expand(guide_ + low_row * p_.low_width, a, a + low_, columns_, slots_[slot], n_);
      held_[slot] = low_row;
    }
    return slots_[slot];
  }

  const RenderProblem& p_;
  const RenderKernels& k_;
  int64_t n_, low_;
  const float *guide_, *ab_;
  int64_t held_[2] = {-1, -1};
  Columns columns_;
  Expanded slots_[2];
};

// Calls body(image, first column, columns, first row, end of rows) for every piece of the result.
template <typename Body>
void for_each_piece(const RenderProblem& p, Body body) {
  const int64_t across = (p.width + kRun - 1) / kRun, down = (p.height + kBand - 1) / kBand;
#pragma omp parallel for num_threads(p.threads) if (p.threads > 1) schedule(static)
  for (int64_t i = 0; i < p.batch * across * down; ++i) {
    const int64_t start = i / down % across * kRun, top = i % down * kBand;
    body(i / (down * across), start, std::min(kRun, p.width - start), top, std::min(p.height, top + kBand));
  }
}

// n samples of a floating plane, from sample `at` on.
void load_row(const LabKernels& k, const void* plane, Sample sample, int64_t at, float* out, int64_t n) {
  switch (sample) {
    case Sample::kFloat16: return k.widen_float16(static_cast<const Float16*>(plane) + at, out, n);
    case Sample::kBFloat16: return k.widen_bfloat16(static_cast<const BFloat16*>(plane) + at, out, n);
    default: std::copy_n(static_cast<const float*>(plane) + at, n, out);
  }
}

// --- luma at the places of chroma ------------------------------------------------------------------------------------

// The samples about chroma sample k along one side, and their shares: on a sample, or between two; repeated at the
// border.
struct Taps {
  int64_t at[3];
  float share[3];
};

Taps taps(int64_t k, int64_t step, bool cosited, int64_t size) {
  if (step == 1) return {{k, k, k}, {0.0f, 1.0f, 0.0f}};
  const int64_t on = 2 * k;
  if (cosited) return {{inside(on - 1, size), on, inside(on + 1, size)}, {0.25f, 0.5f, 0.25f}};
  return {{on, on, inside(on + 1, size)}, {0.0f, 0.5f, 0.5f}};
}

// The luma, 0 at black and 1 at white, of chroma samples start .. start + n − 1 of row y. `wide` holds 2 n + 2 floats.
template <typename T, typename Mix>
void luma_row(const RenderKernels& k, Mix mix, const YuvLayout& yuv, const T* luma, int64_t row, int64_t luma_height,
              int64_t luma_width, int64_t y, int64_t start, int64_t n, float* wide, float* out) {
  const Taps down = taps(y, yuv.down, yuv.cosited_down, luma_height);
  const T* rows[3] = {luma + down.at[0] * row, luma + down.at[1] * row, luma + down.at[2] * row};
  const float scale = 1.0f / yuv.luma_span;
  if (yuv.across == 1) {
    const float shares[3] = {down.share[0] * scale, down.share[1] * scale, down.share[2] * scale};
    mix(rows[0] + start, rows[1] + start, rows[2] + start, shares, out, n);
    for (int64_t i = 0; i < n; ++i) out[i] -= yuv.black * scale;
    return;
  }
  const int64_t first = 2 * start - 1, end = 2 * (start + n);  // columns first .. end − 1 are wanted
  const int64_t from = std::max<int64_t>(0, first), to = std::min(luma_width, end);
  mix(rows[0] + from, rows[1] + from, rows[2] + from, down.share, wide + (from - first), to - from);
  if (from > first) wide[0] = wide[1];
  if (to < end) wide[end - 1 - first] = wide[end - 2 - first];
  const Taps across = taps(1, 2, yuv.cosited_across, luma_width + 4);  // the shares alone
  k.halve_columns(wide, across.share, yuv.black, scale, out, n);
}

}  // namespace

void render(const RenderProblem& problem, const void* L, Sample light, const Channels& rgb, bool preserve_lightness) {
  const RenderKernels& k = kernels();
  const LabKernels& lab = lab_kernels();
  const int64_t pixels = problem.height * problem.width;
  for_each_piece(problem, [&](int64_t image, int64_t start, int64_t n, int64_t top, int64_t end) {
    Band band(problem, k, image, start, n);
    Run run, c;
    for (int64_t y = top; y < end; ++y) {
      const int64_t at = y * problem.width + start;
      load_row(lab, L, light, image * pixels + at, run.c[0], n);
      band.row(y, run.c[0], run.c[1], run.c[2]);
      preserve_lightness ? lab.lab_run_to_linear_inside(run, c, n) : lab.lab_run_to_linear(run, c, n);
      lab.encode_srgb(c, n);
      store(lab, c, rgb, image, pixels, at, n);
    }
  });
}

void render_uv(const RenderProblem& problem, const YuvLayout& yuv, const void* luma, int64_t luma_height,
               int64_t luma_width, int64_t row, int64_t image_step, void* u, void* v) {
  const RenderKernels& k = kernels();
  const UvJob job = uv_job(yuv.red, yuv.blue, yuv.xyz_to_rgb, yuv.chroma_span, yuv.bits);
  for_each_piece(problem, [&](int64_t image, int64_t start, int64_t n, int64_t top, int64_t end) {
    Band band(problem, k, image, start, n);
    float wide[2 * kRun + 2], y_of[kRun], L[kRun], a[kRun], b[kRun];
    for (int64_t y = top; y < end; ++y) {
      const int64_t at = (image * problem.height + y) * problem.width + start;
      if (yuv.bits == 8) {
        luma_row(k, k.mix_bytes, yuv, static_cast<const uint8_t*>(luma) + image * image_step, row, luma_height,
                 luma_width, y, start, n, wide, y_of);
      } else {
        luma_row(k, k.mix_words, yuv, static_cast<const uint16_t*>(luma) + image * image_step, row, luma_height,
                 luma_width, y, start, n, wide, y_of);
      }
      k.lightness_of(y_of, L, n);
      band.row(y, L, a, b);
      k.chroma_levels(job, y_of, L, a, b, n);
      if (yuv.bits == 8) {
        k.store_bytes(a, static_cast<uint8_t*>(u) + at, n), k.store_bytes(b, static_cast<uint8_t*>(v) + at, n);
      } else {
        k.store_words(a, static_cast<uint16_t*>(u) + at, n), k.store_words(b, static_cast<uint16_t*>(v) + at, n);
      }
    }
  });
}

void look_up(const void* samples, bool wide, const float* table, float* out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t start = 0; start < n; start += 1 << 14) {
    const int64_t end = std::min<int64_t>(n, start + (1 << 14));
    if (wide) {
      for (int64_t i = start; i < end; ++i) out[i] = table[static_cast<const uint16_t*>(samples)[i]];
    } else {
      for (int64_t i = start; i < end; ++i) out[i] = table[static_cast<const uint8_t*>(samples)[i]];
    }
  }
}

void render_exp2(const float* x, float* out, int64_t n) { kernels().exp2_run(x, out, n); }

}  // namespace fastcolor::cpu
