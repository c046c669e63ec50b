// One of a Sinkhorn problem's independent matrices, and how its rows are cut into chunks: what every form of the CPU
// kernel (small, linear, logarithmic) gets.
#pragma once

#include "cpu_half.h"

namespace proto_reg { namespace {

// Chunks depend on the shape alone, so that results do not depend on the number of threads. Column sums are kept for
// each chunk: its rows are few enough for float32, and the chunks are few enough for their sums to cost nothing.
struct Chunks {
  int64_t rows, size, count, padded;  // padded: columns, rounded up to whole vectors

  Chunks(int64_t rows_, int64_t columns) : rows(rows_), padded((columns + 15) / 16 * 16) {
    constexpr int64_t SMALL = 1 << 15, FEWEST = 32, MOST = 256;
    size = rows * columns <= SMALL && rows <= MOST ? rows : std::clamp((rows + 255) / 256 * 4, FEWEST, MOST);
    count = (rows + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * size); }
};

using V8 = Floats<8>::V;

// Half precision is converted row by row, so that all computation is in float32.
struct Group {
  const void* scores;
  Dtype dtype;
  const float* marginals;  // null: uniform
  const float* weights;    // null: 1
  int64_t rows, columns;
  double marginals_total, epsilon, temperature, total_weight, gradient_scale;
  bool isolate;
  void* codes;     // null: not wanted
  void* gradient;  // null: not wanted

  float weight(int64_t i) const { return weights ? weights[i] : 1.f; }
  double marginal(int64_t k) const { return marginals ? marginals[k] / marginals_total : 1.0 / columns; }

  // Row i of the scores. Half precision is converted into `buffer` by vectors of type V.
  template <class V = V8>
  INLINE const float* row(int64_t i, float* buffer) const {
    if (dtype == Dtype::f32) return static_cast<const float*>(scores) + i * columns;
    widen<V>(dtype, static_cast<const uint16_t*>(scores) + i * columns, columns, buffer);
    return buffer;
  }

  // Where row i of an output is to be written: in place, or into `buffer`, which `finish` converts. null stays null.
  float* output(void* matrix, int64_t i, float* buffer) const {
    if (!matrix) return nullptr;
    return dtype == Dtype::f32 ? static_cast<float*>(matrix) + i * columns : buffer;
  }
  void finish(const float* row, void* matrix, int64_t i) const {
    if (row && dtype != Dtype::f32) narrow<V8>(dtype, row, columns, static_cast<uint16_t*>(matrix) + i * columns);
  }
};

}}  // namespace proto_reg
