// Mean field of a pairwise field over labels on the CPU: one pass over the logits for each update, in which scores,
// softmax and features are made pixel by pixel, and only R numbers a pixel travel between pixels.
#pragma once
#include <cstdint>

#include "common/storage.h"

namespace fastcolor::cpu {

// B images, K labels, R columns of the label factors, O offsets, U updates (sweeps, times two on the checkerboard).
struct MeanFieldProblem {
  const void* logits;  // [B, K, H, W], or [B, H, W, K] with labels_last
  Storage storage;
  bool labels_last;
  int64_t batch, labels, height, width;
  int64_t axes;           // how many distributions the labels make
  const int64_t* counts;  // [axes] labels of each; they add up to K
  int64_t rank;
  const float* a;      // [K, R], s = A Bᵀ
  const float* b;      // [K, R]
  const float* guide;  // [B, H, W]
  int64_t offsets;
  const int64_t* dy;   // [O], every offset with its mirror image
  const int64_t* dx;   // [O]
  const float* space;  // [O], the weight of an offset between equal lightnesses
  float sharpness;     // 1 / sigma_light
  const float* prior;  // [B, R, H, W], what is added to every Σ_j w_ij F_j; may be null
  int64_t sweeps;
  bool checkerboard;
  float damping;
  bool uniform;  // start
  int threads;
};

// marginals: as the logits, in their storage and order; may be null.
// ab: [B, 2, H, W], Σ c q^(1/T) / Σ q^(1/T) with c = colors [K, 2] (0 on the other axis of separable labels); may be
// null. states: H and F of the start and of each update for mean_field_backward, else null: then a few rows of each are
// kept.
void mean_field(const MeanFieldProblem& problem, void* marginals, const float* colors, float temperature, float* ab,
                float* states);

// Where gradients go: logits are written, the others added to. `prior` may be null; guide, space and sharpness are all
// there or null together, and so are a and b.
struct MeanFieldGradients {
  float* logits;  // as the logits of the problem, in float32
  float *a, *b;   // [K, R]
  float* guide;   // [B, H, W]
  float* space;   // [O]
  float* sharpness;
  float* prior;  // [B, R, H, W]
};

// grad: of the marginals, in the storage and order of the logits. Nothing of N·K is kept: q comes again from the logits
// and the states.
void mean_field_backward(const MeanFieldProblem& problem, const void* grad, const float* states,
                         const MeanFieldGradients& to);

// Floats in `states`: [B, U + 1, 2 (H and F), H, R rounded up, W with margins].
int64_t mean_field_state_size(const MeanFieldProblem& problem);

// The exponential by itself, for the test of its bound: out[i] = 2^x[i], x[i] <= 0.
void exp2_of(const float* x, float* out, int64_t n);

}  // namespace fastcolor::cpu
