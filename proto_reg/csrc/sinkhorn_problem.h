// One Sinkhorn problem as every CPU and CUDA kernel receives it; binding.h and step_cpu.cpp make it. A kernel does what
// proto_reg/kernels/sinkhorn_reference.py does, against which it is tested.
#pragma once

#include <cstdint>

namespace proto_reg {

enum class Dtype : int32_t { f32, f16, bf16 };

struct SinkhornProblem {
  // In. Matrices are contiguous, (groups, rows, columns), in `dtype`; everything else is float32.
  const void* scores;
  const float* marginals;    // (columns,), or (groups, columns) with a stride of `columns`; null: 1 / columns each
  int64_t marginals_stride;  // 0 or columns
  const float* weights;      // (groups, rows) >= 0; null: 1 each
  int64_t groups, rows, columns;
  Dtype dtype;
  double epsilon;
  int64_t num_iters;
  double tol;    // < 0: always num_iters iterations
  bool isolate;  // a row with a NaN, a +inf or nothing but -inf gets weight 0 and NaN codes

  // Out.
  void* codes;        // like scores; null: not wanted
  float* potentials;  // (groups, columns); null, on the CPU: not wanted

  // Cross-entropy of softmax(scores / temperature) against the codes; wanted if `loss` is not null.
  double temperature;
  float* loss;     // (groups,)
  void* gradient;  // like scores

  int64_t* iterations;  // (groups,), on the CPU: how many there were; null: not wanted
};

// The gradient of a problem's codes and potentials through all its iterations, on the CPU. Everything is float32.
struct SinkhornGradient {
  SinkhornProblem forward;     // its outputs are not wanted
  const float* by_codes;       // the loss's gradient by the codes, like the scores
  const float* by_potentials;  // (groups, columns), or null: 0

  // Out.
  float* by_scores;
  float* by_marginals;  // (groups, columns), by shares that sum to 1; null: not wanted
  float* by_weights;    // (groups, rows); null: not wanted
};

}  // namespace proto_reg
