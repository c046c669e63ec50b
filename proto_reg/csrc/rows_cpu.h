// What the layer does to latents and prototypes row by row, as functions of the same names in proto_reg/kernels/rows.py
// and follow.py do. Matrices are contiguous float32. cpu_ops.cpp and step_cpu.cpp call these.
#pragma once

#include <cstdint>

namespace proto_reg {

// Scales the rows of x (rows, dim) to length 1, and writes 1 / |x_i|. A row of zeros stays, and gets 1.
void unit_rows_cpu(const float* x, int64_t rows, int64_t dim, float* unit, float* inverse_norms);

// Turns the gradient by the unit rows into the gradient by x.
void unit_rows_pull_back_cpu(const float* gradient, const float* unit, const float* inverse_norms, int64_t rows,
                             int64_t dim, float* by_x);

// direction = weights[0] a / |a| + weights[1] b / |b|, norms over everything; *scale = weights[0] / |a|.
void balance_cpu(const float* a, const float* b, int64_t rows, int64_t dim, const double* weights, float* direction,
                 float* scale);

// |x|^2
float squares_cpu(const float* x, int64_t dim);

// The rows that count: those whose flag is true. With a stride of 0, one flag is for all rows; null: all rows count.
struct Counted {
  const bool* flags = nullptr;
  int64_t stride = 0;

  bool row(int64_t i) const { return !flags || flags[i * stride]; }
};

// Adds each finite row of x (rows, dim), times a weight, to the row `index` of sums, and the weight to that entry of
// weight_sums. The weight depends on the row's distance from its prototype, in units of `std`. Rows of sums lie `stride`
// apart, entries of weight_sums `weight_stride`.
void add_typical_cpu(const float* x, const int64_t* index, Counted counted, const float* prototypes, int64_t rows,
                     int64_t dim, int64_t groups, double std, float* sums, int64_t stride, float* weight_sums,
                     int64_t weight_stride);

// Counts for each prototype the finite rows of x (rows, dim) whose score (rows, prototypes) with it is highest. Adds to
// totals: both losses, 1, and the squared distances of those rows from their prototypes, per dimension.
void tally_cpu(const float* x, const float* scores, const float* prototypes, Counted counted, int64_t rows, int64_t dim,
               int64_t num_prototypes, float prototype_loss, float mmd_loss, int64_t* counts, float* totals);

// Writes rows of x (rows, dim) over the oldest of `ring` (slots, dim). Rows that are not finite or do not count become 0.
// Row number n is in slot n % slots; *written counts them. Of more than `at_once` rows every n-th one is taken.
void remember_cpu(const float* x, Counted counted, int64_t rows, int64_t dim, float* ring, int64_t slots, int64_t at_once,
                  int64_t* written);

// The column of the largest entry of each row (rows, columns), the first of several.
void argmax_cpu(const float* x, int64_t rows, int64_t columns, int64_t* index);

// out (rows, columns) = a (rows, inner) b (inner, columns), for small matrices, on one thread. Up to PAST_END floats
// behind b are read. a_transposed: a lies in memory as (inner, rows).
constexpr int64_t PAST_END = 32;
void product_cpu(const float* a, bool a_transposed, const float* b, int64_t rows, int64_t inner, int64_t columns,
                 float* out);

// by_z = gradient + |gradient| direction, and by_parameter = |gradient| step; the norm is that of the whole gradient.
void attach_cpu(const float* gradient, const float* direction, int64_t rows, int64_t dim, const float* step,
                int64_t step_size, float* by_z, float* by_parameter);

// Moves each prototype towards its sums / weight_sums, and starts sums and weight_sums at 0 again.
void follow_cpu(float* prototypes, float* sums, float* weight_sums, float* last_prototypes, int64_t rows, int64_t dim,
                float rate);

}  // namespace proto_reg
