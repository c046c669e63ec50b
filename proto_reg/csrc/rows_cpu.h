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

// By group (groups, dim + 1): the sum of its finite rows, and their number. `counted` has a stride of 0 or 1; null: all.
void sums_by_group_cpu(const float* x, const int64_t* index, const bool* counted, int64_t counted_stride, int64_t rows,
                       int64_t dim, int64_t groups, float* sums);

// Adds to counts (prototypes,) the finite rows of x (rows, dim) that score (rows, prototypes) highest with each; returns
// the sum of their squared distances from it, per dimension.
float tally_cpu(const float* x, const float* scores, const float* prototypes, const bool* counted,
                int64_t counted_stride, int64_t rows, int64_t dim, int64_t num_prototypes, int64_t* counts);

// Prototypes move on towards the mean of their latents; all of them are written.
void follow_cpu(float* prototypes, float* sums, float* counts, float* seen, int64_t rows, int64_t dim, float rate);

}  // namespace proto_reg
