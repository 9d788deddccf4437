// Mean field of a pairwise field over labels on the GPU: logits stay in shared memory for all sweeps of one launch, and
// only R numbers a pixel travel between pixels, through the L2 cache.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/storage.h"

namespace fastcolor::cuda {

// B images, K labels, R columns of the label factors, O offsets, U updates (sweeps, times two on the checkerboard).
// All pointers are to device memory.
struct MeanFieldProblem {
  const void* logits;  // [B, K, H, W], or [B, H, W, K] with labels_last
  Storage storage;
  bool labels_last;
  int64_t batch, labels, height, width;
  int64_t axes;  // how many distributions the labels make
  int64_t rank;
  int64_t offsets;
  int64_t reach_y, reach_x;  // the largest |dy| and |dx|
  const int* whole;          // [axes] labels of each, they add up to K; [O] dy; [O] dx: each offset and its mirror
  const float* a;            // [K, R], s = A Bᵀ
  const float* b;            // [K, R]
  const float* guide;        // [B, H, W]
  const float* space;        // [O], the weight of an offset between equal lightnesses
  const float* sharpness;    // [], 1 / sigma_light
  const float* prior;        // [B, R, H, W], what is added to every Σ_j w_ij F_j; may be null
  int64_t sweeps;
  bool checkerboard;
  float damping;
  bool uniform;  // start
};

// Floats of scratch memory that mean_field needs, without and with states, and mean_field_backward.
int64_t mean_field_scratch(const MeanFieldProblem& problem, bool states);
int64_t mean_field_backward_scratch(const MeanFieldProblem& problem);

// How many pixels' logits the shared memory of the current device holds at once: images of no more stay there for all
// sweeps, larger ones are read anew in each.
cudaError_t mean_field_resident_pixels(Storage storage, int64_t labels, int64_t rank, bool backward, int64_t* pixels);

// marginals: as the logits, in their storage and order; may be null.
// ab: [B, 2, H, W], Σ c q^(1/T) / Σ q^(1/T) with c = colors [K, 2] (0 on the other axis of separable labels); may be
// null. states: H and F of the start and of each update for mean_field_backward, [B, U + 1, 2, R, H, W]; may be null.
cudaError_t mean_field(const MeanFieldProblem& problem, void* marginals, const float* colors, float temperature,
                       float* ab, float* states, float* scratch, cudaStream_t stream);

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
cudaError_t mean_field_backward(const MeanFieldProblem& problem, const void* grad, const float* states,
                                const MeanFieldGradients& to, float* scratch, cudaStream_t stream);

}  // namespace fastcolor::cuda
