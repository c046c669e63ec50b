// Row by row steps of the layer on the CPU, on the widest vectors of this machine. One thread, since memory limits
// them. cpu_ops.cpp and step_cpu.cpp call them.
#include "rows_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_kernels.h"

namespace proto_reg {
namespace {

double norm(const float* x, int64_t rows, int64_t dim) {
  double squares = 0;
  for (int64_t i = 0; i < rows; ++i) squares += cpu_kernels().dot(x + i * dim, x + i * dim, dim);
  return std::sqrt(squares);
}

}  // namespace

float squares_cpu(const float* x, int64_t dim) { return cpu_kernels().dot(x, x, dim); }

void unit_rows_cpu(const float* x, int64_t rows, int64_t dim, float* unit, float* inverse_norms) {
  for (int64_t i = 0; i < rows; ++i, x += dim, unit += dim) {
    const float length = std::sqrt(cpu_kernels().dot(x, x, dim));
    inverse_norms[i] = length > 1e-12f ? 1 / length : 1;
    cpu_kernels().combine(inverse_norms[i], x, 0, x, dim, unit);
  }
}

void unit_rows_pull_back_cpu(const float* gradient, const float* unit, const float* inverse_norms, int64_t rows,
                             int64_t dim, float* by_x) {
  for (int64_t i = 0; i < rows; ++i, gradient += dim, unit += dim, by_x += dim)
    cpu_kernels().combine(inverse_norms[i], gradient, -inverse_norms[i] * cpu_kernels().dot(gradient, unit, dim), unit,
                          dim, by_x);
}

void balance_cpu(const float* a, const float* b, int64_t rows, int64_t dim, const double* weights, float* direction,
                 float* scale) {
  const double norms[] = {norm(a, rows, dim), norm(b, rows, dim)};
  float scales[2];
  for (int k = 0; k < 2; ++k) scales[k] = norms[k] > 0 ? static_cast<float>(weights[k] / norms[k]) : 0;
  cpu_kernels().combine(scales[0], a, scales[1], b, rows * dim, direction);
  *scale = scales[0];
}

void add_typical_cpu(const float* x, const int64_t* index, Counted counted, const float* prototypes, int64_t rows,
                     int64_t dim, int64_t groups, double std, float* sums, int64_t stride, float* weight_sums,
                     int64_t weight_stride) {
  const float unit = static_cast<float>(std * std * dim);
  for (int64_t i = 0; i < rows; ++i, x += dim) {
    if (!counted.row(i) || index[i] < 0 || index[i] >= groups || !cpu_kernels().finite(x, dim)) continue;
    const float spread = 1 + cpu_kernels().squared_distance(x, prototypes + index[i] * dim, dim) / unit;
    const float weight = 1 / (spread * spread);
    float* group = sums + index[i] * stride;
    cpu_kernels().combine(1, group, weight, x, dim, group);
    weight_sums[index[i] * weight_stride] += weight;
  }
}

void tally_cpu(const float* x, const float* scores, const float* prototypes, Counted counted, int64_t rows, int64_t dim,
               int64_t num_prototypes, float prototype_loss, float mmd_loss, int64_t* counts, float* totals) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i, x += dim, scores += num_prototypes) {
    if (!counted.row(i) || !cpu_kernels().finite(x, dim)) continue;
    int64_t nearest;
    argmax_cpu(scores, 1, num_prototypes, &nearest);
    counts[nearest] += 1;
    total += cpu_kernels().squared_distance(x, prototypes + nearest * dim, dim);
  }
  totals[0] += prototype_loss;
  totals[1] += mmd_loss;
  totals[2] += 1;
  totals[3] += static_cast<float>(total / dim);
}

void remember_cpu(const float* x, Counted counted, int64_t rows, int64_t dim, float* ring, int64_t slots, int64_t at_once,
                  int64_t* written) {
  const int64_t stride = rows > at_once ? rows / at_once : 1, taken = std::min(rows, at_once);
  const int64_t first = rows > at_once ? *written / at_once % stride : 0;
  for (int64_t i = 0; i < taken; ++i) {
    const int64_t row = first + i * stride;
    float* slot = ring + (*written + i) % slots * dim;
    if (counted.row(row) && cpu_kernels().finite(x + row * dim, dim))
      std::memcpy(slot, x + row * dim, sizeof(float) * dim);
    else
      std::memset(slot, 0, sizeof(float) * dim);
  }
  *written += taken;
}

void argmax_cpu(const float* x, int64_t rows, int64_t columns, int64_t* index) {
  for (int64_t i = 0; i < rows; ++i, x += columns) index[i] = std::max_element(x, x + columns) - x;
}

void product_cpu(const float* a, bool a_transposed, const float* b, int64_t rows, int64_t inner, int64_t columns,
                 float* out) {
  cpu_kernels().product(a, a_transposed ? 1 : inner, a_transposed ? rows : 1, b, rows, inner, columns, out);
}

void attach_cpu(const float* gradient, const float* direction, int64_t rows, int64_t dim, const float* step,
                int64_t step_size, float* by_z, float* by_parameter) {
  const float length = static_cast<float>(norm(gradient, rows, dim));
  cpu_kernels().combine(1, gradient, length, direction, rows * dim, by_z);
  for (int64_t i = 0; i < step_size; ++i) by_parameter[i] = length * step[i];
}

void follow_cpu(float* prototypes, float* sums, float* weight_sums, float* last_prototypes, int64_t rows, int64_t dim,
                float rate) {
  bool moved = rows == 1;  // the loss of a single one has no gradient, so no optimizer moves it
  for (int64_t i = 0; i < rows * dim; ++i) moved |= prototypes[i] != last_prototypes[i];
  if (!moved) return;
  for (int64_t k = 0; k < rows; ++k)
    if (weight_sums[k] >= std::numeric_limits<float>::min())  // smaller numbers have few digits, and no finite inverse
      cpu_kernels().combine(rate / weight_sums[k], sums + k * dim, 1 - rate, prototypes + k * dim, dim,
              prototypes + k * dim);
  std::memset(sums, 0, sizeof(float) * rows * dim);
  std::memset(weight_sums, 0, sizeof(float) * rows);
  std::memcpy(last_prototypes, prototypes, sizeof(float) * rows * dim);
}

}  // namespace proto_reg
