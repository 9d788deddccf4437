// The chroma of a video sample from its luma and its Lab, shared by the C++ and the CUDA kernels. See
// reference/render.py: render_uv.
#pragma once
#include "common/lab_math.h"

namespace fastcolor {

struct UvJob {
  float red, blue, matrix[9];         // weights in luma, XYZ / white to linear RGB
  float of_u, of_v, middle, largest;  // from differences to levels; + 1/2 in `middle` rounds
};

// matrix: [3, 3], row by row.
inline UvJob uv_job(float red, float blue, const float* matrix, float chroma_span, int bits) {
  UvJob job{red, blue, {}, chroma_span / (2.0f * (1.0f - blue)), chroma_span / (2.0f * (1.0f - red)),
            float(1 << (bits - 1)) + 0.5f, float((1 << bits) - 1)};
  memcpy(job.matrix, matrix, sizeof job.matrix);
  return job;
}

FC_INLINE float between(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// L of the grey with luma y, in [0, 100].
FC_INLINE float grey_lightness(float y) {
  return between(116.0f * lab_f(srgb_to_linear(between(y, 0.0f, 1.0f))) - 16.0f, 0.0f, 100.0f);
}

// R', G', B' of a colour, also beyond [0, 1].
FC_INLINE Triple unclipped_rgb(float L, float a, float b, const float* m) {
  const float fy = (L + 16.0f) * (1.0f / 116.0f);
  const float x = lab_f_inverse(fy + a * 0.002f), y = lab_f_inverse(fy), z = lab_f_inverse(fy - b * 0.005f);
  return {linear_to_srgb(m[0] * x + m[1] * y + m[2] * z), linear_to_srgb(m[3] * x + m[4] * y + m[5] * z),
          linear_to_srgb(m[6] * x + m[7] * y + m[8] * z)};
}

// The share of the chroma that keeps a channel, `difference` above the luma y, inside [0, 1].
FC_INLINE float room(float difference, float y) {
  const float bound = difference > 0.0f ? 1.0f - y : -y;
  const float t = bound / (difference == 0.0f ? 1.0f : difference);
  return difference == 0.0f ? 1.0f : between(t, 0.0f, 1.0f);
}

struct Chroma {
  float u, v;  // levels of Cb and Cr, cut off they are rounded
};

// nan is neutral.
FC_INLINE float level_of(const UvJob& job, float x) { return x == x ? between(x, 0.0f, job.largest) : job.middle; }

// grey: the lightness of the luma.
FC_INLINE Chroma chroma_of(const UvJob& job, float luma, float grey, float a, float b) {
  const float red = job.red, blue = job.blue, green = 1.0f - red - blue;
  float L = grey;
  FC_UNROLL  // a loop inside would keep the loop over samples from vectorizing
  for (int step = 0; step < 2; ++step) {
    const Triple c = unclipped_rgb(L, a, b, job.matrix);
    const float own = red * clip(c.x) + green * clip(c.y) + blue * clip(c.z);
    L = between(L + grey - grey_lightness(own), 0.0f, 100.0f);
  }
  const Triple c = unclipped_rgb(L, a, b, job.matrix);
  const float own = red * c.x + green * c.y + blue * c.z, y = between(luma, 0.0f, 1.0f);
  const float dr = c.x - own, dg = c.y - own, db = c.z - own;
  const float t0 = room(dr, y), t1 = room(dg, y), t2 = room(db, y);
  const float t01 = t0 < t1 ? t0 : t1, t = t01 < t2 ? t01 : t2;
  return {level_of(job, t * db * job.of_u + job.middle), level_of(job, t * dr * job.of_v + job.middle)};
}

}  // namespace fastcolor
