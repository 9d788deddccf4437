#include "cuda/render.h"

#include "common/render_math.h"
#include "cuda/pixels.h"

namespace fastcolor::cuda {
namespace {

constexpr int kTile = 128;  // pixels of a warp: four for each lane

// --- chroma at full size ---------------------------------------------------------------------------------------------

template <typename T>
struct Scene {
  const T *ab, *guide;
  int64_t images, pixels;  // of the result
  int32_t width, low_height, low_width;
  Places rows, columns;
  float sharpness, floor;
};

// The low-resolution position before a place, and the share of the one behind it.
struct Place {
  int32_t before;
  float share;
};

__device__ Place place_of(int32_t at, float beyond) {
  return beyond < 0.0f ? Place{at - 1, 1.0f + beyond} : Place{at, beyond};
}

__device__ int32_t inside(int32_t i, int32_t size) { return max(0, min(i, size - 1)); }

// A low-resolution column: the values of the two rows about a row of the result.
struct Column {
  float guide[2], a[2], b[2];
};

// The two low-resolution rows about a row of the result.
template <typename T>
struct Rows {
  const T *guide, *a, *b;  // of the image
  int32_t row[2], width;
  float share;  // of the second

  __device__ Rows(const Scene<T>& scene, int64_t image, int32_t y) : width(scene.low_width) {
    const Place place = place_of(__ldg(scene.rows.at + y), __ldg(scene.rows.beyond + y));
    const int64_t plane = int64_t(scene.low_height) * width;
    guide = scene.guide + image * plane;
    a = scene.ab + image * 2 * plane;
    b = a + plane;
    share = place.share;
    row[0] = inside(place.before, scene.low_height) * width;
    row[1] = inside(place.before + 1, scene.low_height) * width;
  }

  __device__ Column column(int32_t x) const {
    const int32_t i = inside(x, width);
    Column c;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      c.guide[k] = to_float(__ldg(guide + (row[k] + i)));
      c.a[k] = to_float(__ldg(a + (row[k] + i)));
      c.b[k] = to_float(__ldg(b + (row[k] + i)));
    }
    return c;
  }
};

// Where N neighbouring columns lie: four at once are aligned.
__device__ void places_at(const Places& columns, int32_t x, Place (&places)[4]) {
  const Pack<int32_t, 4> at = get<4>(columns.at + x);
  const Pack<float, 4> beyond = get<4>(columns.beyond + x);
#pragma unroll
  for (int i = 0; i < 4; ++i) places[i] = place_of(at.v[i], beyond.v[i]);
}
__device__ void places_at(const Places& columns, int32_t x, Place (&places)[1]) {
  places[0] = place_of(__ldg(columns.at + x), __ldg(columns.beyond + x));
}

// a and b of N neighbouring pixels of a row, given their lightness.
template <int N, typename T>
__device__ void upsample(const Scene<T>& scene, int64_t image, int32_t y, int32_t x, const float (&L)[N],
                         float (&a)[N], float (&b)[N]) {
  const Rows<T> rows(scene, image, y);
  Place places[N];
  places_at(scene.columns, x, places);
  const float low = rows.share, high = 1.0f - low;
  int32_t held = places[0].before;
  Column left = rows.column(held), right = rows.column(held + 1);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (places[i].before != held) {  // neighbours mostly lie between the same two columns, or the next two
      if (places[i].before == held + 1) {
        left = right;
      } else {
        left = rows.column(places[i].before);
      }
      held = places[i].before;
      right = rows.column(held + 1);
    }
    const float behind = places[i].share, ahead = 1.0f - behind;
    const auto weight = [&](float guide, float tent) {
      const float d = guide - L[i];
      return (exp2f(-scene.sharpness * d * d) + scene.floor) * tent;
    };
    const float w0 = weight(left.guide[0], high * ahead), w1 = weight(right.guide[0], high * behind);
    const float w2 = weight(left.guide[1], low * ahead), w3 = weight(right.guide[1], low * behind);
    const float scale = __fdividef(1.0f, (w0 + w1) + (w2 + w3));  // within 2 units in the last place; weights < 2^126
    a[i] = scale * ((w0 * left.a[0] + w1 * right.a[0]) + (w2 * left.a[1] + w3 * right.a[1]));
    b[i] = scale * ((w0 * left.b[0] + w1 * right.b[0]) + (w2 * left.b[1] + w3 * right.b[1]));
  }
}

