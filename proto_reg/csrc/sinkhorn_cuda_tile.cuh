// The phases of a Sinkhorn iteration, most of them on a tile of rows in shared memory. The kernels in the other .cuh
// files call them. All logarithms are to base 2.
//
// A tile holds first the scores, then E = exp2(x + g + f), where x are the scores centred by column and by row and
// scaled by log2(e) / epsilon, and g and f the potentials of columns and rows so far. Since centred rows and columns
// each hold a 0, E neither overflows nor loses a row or a column. A pass is then two matrix-vector products: row sums
// s = E v with P = E v / s, and column sums c = v E^T (w / s).
#pragma once

#include "sinkhorn_cuda_device.cuh"
#include "sinkhorn_cuda_plan.h"

namespace proto_reg {

struct SinkhornArgs {
  SinkhornProblem problem;
  SinkhornPlan plan;
  float scale;          // log2(e) / epsilon, for an eighth of a unit
  float limit;          // see centre()
  float entropy_scale;  // log2(e) / temperature, for an eighth of a unit
  double eighths;       // 8 / epsilon
  float narrow_bound;   // largest score, in eighths, for a narrow pass; negative: no narrow pass
  bool vectors;         // rows of all matrices are whole quads, aligned
  float* workspace;
};

// If a column's scale leaves [1 / kLargestScale, kLargestScale], it moves into the potentials, and E is computed again
// from the scores. So entries that had vanished count again, and nothing overflows.
constexpr float kLargestScale = 1099511627776.0f;  // 2^40

// Per row, in shared memory.
struct RowState {
  float* base;
  int count;

