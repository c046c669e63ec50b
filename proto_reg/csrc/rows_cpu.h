// What the layer does to latents and prototypes row by row: plain pointers, no torch. The contract is that of the
// functions of the same names in proto_reg/kernels/rows.py and follow.py. Matrices are contiguous float32.
#pragma once

#include <cstdint>

namespace proto_reg {

// Rows of x (rows, dim) at length 1, and 1 / |x_i|; a row of zeros stays, with 1.
void unit_rows_cpu(const float* x, int64_t rows, int64_t dim, float* unit, float* inverse_norms);

// The gradient by x from the one by its unit rows.
void unit_rows_pull_back_cpu(const float* gradient, const float* unit, const float* inverse_norms, int64_t rows,
                             int64_t dim, float* by_x);

// direction = weights[0] a / |a| + weights[1] b / |b|, norms over everything; *scale = weights[0] / |a|.
void balance_cpu(const float* a, const float* b, int64_t rows, int64_t dim, const double* weights, float* direction,
                 float* scale);

// |x|^2
float squares_cpu(const float* x, int64_t dim);

// What is left out of the functions below: rows where `flags` is false; with a stride of 0 one flag is for all; null: none.
struct Counted {
  const bool* flags = nullptr;
  int64_t stride = 0;

  bool row(int64_t i) const { return !flags || flags[i * stride]; }
};

// Adds each finite row of x (rows, dim), times the weight that its distance from prototypes (groups, dim) in units of
// `std` gives it, to the row `index` of sums, whose rows lie `stride` apart, and the weight to the entry of mass, which lie
// `stride_mass` apart.
void add_typical_cpu(const float* x, const int64_t* index, Counted counted, const float* prototypes, int64_t rows,
                     int64_t dim, int64_t groups, double std, float* sums, int64_t stride, float* mass,
                     int64_t stride_mass);

// Adds to counts (prototypes,) the finite rows of x (rows, dim) that score (rows, prototypes) highest with each, and to
// totals both losses, 1, and the squared distances of those rows from those prototypes, per dimension.
void tally_cpu(const float* x, const float* scores, const float* prototypes, Counted counted, int64_t rows, int64_t dim,
               int64_t num_prototypes, float prototype_loss, float mmd_loss, int64_t* counts, float* totals);

// The column of the largest entry of each row (rows, columns), the first of several.
void argmax_cpu(const float* x, int64_t rows, int64_t columns, int64_t* index);

// out (rows, columns) = a (rows, inner) b (inner, columns), for small ones: one thread, and up to PAST_END floats behind b
// are read. a_transposed: a lies as (inner, rows).
constexpr int64_t PAST_END = 32;
void product_cpu(const float* a, bool a_transposed, const float* b, int64_t rows, int64_t inner, int64_t columns,
                 float* out);

// gradient + |gradient| direction, the norm over everything, and |gradient| step.
void attach_cpu(const float* gradient, const float* direction, int64_t rows, int64_t dim, const float* step,
                int64_t step_size, float* by_z, float* by_parameter);

// Prototypes move on towards sums / mass; all of them are written.
void follow_cpu(float* prototypes, float* sums, float* mass, float* seen, int64_t rows, int64_t dim, float rate);

}  // namespace proto_reg
