// One anchored MMD under the Gaussian mixture kernel with the analytic target, as the CPU kernel receives it: plain
// pointers, no torch. The contract is that of anchored_mmd_loss in proto_reg/kernels/mmd.py, which judges it.
#pragma once

#include <cstdint>
#include <vector>

#include "sinkhorn_cpu.h"

namespace proto_reg {

struct MmdProblem {
  // In. Contiguous.
  const float* z;              // (rows, dim)
  const float* anchors;        // (groups, dim)
  const int64_t* assignments;  // (rows,); outside [0, groups): left out
  const bool* mask;            // (rows,), false: left out; null: none
  int64_t rows, groups, dim;
  double std;                  // of the normal distribution around each anchor
  std::vector<double> scales;  // of the bandwidths, in units of dim std^2
  bool unbiased;               // U-statistic, or V
  bool by_mass;                // clusters weigh as many rows as they have, or 1

  // Out.
  float* loss;      // ()
  float* gradient;  // (rows, dim)
};

// Bits do not depend on `parallel_for`: how clusters are cut into blocks is a function of the data alone.
void mmd_cpu(const MmdProblem& problem, ParallelFor parallel_for);

}  // namespace proto_reg