struct Position {
  int32_t y, x;
};

// Of a pixel that is counted through its image. 64 bits take a division several times as long.
__device__ Position position(int64_t i, int32_t width) {
  const int32_t y = i >> 32 == 0 ? unsigned(i) / unsigned(width) : i / width;
  return {y, int32_t(i - int64_t(y) * width)};
}

// --- to RGB ----------------------------------------------------------------------------------------------------------

// Lightness, of any floating type: see pixels.h, load.
struct Light {
  const void* base;
  Sample sample;

  template <typename T, int N>
  __device__ void read(int64_t i, float (&L)[N]) const {
    const T* from = static_cast<const T*>(base) + i;
    if constexpr (N == 1) {
      L[0] = to_float(*from);
    } else {
      const Pack<T, N> pack = get<N>(from);
#pragma unroll
      for (int k = 0; k < N; ++k) L[k] = to_float(pack.v[k]);
    }
  }
  template <int N>
  __device__ void load(int64_t i, float (&L)[N]) const {
    switch (sample) {
      case Sample::kFloat16: return read<__half>(i, L);
      case Sample::kBFloat16: return read<__nv_bfloat16>(i, L);
      default: return read<float>(i, L);
    }
  }
};

template <int N, bool kPreserveLightness, typename T>
__device__ void render_at(const Scene<T>& scene, const Light& light, const Channels& rgb, int64_t image, int64_t start,
                          int64_t i, Exchange& exchange) {
  const Position p = position(i, scene.width);
  float L[N], a[N], b[N];
  light.load(image * scene.pixels + i, L);
  upsample(scene, image, p.y, p.x, L, a, b);
  Planes<N> result;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Triple c = lab_to_srgb<kPreserveLightness>(L[k], a[k], b[k]);
    result[0][k] = c.x, result[1][k] = c.y, result[2][k] = c.z;
  }
  store<true>(rgb, image, scene.pixels, start, exchange, result);
}

// `vectors`: all of memory is aligned to quads, and no quad reaches over the end of a row.
template <typename T, bool kPreserveLightness>
__global__ void __launch_bounds__(kThreads, kPreserveLightness ? 3 : 4)
    render_pixels(Scene<T> scene, Light light, Channels rgb, bool vectors) {
  __shared__ Exchange exchanges[kWarps];
  const int lane = threadIdx.x % 32;
  Exchange& exchange = exchanges[threadIdx.x / 32];
  for_each_tile<4>(scene.images, scene.pixels, [&](int64_t image, int64_t start) {
    const int64_t end = start + kTile;
    if (vectors && end <= scene.pixels) {
      render_at<4, kPreserveLightness>(scene, light, rgb, image, start, start + 4 * lane, exchange);
    } else {
      for (int64_t i = start + lane; i < end && i < scene.pixels; i += 32)
        render_at<1, kPreserveLightness>(scene, light, rgb, image, i, i, exchange);
    }
  });
}

// --- to the chroma planes of a video frame ---------------------------------------------------------------------------

// Samples before and after one along a side, their share and its own: on a sample, between two, or no subsampling.
struct Taps {
  int step, before, after;
  float own, other;

  Taps(int64_t step, bool cosited)
      : step(int(step)), before(step == 2 && cosited), after(step == 2), own(step == 2 ? 0.5f : 1.0f),
        other(cosited ? 0.25f : 0.5f) {}
  __device__ float share(int k) const { return k == 0 ? own : other; }
};

template <typename S>
struct Luma {
  const S* base;
  int64_t row, image;  // samples apart
  int32_t height, width;
  Taps down, across;
  float black, scale;
  bool vectors;  // quads of each row are aligned

  __device__ const S* row_at(int64_t i, int32_t y, int k) const {
    return base + i * image + row * inside(down.step * y + k, height);
  }

  // 0 at black and 1 at white, at the chroma sample (y, x). Samples beyond the border repeat it.
  __device__ float one(int64_t i, int32_t y, int32_t x) const {
    float sum = 0.0f;
    for (int k = -down.before; k <= down.after; ++k) {
      const S* from = row_at(i, y, k);
      for (int m = -across.before; m <= across.after; ++m) {
        sum += down.share(k) * across.share(m) * float(from[inside(across.step * x + m, width)]);
      }
    }
    return (sum - black) * scale;
  }

