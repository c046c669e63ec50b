// What the MMD kernels of all instruction sets start from: the rows sorted by cluster, and the constants of the mixture
// of Gaussians. mmd_cpu_clusters.cpp computes both, and solve_mmd in mmd_cpu_kernel.h uses them.
#pragma once

#include <cstdint>
#include <vector>

#include "mmd_cpu.h"

namespace proto_reg {

// The latents of one prototype: `count` of them, at least two, from `first` on in the sorted rows.
struct Cluster {
  int64_t group, first, count;
};

// Rows sorted by cluster. A row that is left out, or is alone in its cluster, is not among them; its gradient becomes
// 0.
struct Sorted {
  std::vector<Cluster> clusters;
  std::vector<int64_t> rows;
  int64_t counted = 0;  // rows that are not left out

  explicit Sorted(const MmdProblem& problem);
};

// The constants of one bandwidth: of its kernel, and of the kernel's expectation a(r) under N(0, std^2 I).
struct Scale {
  bool squares;       // its exponential is the square of the one before
  float rate, slope;  // exp2(rate d) / number, and its derivative by d over it
  float a_rate, a_value, a_slope;
};

struct Mixture {
  std::vector<Scale> scales;  // from wide to narrow
  double self = 0;            // b = E k(y, y')

  Mixture(std::vector<double> widths, double dim, double std);
};

}  // namespace proto_reg