  PROTO_REG_DEVICE float* weight() const { return base; }  // 0: the row does not count
  PROTO_REG_DEVICE float* top() const { return base + count; }  // its shift, in eighths; +inf: it holds a NaN or +inf
  PROTO_REG_DEVICE float* shift() const { return base + 2 * count; }     // f
  PROTO_REG_DEVICE float* factor() const { return base + 3 * count; }    // 1 / s
  PROTO_REG_DEVICE float* weighted() const { return base + 4 * count; }  // weight / s, and 0 where the weight is 0
};

// Per column; shared or device memory, whole quads.
struct ColumnState {
  float* top;        // shift by which the column was centred, in eighths; +inf: the column gets nothing
  float* potential;  // g; -inf: the column gets nothing
};

// score - column_top - row_top, plus the rounding error of the first difference (Knuth's two-sum): exact if the result
// is small. If the row's shift is so large that this error could be larger than everything else, it is left out. Then
// the row's largest entry is exactly 0.
PROTO_REG_DEVICE float centre(float score, float column_top, float row_top, float limit) {
  const float difference = score - column_top, back = difference - score;
  const float error = (score - (difference - back)) - (column_top + back);
  const bool use = fabsf(row_top) < limit && fabsf(error) < infinity();
  return (difference - row_top) + (use ? error : 0.0f);
}

// Target mass of column k; `total`: the weight of all rows.
PROTO_REG_DEVICE float column_target(const SinkhornProblem& p, int64_t group, int64_t k, float total) {
  return p.marginals ? total * p.marginals[group * p.marginals_stride + k] : divide(total, static_cast<float>(p.columns));
}

// A score of column k as evidence whether its row is usable: NaN and +inf count as +inf; -inf if the column gets
// nothing.
PROTO_REG_DEVICE float row_evidence(const SinkhornProblem& p, int64_t group, int64_t k, float score) {
  if (!(score < infinity())) return infinity();
  if (!p.marginals || score == -infinity()) return score;  // as beyond the last column
  return p.marginals[group * p.marginals_stride + k] == 0.0f ? -infinity() : score;
}

// Sets g and shift of column k for the first time, from the column's maximum and the sum of exponentials below it.
PROTO_REG_DEVICE void start_column(const SinkhornProblem& p, int64_t group, int64_t k, float total, float top,
                                   float mass, const ColumnState& columns) {
  float potential = 0.0f;
  if (k >= p.columns) {
    potential = -infinity();
  } else if (total == 0.0f) {  // no row counts: codes are plain softmax
    top = 0.0f;
  } else {
    const float target = column_target(p, group, k, total);
    potential = mass == 0.0f ? -infinity() : log2f(divide(target, mass));
  }
  columns.top[k] = potential == -infinity() ? infinity() : top;
  columns.potential[k] = potential;
}

// Whether a column's sum is further than tol from its target. Columns whose sum is 0 leave their share to the others;
// `share` is what is left.
PROTO_REG_DEVICE bool is_far(const SinkhornProblem& p, float sum, float target, float share) {
  const bool counts = target > 0.0f && sum != 0.0f;
  return counts && !(fabsf(divide(sum * share, target) - 1.0f) <= static_cast<float>(p.tol));
}

// The same of any column, for every thread. `scratch`: 32 floats. Every thread calls this, and all are in step
// afterwards.
template <class Sum>
PROTO_REG_DEVICE bool far_from_targets(const SinkhornProblem& p, int64_t group, float total, float* scratch, Sum sum) {
  float shared_out = 0.0f;
#pragma unroll 1
  for (int k = threadIdx.x; k < p.columns; k += blockDim.x) {
    shared_out += sum(k) == 0.0f ? 0.0f : column_target(p, group, k, total);
  }
  __syncthreads();
  const float share = divide(sum_block(shared_out, scratch), total);
  bool far = false;
#pragma unroll 1
  for (int k = threadIdx.x; k < p.columns; k += blockDim.x) {
    far |= is_far(p, sum(k), column_target(p, group, k, total), share);
  }
  return __syncthreads_or(far);
}

// The row's largest centred score, as a term of reduce_rows; NaN and +inf count as +inf.
PROTO_REG_DEVICE void row_top_term(const Quad& scores, const float* column_top, Values<1>* top) {
  const Quad shift = load_quad(column_top);
  unroll<4>([&](int j) {
    const float x = scores.at[j] - shift.at[j];
    top->at[0] = fmaxf(top->at[0], x < infinity() ? x : infinity());
  });
}

// exp2(x + g + f) of an entry. A row with a NaN or +inf makes every column NaN. If the row does not count it is 0
// instead, and 0 / 0 makes its codes NaN.
PROTO_REG_DEVICE float exponential(const SinkhornArgs& a, float score, float column_top, float potential, float row_top,
                                   float shift, float weight) {
  const float e = exp2_fast(centre(score, column_top, row_top, a.limit) * a.scale + (potential + shift));
  return row_top == infinity() ? (weight > 0.0f ? nan() : 0.0f) : e;
}

// exp2(x + g + f) of a quad of a row.
PROTO_REG_DEVICE Quad exponentials(const SinkhornArgs& a, const Quad& scores, const Quad& column_top,
                                   const Quad& potential, float row_top, float shift, float weight) {
  Quad e;
  unroll<4>([&](int j) {
    e.at[j] = exponential(a, scores.at[j], column_top.at[j], potential.at[j], row_top, shift, weight);
  });
  return e;
}

// By columns: calls put(row, quad, source(row, quad)) for every quad, with kDepth loads under way.
template <int kDepth, class Source, class Put>
PROTO_REG_DEVICE void for_columns(const Layout& l, Source source, Put put) {
  for (int quad = l.quad; quad < l.quads; quad += blockDim.x) {
    for (int first = l.group; first < l.rows; first += kDepth * l.groups) {
      Quad x[kDepth];
      unroll<kDepth>([&](int j) {
        const int row = first + j * l.groups;
        if (row < l.rows) x[j] = source(row, quad);
      });
      unroll<kDepth>([&](int j) {
        const int row = first + j * l.groups;
        if (row < l.rows) put(row, quad, x[j]);
      });
    }
  }
}

// Turns the tile's scores into E. `source` gives the scores of a quad of a row. All threads are in step afterwards.
template <int kDepth, class Source>
PROTO_REG_DEVICE void fill_exponentials(const SinkhornArgs& a, const Layout& l, float* tile, const RowState& rows,
                                        const ColumnState& columns, Source source) {
  for_columns<kDepth>(l, source, [&](int row, int quad, const Quad& x) {
    const Quad top = load_quad(columns.top + 4 * quad), potential = load_quad(columns.potential + 4 * quad);
    store_quad(tile + (static_cast<int64_t>(row) * l.quads + quad) * 4,
               exponentials(a, x, top, potential, rows.top()[row], rows.shift()[row], rows.weight()[row]));
  });
  __syncthreads();
}

// Writes the weights of the tile's rows; 0 for isolated ones. `source` gives scores. Threads are in step afterwards.
template <class Source>
PROTO_REG_DEVICE void fill_weights(const SinkhornArgs& a, const Layout& l, int64_t group, int64_t first_row,
                                   float* weight, float* scratch, Source source) {
  const float* given = a.problem.weights;
  if (!a.problem.isolate) {
    for (int row = threadIdx.x; row < l.rows; row += blockDim.x) weight[row] = given ? given[first_row + row] : 1.0f;
    __syncthreads();
    return;
  }
  // A usable row's maximum is finite.
  auto term = [&](int row, int quad, Values<1>* top) {
    const Quad x = source(row, quad);
    unroll<4>([&](int j) { top->at[0] = fmaxf(top->at[0], row_evidence(a.problem, group, 4 * quad + j, x.at[j])); });
  };
  reduce_rows<1>(l, {{-infinity()}}, scratch, Max(), term, [&](int row, const Values<1>& top) {
    weight[row] = fabsf(top.at[0]) == infinity() ? 0.0f : given ? given[first_row + row] : 1.0f;
  });
}

constexpr float kLn2 = 0.693147181f;

// A row's part of the cross-entropy, for the last phase.
struct EntropyState {
  float* top;   // the row's maximum, in eighths
  float* norm;  // 1 / sum of exponentials below it
  float* loss;  // weighted
};

// The cross-entropy of each row. `code(row, quad)` gives its codes. All threads are in step afterwards.
template <class Source, class Code>
PROTO_REG_DEVICE void row_entropies(const SinkhornArgs& a, const Layout& l, const float* weight,
                                    const EntropyState& state, float* scratch, Source source, Code code) {
  auto top_term = [&](int row, int quad, Values<1>* top) {
    const Quad x = source(row, quad);
    unroll<4>([&](int j) { top->at[0] = fmaxf(top->at[0], x.at[j]); });
  };
  reduce_rows<1>(l, {{-infinity()}}, scratch, Max(), top_term,
                 [&](int row, const Values<1>& top) { state.top[row] = top.at[0]; });
  auto term = [&](int row, int quad, Values<2>* sums) {  // of exponentials, of codes times scores
    const Quad x = source(row, quad), q = code(row, quad);
    unroll<4>([&](int j) {
      const float below = x.at[j] - state.top[row];
      sums->at[0] += exp2_fast(below * a.entropy_scale);
      sums->at[1] += q.at[j] == 0.0f ? 0.0f : q.at[j] * below;
    });
  };
  reduce_rows<2>(l, {{0.0f, 0.0f}}, scratch, Add(), term, [&](int row, const Values<2>& sums) {
    const float loss = logf(sums.at[0]) - sums.at[1] * a.entropy_scale * kLn2;
    state.loss[row] = weight[row] > 0.0f ? weight[row] * loss : 0.0f;
    state.norm[row] = divide(1.0f, sums.at[0]);
  });
}

// Writes codes and gradient of the tile's rows; the first one is row `first_row` of the matrix. `total`: the weight of
// all rows.
template <class T, class Source, class Code>
PROTO_REG_DEVICE void write_rows(const SinkhornArgs& a, const Layout& l, int64_t first_row, const float* weight,
                                 float total, const EntropyState& state, Source source, Code code) {
  const SinkhornProblem& p = a.problem;
  const float per_weight = divide(a.entropy_scale * (kLn2 / 8), total);
  for_rows(l, [&](int row, int quad) {
    const int64_t offset = (first_row + row) * p.columns;
    Quad q = code(row, quad);
    const bool single = p.columns == 1;  // then codes are exactly 1, and there is no gradient at all
    if (single && q.at[0] == q.at[0]) q.at[0] = 1.0f;
    if (p.codes) write_quad(static_cast<T*>(p.codes) + offset, 4 * quad, p.columns, a.vectors, q);
    if (!p.loss) return;
    const Quad x = source(row, quad);
    Quad gradient;
    unroll<4>([&](int j) {
      const float softmax = exp2_fast((x.at[j] - state.top[row]) * a.entropy_scale) * state.norm[row];
      const float predicted = single ? q.at[j] : softmax;
      gradient.at[j] = weight[row] > 0.0f ? weight[row] * per_weight * (predicted - q.at[j]) : 0.0f;
    });
    write_quad(static_cast<T*>(p.gradient) + offset, 4 * quad, p.columns, a.vectors, gradient);
  });
}

// Column k's potential as the caller gets it, in units of scores / epsilon.
PROTO_REG_DEVICE float public_potential(const SinkhornArgs& a, float potential, float top, float total) {
  if (total == 0.0f) return 0.0f;
  if (potential == -infinity()) return -infinity();
  const double value = (potential - log2f(total)) * 0.6931471805599453 - top * a.eighths;
  constexpr double kLargest = 3.4028234663852886e38;
  return static_cast<float>(value > kLargest ? kLargest : value < -kLargest ? -kLargest : value);
}

}  // namespace proto_reg
