// What works on runs of pixels, for the instruction set that is chosen: for kernels that end or begin with Lab.
#pragma once
#include "cpu/runs.h"

namespace fastcolor::cpu {

// The functions of lab_body.h.
struct LabKernels {
  void (*load_words)(const View<const uint16_t>&, Run&, int64_t);
  void (*load_floats)(const View<const float>&, Run&, int64_t);
  void (*store_floats)(const Run&, const View<float>&, int64_t);
  void (*store_bytes)(const Run&, const View<uint8_t>&, int64_t);
  void (*store_words)(const Run&, const View<uint16_t>&, int64_t);
  void (*decode_srgb)(Run&, int64_t);
  void (*encode_srgb)(Run&, int64_t);
  void (*linear_run_to_lab)(Run&, int64_t);
  void (*lab_run_to_linear)(Run&, int64_t);
  void (*lab_run_to_linear_inside)(Run&, int64_t);
  void (*rgb_to_lab_gradient)(const Run&, Run&, int64_t);
  void (*clip_gradient)(const Run&, Run&, int64_t);
  void (*preserve_gradient)(const Run&, Run&, int64_t);
  void (*gamut_scales)(const Run&, float*, int64_t);
  void (*inverse_cbrt)(const float*, float*, int64_t);
  void (*power)(const float*, float, float*, int64_t);
};

const LabKernels& lab_kernels();

}  // namespace fastcolor::cpu
