// What works on runs of pixels, for the instruction set that is chosen: for kernels that end or begin with Lab.
#pragma once
#include "cpu/runs.h"

namespace fastcolor::cpu {

// The functions of lab_body.h.
struct LabKernels {
  void (*load_words)(const View<const uint16_t>&, Run&, int64_t);  // to linear light
  void (*load_floats)(const View<const float>&, Run&, int64_t);
  void (*load_float16)(const View<const Float16>&, Run&, int64_t);
  void (*load_bfloat16)(const View<const BFloat16>&, Run&, int64_t);
  void (*store_bytes)(const Run&, const View<uint8_t>&, int64_t);
  void (*store_words)(const Run&, const View<uint16_t>&, int64_t);
  void (*store_floats)(const Run&, const View<float>&, int64_t);
  void (*store_float16)(const Run&, const View<Float16>&, int64_t);
  void (*store_bfloat16)(const Run&, const View<BFloat16>&, int64_t);
  void (*widen_float16)(const Float16*, float*, int64_t);
  void (*widen_bfloat16)(const BFloat16*, float*, int64_t);
  void (*decode_srgb)(Run&, int64_t);
  void (*encode_srgb)(Run&, int64_t);
  void (*linear_run_to_lab)(Run&, int64_t);
  void (*lab_run_to_linear)(const Run&, Run&, int64_t);
  void (*lab_run_to_linear_inside)(const Run&, Run&, int64_t);
  void (*rgb_to_lab_gradient)(const Run&, Run&, int64_t);
  void (*clip_gradient)(const Run&, Run&, int64_t);
  void (*preserve_gradient)(const Run&, Run&, int64_t);
  void (*gamut_scales)(const Run&, float*, int64_t);
  void (*inverse_cbrt)(const float*, float*, int64_t);
  void (*power)(const float*, float, float*, int64_t);
};

const LabKernels& lab_kernels();

// n pixels of floating channels to a run, from pixel `start` of an image on.
inline void load(const LabKernels& k, const Channels& from, int64_t image, int64_t pixels, int64_t start, Run& run,
                 int64_t n) {
  switch (from.sample) {
    case Sample::kFloat16: return k.load_float16(view<const Float16>(from, image, pixels, start), run, n);
    case Sample::kBFloat16: return k.load_bfloat16(view<const BFloat16>(from, image, pixels, start), run, n);
    default: return k.load_floats(view<const float>(from, image, pixels, start), run, n);
  }
}

// The other way, to any sample.
inline void store(const LabKernels& k, const Run& run, const Channels& to, int64_t image, int64_t pixels, int64_t start,
                  int64_t n) {
  switch (to.sample) {
    case Sample::kUint8: return k.store_bytes(run, view<uint8_t>(to, image, pixels, start), n);
    case Sample::kUint16: return k.store_words(run, view<uint16_t>(to, image, pixels, start), n);
    case Sample::kFloat32: return k.store_floats(run, view<float>(to, image, pixels, start), n);
    case Sample::kFloat16: return k.store_float16(run, view<Float16>(to, image, pixels, start), n);
    case Sample::kBFloat16: return k.store_bfloat16(run, view<BFloat16>(to, image, pixels, start), n);
  }
}

}  // namespace fastcolor::cpu
