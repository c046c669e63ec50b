// What the MMD kernels of all instruction sets start from: the rows sorted by cluster, and the numbers of the kernel's
// mixture. mmd_cpu.cpp computes both.
#pragma once

#include <cstdint>
#include <vector>

#include "mmd_cpu.h"

namespace proto_reg {

// The latents of one prototype, at least two: `count` of them from `first` on in the sorted rows.
struct Cluster {
  int64_t group, first, count;
};

// Rows sorted by cluster; those of clusters of fewer than two, and those left out, are in none.
struct Sorted {
  std::vector<Cluster> clusters;
  std::vector<int64_t> rows;
  int64_t counted = 0;  // rows that are not left out

  explicit Sorted(const MmdProblem& problem);
};

// What the kernel of one bandwidth is made of, and its expectations under N(0, std^2 I); all divided by their number.
struct Scale {
  bool squares;       // exp(-d / (2 variance)) is the square of the one before
  float rate, slope;  // exp2(rate d) / number, and its derivative by d over it
  float a_rate, a_value, a_slope;
};

struct Mixture {
  std::vector<Scale> scales;  // from wide to narrow
  double self = 0;            // b = E k(y, y')

  Mixture(std::vector<double> widths, double dim, double std);
};

}  // namespace proto_reg
