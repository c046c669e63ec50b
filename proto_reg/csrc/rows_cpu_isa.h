// What of rows_cpu.cpp is compiled once per instruction set; hence no include guard.

#define LANES int64_t{MACHINE_LANES}

#include "sinkhorn_cpu_vector.h"
#include "cpu_row_ends.h"

// body(column, present) for every vector of a row; of the last one only `present` lanes are there.
template <class Body>
INLINE void each_vector(int64_t dim, const Body& body) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) body(d, LANES);
  if (d < dim) body(d, dim - d);
}

inline float dot(const float* x, const float* y, int64_t dim) {
  V total{};
  each_vector(dim, [&](int64_t d, int64_t present) ALWAYS_INLINE {
    total += load_first(x + d, present) * load_first(y + d, present);
  });
  return sum(total);
}

inline float squared_distance(const float* x, const float* y, int64_t dim) {
  V total{};
  each_vector(dim, [&](int64_t d, int64_t present) ALWAYS_INLINE {
    const V difference = load_first(x + d, present) - load_first(y + d, present);
    total += difference * difference;
  });
  return sum(total);
}

// a x + b y
inline void combine(float a, const float* x, float b, const float* y, int64_t dim, float* out) {
  each_vector(dim, [&](int64_t d, int64_t present) ALWAYS_INLINE {
    store_first(out + d, a * load_first(x + d, present) + b * load_first(y + d, present), present);
  });
}

inline bool finite(const float* x, int64_t dim) {
  V total{};
  each_vector(dim, [&](int64_t d, int64_t present) ALWAYS_INLINE { total += load_first(x + d, present) * 0.0f; });
  return sum(total) == 0;
}

#undef LANES
