// Row by row steps of the layer on the CPU, on the widest vectors that run here. One thread: they are bound by memory.
#include "rows_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu_targets.h"
#include "sinkhorn.h"

namespace proto_reg {
namespace {

#define ISA_SOURCE "rows_cpu_isa.h"
#include "cpu_isas.h"

float dot(const float* x, const float* y, int64_t dim) {
  static const auto run = fastest(baseline::dot, avx2::dot, avx512::dot);
  return run(x, y, dim);
}

void combine(float a, const float* x, float b, const float* y, int64_t dim, float* out) {
  static const auto run = fastest(baseline::combine, avx2::combine, avx512::combine);
  run(a, x, b, y, dim, out);
}

float squared_distance(const float* x, const float* y, int64_t dim) {
  static const auto run = fastest(baseline::squared_distance, avx2::squared_distance, avx512::squared_distance);
  return run(x, y, dim);
}

bool finite(const float* x, int64_t dim) {
  static const auto run = fastest(baseline::finite, avx2::finite, avx512::finite);
  return run(x, dim);
}

double norm(const float* x, int64_t rows, int64_t dim) {
  double squares = 0;
  for (int64_t i = 0; i < rows; ++i) squares += dot(x + i * dim, x + i * dim, dim);
  return std::sqrt(squares);
}

}  // namespace

void unit_rows_cpu(const float* x, int64_t rows, int64_t dim, float* unit, float* inverse_norms) {
  for (int64_t i = 0; i < rows; ++i, x += dim, unit += dim) {
    const float length = std::sqrt(dot(x, x, dim));
    inverse_norms[i] = length > 1e-12f ? 1 / length : 1;
    combine(inverse_norms[i], x, 0, x, dim, unit);
  }
}

void unit_rows_pull_back_cpu(const float* gradient, const float* unit, const float* inverse_norms, int64_t rows,
                             int64_t dim, float* by_x) {
  for (int64_t i = 0; i < rows; ++i, gradient += dim, unit += dim, by_x += dim)
    combine(inverse_norms[i], gradient, -inverse_norms[i] * dot(gradient, unit, dim), unit, dim, by_x);
}

void balance_cpu(const float* a, const float* b, int64_t rows, int64_t dim, const double* weights, float* direction,
                 float* scale) {
  const double norms[] = {norm(a, rows, dim), norm(b, rows, dim)};
  float scales[2];
  for (int k = 0; k < 2; ++k) scales[k] = norms[k] > 0 ? static_cast<float>(weights[k] / norms[k]) : 0;
  combine(scales[0], a, scales[1], b, rows * dim, direction);
  *scale = scales[0];
}

void sums_by_group_cpu(const float* x, const int64_t* index, const bool* counted, int64_t counted_stride, int64_t rows,
                       int64_t dim, int64_t groups, float* sums) {
  std::memset(sums, 0, sizeof(float) * groups * (dim + 1));
  for (int64_t i = 0; i < rows; ++i, x += dim) {
    if ((counted && !counted[i * counted_stride]) || index[i] < 0 || index[i] >= groups || !finite(x, dim)) continue;
    float* group = sums + index[i] * (dim + 1);
    combine(1, group, 1, x, dim, group);
    group[dim] += 1;
  }
}

float tally_cpu(const float* x, const float* scores, const float* prototypes, const bool* counted,
                int64_t counted_stride, int64_t rows, int64_t dim, int64_t num_prototypes, int64_t* counts) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i, x += dim, scores += num_prototypes) {
    if ((counted && !counted[i * counted_stride]) || !finite(x, dim)) continue;
    const int64_t nearest = std::max_element(scores, scores + num_prototypes) - scores;
    counts[nearest] += 1;
    total += squared_distance(x, prototypes + nearest * dim, dim);
  }
  return static_cast<float>(total / dim);
}

void follow_cpu(float* prototypes, float* sums, float* counts, float* seen, int64_t rows, int64_t dim, float rate) {
  bool moved = false;
  for (int64_t i = 0; i < rows * dim; ++i) moved |= prototypes[i] != seen[i];
  if (!moved) return;
  for (int64_t k = 0; k < rows; ++k)
    if (counts[k] > 0)
      combine(rate / std::max(counts[k], 1.0f), sums + k * dim, 1 - rate, prototypes + k * dim, dim,
              prototypes + k * dim);
  std::memset(sums, 0, sizeof(float) * rows * dim);
  std::memset(counts, 0, sizeof(float) * rows);
  std::memcpy(seen, prototypes, sizeof(float) * rows * dim);
}

}  // namespace proto_reg
