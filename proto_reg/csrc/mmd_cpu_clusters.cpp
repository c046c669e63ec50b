// Prepares an anchored MMD for the CPU kernels: sorts the rows by cluster, and computes the mixture's constants.
// solve_mmd in mmd_cpu_kernel.h calls it.
#include "mmd_cpu_clusters.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

namespace proto_reg {
namespace {

bool counts(const MmdProblem& problem, int64_t i) {
  const int64_t group = problem.assignments[i];
  return group >= 0 && group < problem.groups && (!problem.mask || problem.mask[i]);
}

}  // namespace

Sorted::Sorted(const MmdProblem& problem) : rows(problem.rows) {
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

Mixture::Mixture(std::vector<double> widths, double dim, double std) {
  std::sort(widths.begin(), widths.end(), std::greater<>());
  const double number = static_cast<double>(widths.size()), log2_e = 1.4426950408889634,
               noise = std * std;
  double previous = 0;
  int squarings = 0;
  for (const double width : widths) {
    const double variance = dim * width * noise;
    Scale scale;
    // A squaring doubles the relative error, so there are at most two in a row. The default scales cost two
    // exponentials.
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

}  // namespace proto_reg
