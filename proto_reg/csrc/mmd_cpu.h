// One anchored MMD as the CPU kernel receives it, with plain pointers. It does what anchored_mmd_loss in
// proto_reg/kernels/mmd.py does, against which it is tested. cpu_ops.cpp and step_cpu.cpp call it.
#pragma once

#include <cstdint>
#include <vector>

#include "sinkhorn_cpu.h"

namespace proto_reg {

struct MmdProblem {
  // In. Contiguous.
  const float* z;              // (rows, dim)
  const float* anchors;        // (groups, dim)
  const int64_t* assignments;  // (rows,); a row outside [0, groups) is left out
  const bool* mask;            // (rows,); false leaves a row out; null: no row
  int64_t rows, groups, dim;
  double std;                  // standard deviation around each anchor
  std::vector<double> scales;  // bandwidths, in units of dim std^2
  bool unbiased;               // true: U-statistic; false: V-statistic
  bool by_mass;                // true: a cluster weighs as many rows as it has; false: 1

  // Out.
  float* loss;      // ()
  float* gradient;  // (rows, dim)
};

// The result does not depend on `parallel_for`, because the data alone decide how clusters are cut into blocks.
void mmd_cpu(const MmdProblem& problem, ParallelFor parallel_for);

}  // namespace proto_reg