  __device__ void at(int64_t i, int32_t y, int32_t x, float (&out)[1]) const { out[0] = one(i, y, x); }

  __device__ void at(int64_t i, int32_t y, int32_t x, float (&out)[4]) const {
    if (!vectors || across.step * (x + 4) > width) {
#pragma unroll 1
      for (int k = 0; k < 4; ++k) {
        const float luma = one(i, y, x + k);
#pragma unroll
        for (int m = 0; m < 4; ++m) out[m] = m == k ? luma : out[m];  // no index into registers
      }
      return;
    }
    float sum[9] = {};  // the columns step x - 1 .. step x + 7
    for (int k = -down.before; k <= down.after; ++k) {
      const S* from = row_at(i, y, k) + across.step * x;
      const float share = down.share(k);
      const Pack<S, 4> first = get<4>(from);
#pragma unroll
      for (int m = 0; m < 4; ++m) sum[1 + m] += share * float(first.v[m]);
      if (across.step == 2) {
        const Pack<S, 4> second = get<4>(from + 4);
#pragma unroll
        for (int m = 0; m < 4; ++m) sum[5 + m] += share * float(second.v[m]);
        if (across.before) sum[0] += share * float(from[x == 0 ? 0 : -1]);
      }
    }
    const float before = across.before ? across.other : 0.0f;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float between = before * sum[2 * m] + across.own * sum[2 * m + 1] + across.other * sum[2 * m + 2];
      const float luma = across.step == 1 ? sum[1 + m] : between;
      out[m] = (luma - black) * scale;
    }
  }
};

template <int N, typename T, typename S>
__device__ void chroma_at(const Scene<T>& scene, const Luma<S>& luma, const UvJob& job, int64_t image, int64_t i,
                          S (&u)[N], S (&v)[N]) {
  const Position p = position(i, scene.width);
  float y[N], L[N], a[N], b[N];
  luma.at(image, p.y, p.x, y);
#pragma unroll
  for (int k = 0; k < N; ++k) L[k] = grey_lightness(y[k]);
  upsample(scene, image, p.y, p.x, L, a, b);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Chroma c = chroma_of(job, y[k], L[k], a[k], b[k]);
    u[k] = S(int32_t(c.u)), v[k] = S(int32_t(c.v));
  }
}

