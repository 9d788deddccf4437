// Cross-entropy against soft-encoded colours on the CPU: a pixel's labels pass through the first-level cache once,
// which leaves its loss and the gradient of its logits.
#pragma once
#include <cstdint>

#include "common/storage.h"
#include "cpu/labels.h"

namespace fastcolor::cpu {

// B images of N pixels, K labels.
struct CrossEntropyProblem {
  const void* logits;  // [B, K, N], or [B, N, K] with labels_last
  Storage storage;
  bool labels_last;
  int64_t images, pixels;
  LabelTables tables;
  const float* ab;          // [B, 2, N]
  const float* weights;     // [K], or null for 1
  const uint8_t* ignore;    // [B, N], nonzero for pixels without a loss; may be null
  const float* upstream;    // [B, N], factors of the gradient; may be null
  int64_t neighbors;        // labels that share a colour
  float sharpness;          // 1 / 2 sigma²
  bool mean;                // over the pixels that count, else the sum
  int threads;
};

// loss: the sum or the mean; may be null. losses: [B, N] of each pixel; may be null. grad: of the logits, in their
// storage and order; may be null. Sums over pixels are made in float64, in an order that does not depend on threads.
void cross_entropy(const CrossEntropyProblem& problem, float* loss, float* losses, void* grad);

}  // namespace fastcolor::cpu
