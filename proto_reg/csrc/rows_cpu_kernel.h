// Row by row steps of the layer for one instruction set. cpu_kernel_table.h puts them into its table, and rows_cpu.cpp
// calls them there.
#pragma once

#include "cpu_vector.h"

namespace proto_reg { namespace {

// Calls body(column, present) for every vector of a row. Only the first `present` lanes of it are in the row.
template <int64_t LANES, class Body>
INLINE void each_vector(int64_t dim, const Body& body) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) body(d, LANES);
  if (d < dim) body(d, dim - d);
}

template <class V>
inline float dot(const float* x, const float* y, int64_t dim) {
  V total{};
  each_vector<LANES_OF<V>>(dim, [&](int64_t d, int64_t present) ALWAYS_INLINE {
    total += load_first<V>(x + d, present) * load_first<V>(y + d, present);
  });
  return sum(total);
}

template <class V>
inline float squared_distance(const float* x, const float* y, int64_t dim) {
  V total{};
  each_vector<LANES_OF<V>>(dim, [&](int64_t d, int64_t present) ALWAYS_INLINE {
    const V difference = load_first<V>(x + d, present) - load_first<V>(y + d, present);
    total += difference * difference;
  });
  return sum(total);
}

// a x + b y
template <class V>
inline void combine(float a, const float* x, float b, const float* y, int64_t dim, float* out) {
  each_vector<LANES_OF<V>>(dim, [&](int64_t d, int64_t present) ALWAYS_INLINE {
    store_first(out + d, a * load_first<V>(x + d, present) + b * load_first<V>(y + d, present), present);
  });
}

template <class V>
inline bool finite(const float* x, int64_t dim) {
  V total{};
  each_vector<LANES_OF<V>>(
      dim, [&](int64_t d, int64_t present) ALWAYS_INLINE { total += load_first<V>(x + d, present) * 0.0f; });
  return sum(total) == 0;
}

// out (rows, columns) = a b. Rows of a lie `row` floats apart, its columns `inner_step`. Up to 2 LANES floats behind
// b (inner, columns) are read.
template <class V>
inline void product(const float* a, int64_t row, int64_t inner_step, const float* b, int64_t rows, int64_t inner,
                    int64_t columns, float* out) {
  constexpr int64_t LANES = LANES_OF<V>, ROWS = 4, VECTORS = 2;
  for (int64_t i = 0; i < rows; i += ROWS)
    for (int64_t d = 0; d < columns; d += VECTORS * LANES) {
      V sums[ROWS][VECTORS]{};
      const float* from[ROWS];
      for (int64_t r = 0; r < ROWS; ++r) from[r] = a + std::min(i + r, rows - 1) * row;
      for (int64_t j = 0; j < inner; ++j)
#pragma GCC unroll 2
        for (int64_t v = 0; v < VECTORS; ++v) {
          const V x = load<V>(b + j * columns + d + v * LANES);
#pragma GCC unroll 4
          for (int64_t r = 0; r < ROWS; ++r) sums[r][v] += from[r][j * inner_step] * x;
        }
      for (int64_t r = 0; r < std::min(ROWS, rows - i); ++r)
        for (int64_t v = 0; v < VECTORS && d + v * LANES < columns; ++v)
          store_first(out + (i + r) * columns + d + v * LANES, sums[r][v], columns - d - v * LANES);
    }
}

}}  // namespace proto_reg