// `vectors`: the planes are aligned to quads, and no quad reaches over the end of a row.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, 3)
    render_chroma(Scene<T> scene, Luma<S> luma, UvJob job, S* u, S* v, bool vectors) {
  const int lane = threadIdx.x % 32;
  const int64_t pixels = scene.pixels;
  for_each_tile<4>(scene.images, pixels, [&](int64_t image, int64_t start) {
    if (vectors) {
      const int64_t i = start + 4 * lane;
      if (i >= pixels) return;  // whole quads: pixels is a multiple of four
      Pack<S, 4> us, vs;
      chroma_at(scene, luma, job, image, i, us.v, vs.v);
      put_global(u + image * pixels + i, us);
      put_global(v + image * pixels + i, vs);
    } else {
      for (int64_t i = start + lane; i < start + kTile && i < pixels; i += 32)
        chroma_at(scene, luma, job, image, i, *reinterpret_cast<S(*)[1]>(u + image * pixels + i),
                  *reinterpret_cast<S(*)[1]>(v + image * pixels + i));
    }
  });
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    look_up_samples(const S* samples, const float* table, float* out, int64_t n, bool vectors) {
  const int lane = threadIdx.x % 32;
  for_each_tile<4>(1, n, [&](int64_t, int64_t start) {
    if (vectors && start + kTile <= n) {
      const int64_t i = start + 4 * lane;
      const Pack<S, 4> from = get<4>(samples + i);
      Pack<float, 4> to;
#pragma unroll
      for (int k = 0; k < 4; ++k) to.v[k] = __ldg(table + from.v[k]);
      put_global(out + i, to);
    } else {
      for (int64_t i = start + lane; i < start + kTile && i < n; i += 32) out[i] = __ldg(table + samples[i]);
    }
  });
}

// --- launches --------------------------------------------------------------------------------------------------------

template <typename T>
Scene<T> scene_of(const RenderProblem& p) {
  return {static_cast<const T*>(p.ab), static_cast<const T*>(p.guide), p.batch, p.height * p.width, int32_t(p.width),
          int32_t(p.low_height), int32_t(p.low_width), p.rows, p.columns, p.sharpness, p.floor};
}

// Whether four neighbours of a result that is `width` wide are one access in it, and in the tables of columns.
bool in_quads(const RenderProblem& p) {
  return p.width % 4 == 0 && aligned(p.columns.at, 16) && aligned(p.columns.beyond, 16);
}

template <typename T>
cudaError_t render_of(const RenderProblem& p, const Light& light, const Channels& rgb, bool preserve_lightness,
                      cudaStream_t stream) {
  const bool vectors = in_quads(p) && aligned(light.base, 4 * bytes_of(light.sample)) &&
                       aligned(rgb.base, 4 * bytes_of(rgb.sample));
  return launch<4>(preserve_lightness ? render_pixels<T, true> : render_pixels<T, false>, p.batch, p.height * p.width,
                   stream, scene_of<T>(p), light, rgb, vectors);
}

template <typename S>
Luma<S> luma_of(const YuvLayout& yuv, const void* base, int64_t height, int64_t width, int64_t row, int64_t image) {
  const bool vectors = aligned(base, 4 * sizeof(S)) && row % 4 == 0 && image % 4 == 0;
  return {static_cast<const S*>(base), row, image, int32_t(height), int32_t(width), Taps(yuv.down, yuv.cosited_down),
          Taps(yuv.across, yuv.cosited_across), yuv.black, 1.0f / yuv.luma_span, vectors};
}

template <typename T, typename S>
cudaError_t render_uv_of(const RenderProblem& p, const Luma<S>& luma, const UvJob& job, void* u, void* v,
                         cudaStream_t stream) {
  const bool vectors = in_quads(p) && aligned(u, 4 * sizeof(S)) && aligned(v, 4 * sizeof(S));
  return launch<4>(render_chroma<T, S>, p.batch, p.height * p.width, stream, scene_of<T>(p), luma, job,
                   static_cast<S*>(u), static_cast<S*>(v), vectors);
}

template <typename S>
cudaError_t render_uv_to(const RenderProblem& p, const Luma<S>& luma, const UvJob& job, void* u, void* v,
                         cudaStream_t stream) {
  switch (p.storage) {
    case Storage::kFloat32: return render_uv_of<float>(p, luma, job, u, v, stream);
    case Storage::kFloat16: return render_uv_of<__half>(p, luma, job, u, v, stream);
    case Storage::kBFloat16: return render_uv_of<__nv_bfloat16>(p, luma, job, u, v, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename S>
cudaError_t look_up_of(const void* samples, const float* table, float* out, int64_t n, cudaStream_t stream) {
  const bool vectors = aligned(samples, 4 * sizeof(S)) && aligned(out, 16);
  return launch<4>(look_up_samples<S>, 1, n, stream, static_cast<const S*>(samples), table, out, n, vectors);
}

}  // namespace

cudaError_t render(const RenderProblem& problem, const void* L, Sample light, const Channels& rgb,
                   bool preserve_lightness, cudaStream_t stream) {
  const Light from{L, light};
  switch (problem.storage) {
    case Storage::kFloat32: return render_of<float>(problem, from, rgb, preserve_lightness, stream);
    case Storage::kFloat16: return render_of<__half>(problem, from, rgb, preserve_lightness, stream);
    case Storage::kBFloat16: return render_of<__nv_bfloat16>(problem, from, rgb, preserve_lightness, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t render_uv(const RenderProblem& problem, const YuvLayout& yuv, const void* luma, int64_t luma_height,
                      int64_t luma_width, int64_t row, int64_t image, void* u, void* v, cudaStream_t stream) {
  const UvJob job = uv_job(yuv.red, yuv.blue, yuv.xyz_to_rgb, yuv.chroma_span, yuv.bits);
  if (yuv.bits == 8)
    return render_uv_to(problem, luma_of<uint8_t>(yuv, luma, luma_height, luma_width, row, image), job, u, v, stream);
  return render_uv_to(problem, luma_of<uint16_t>(yuv, luma, luma_height, luma_width, row, image), job, u, v, stream);
}

cudaError_t look_up(const void* samples, bool wide, const float* table, float* out, int64_t n, cudaStream_t stream) {
  return wide ? look_up_of<uint16_t>(samples, table, out, n, stream)
              : look_up_of<uint8_t>(samples, table, out, n, stream);
}

}  // namespace fastcolor::cuda
