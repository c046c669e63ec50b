// The anchored MMD on the CPU: chooses the instruction set at run time and cuts the clusters into blocks of rows.
#include "mmd_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu_targets.h"

namespace proto_reg {
namespace {

// The latents of one prototype, at least two: `count` of them from `first` on in the sorted rows.
struct Cluster {
  int64_t group, first, count;
};

// Rows sorted by cluster; those of clusters of fewer than two, and those left out, are in none.
struct Sorted {
  std::vector<Cluster> clusters;
  std::vector<int64_t> rows;
  int64_t counted = 0;  // rows that are not left out

  explicit Sorted(const MmdProblem& problem) : rows(problem.rows) {
    std::vector<int64_t> place(problem.groups);
    for (int64_t i = 0; i < problem.rows; ++i)
      if (counts(problem, i)) ++counted, ++place[problem.assignments[i]];
    int64_t first = 0;
    for (int64_t group = 0; group < problem.groups; ++group) {
      const int64_t count = place[group];
      place[group] = count > 1 ? first : -1;
      if (count > 1) clusters.push_back({group, first, count}), first += count;
    }
    for (int64_t i = 0; i < problem.rows; ++i) {
      const bool member = counts(problem, i) && place[problem.assignments[i]] >= 0;
      if (member) rows[place[problem.assignments[i]]++] = i;
      else std::memset(problem.gradient + i * problem.dim, 0, sizeof(float) * problem.dim);
    }
    rows.resize(first);
  }

  static bool counts(const MmdProblem& problem, int64_t i) {
    const int64_t group = problem.assignments[i];
    return group >= 0 && group < problem.groups && (!problem.mask || problem.mask[i]);
  }
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

  Mixture(std::vector<double> widths, double dim, double std) {
    std::sort(widths.begin(), widths.end(), std::greater<>());
    const double number = static_cast<double>(widths.size()), log2_e = 1.4426950408889634,
                 noise = std * std;
    double previous = 0;
    int squarings = 0;
    for (const double width : widths) {
      const double variance = dim * width * noise;
      Scale scale;
      // Each doubles the relative error, hence two at most: the default scales cost two exponentials, not six.
      scale.squares = previous == 2 * variance && squarings < 2;
      squarings = scale.squares ? squarings + 1 : 0;
      scale.rate = static_cast<float>(-0.5 / variance * log2_e);
      scale.slope = static_cast<float>(-0.5 / (variance * number));
      scale.a_rate = static_cast<float>(-0.5 / (variance + noise) * log2_e);
      scale.a_value = static_cast<float>(std::pow(variance / (variance + noise), dim / 2) / number);
      scale.a_slope = static_cast<float>(-0.5 / (variance + noise));
      self += std::pow(variance / (variance + 2 * noise), dim / 2) / number;
      scales.push_back(scale);
      previous = variance;
    }
  }
};

// Memory that the thread keeps: a page fault costs more than a small problem. Nothing is initialised.
template <int SLOT>
float* kept(int64_t size) {
  static thread_local std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(size)) memory.resize(size);
  return memory.data();
}

#define ISA_SOURCE "mmd_cpu_isa.h"
#include "cpu_isas.h"

}  // namespace

void mmd_cpu(const MmdProblem& problem, ParallelFor parallel_for) {
  static const auto solve = fastest(baseline::solve, avx2::solve, avx512::solve);
  solve(problem, parallel_for);
}

}  // namespace proto_reg
