// The layer's balanced training step, from latents to the direction that is attached to them, with plain pointers.
// It does what balanced_step_plain in proto_reg/kernels/step.py does. cpu_ops.cpp calls it.
#pragma once

#include <cstdint>
#include <vector>

#include "sinkhorn_cpu.h"

namespace proto_reg {

// A product too large for one thread: out (rows, columns) = a (rows, inner) b (inner, columns). All are contiguous. A
// transposed matrix lies in memory as (columns, rows).
struct Product {
  const float* a;
  bool a_transposed;
  const float* b;
  bool b_transposed;
  int64_t rows, inner, columns;
  float* out;
};
using Multiply = void (*)(const Product& product);

enum class Similarity : int32_t { cosine, dot, euclidean };

struct StepProblem {
  // In. Contiguous.
  const float* z;           // (rows, dim)
  const bool* mask;         // (rows,); false leaves a row out; null: no row
  float* prototypes;        // (groups, dim); moved if `last_prototypes` is given
  const float* marginals;   // (groups,); null: uniform
  int64_t rows, groups, dim;
  Similarity kind;
  double std;        // standard deviation around each prototype
  double sharpness;  // scores are multiplied with it before temperature and epsilon
  double epsilon;
  int64_t num_iters;
  double tol;  // < 0: always num_iters iterations
  bool isolate;
  double temperature;
  std::vector<double> scales;
  bool unbiased, by_mass;
  double prototype_weight, mmd_weight;
  double follow_rate;
  double shares[2];  // the share of each weight now; prototypes follow only if the first is not 0

  // State that the step adds to; null: not kept.
  float *sums, *weight_sums, *last_prototypes;  // the follower's, (groups, dim), (groups,) and (groups, dim)
  int64_t *usage, *steps;     // the meter's, (groups,), and the layer's, ()
  float* totals;              // the meter's, (4,)
  float* ring;                // the last latents, (slots, dim)
  int64_t *written, slots, at_once;

  // Out.
  float* direction;                        // (rows, dim)
  float* step;                             // (groups, dim)
  float *loss, *prototype_loss, *mmd_loss; // ()
  float *scores, *codes;                   // (rows, groups)
  int64_t* assignments;                    // (rows,)
};

void step_cpu(const StepProblem& problem, ParallelFor parallel_for, Multiply multiply);

}  // namespace proto_reg
