// Kernels for a matrix that stays in device memory; each reads it once. Their state is in the workspace. Here are the
// sweeps over columns, and the small kernels between the passes. sinkhorn_cuda.cu launches them.
#pragma once

#include "sinkhorn_cuda_tile.cuh"

namespace proto_reg {

// The workspace of the streamed regime.
struct StreamState {
  ColumnState columns;
  float* sums;      // of a column over all rows
  float* folded;    // g minus the shift in the exponent: what a narrow pass adds to a score
  float* total;     // weight of all rows
  float* settled;   // not 0: the iteration that was within tol; nothing changes any more
  float* bound;     // of the scores' absolute values but for -inf, in eighths; +inf where one is NaN
  int* empty;       // the last iteration in which a column that wants a share had none
  int* far;         // the last iteration in which a column was further than tol from its target
  float* weight;    // of a row; written and read only with `isolate`
  float* row_top;
  float* shift;     // f
  float* partials;  // rows of partial sums of the columns
  float* losses;    // of the blocks of the last sweep

  PROTO_REG_DEVICE explicit StreamState(const SinkhornArgs& a) {
    const int64_t stride = a.plan.stride, rows = a.problem.rows;
    columns = {a.workspace, a.workspace + stride};
    sums = columns.potential + stride;
    folded = sums + stride;
    total = folded + stride;
    settled = total + 1;
    bound = total + 2;
    empty = reinterpret_cast<int*>(total + 3);
    far = empty + 1;
    weight = total + kStateFloats;
    row_top = weight + rows;
    shift = row_top + rows;
    losses = weight + round_up(3 * rows, 4);
    partials = losses + round_up(larger(a.plan.sweep_blocks, a.plan.narrow_blocks), 4);
  }

  // Whether no exponential needs its row's shift, because the scores are small enough.
  PROTO_REG_DEVICE bool narrow(const SinkhornArgs& a) const { return *bound <= a.narrow_bound; }

  PROTO_REG_DEVICE void fold(const SinkhornArgs& a, int64_t k) const {
    folded[k] = columns.potential[k] - columns.top[k] * a.scale;
  }

  PROTO_REG_DEVICE float row_weight(const SinkhornArgs& a, int64_t row) const {
    return a.problem.isolate ? weight[row] : a.problem.weights ? a.problem.weights[row] : 1.0f;
  }
};

template <class T>
PROTO_REG_DEVICE Quad stream_score(const SinkhornArgs& a, int64_t row, int64_t column) {
  const T* const scores = static_cast<const T*>(a.problem.scores);
  return read_scores(scores + row * a.problem.columns, column, a.problem.columns, a.vectors);
}

// Which rows count, with `isolate`.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) stream_weights(const SinkhornArgs a) {
  const StreamState state(a);
  float* const scratch = shared_floats();
  float* const weight = scratch + scratch_floats(a.plan.sweep_rows, blockDim.x, a.plan.sweep_segments);
  for (int64_t first = blockIdx.x * a.plan.sweep_rows; first < a.problem.rows;
       first += gridDim.x * a.plan.sweep_rows) {
    const int rows = static_cast<int>(smaller(a.plan.sweep_rows, a.problem.rows - first));
    const Layout layout = make_layout(rows, a.plan.stride / 4, a.plan.sweep_segments, rows);
    fill_weights(a, layout, 0, first, weight, scratch,
                 [&](int row, int quad) { return stream_score<T>(a, first + row, 4 * quad); });
    for (int row = threadIdx.x; row < rows; row += blockDim.x) state.weight[first + row] = weight[row];
    __syncthreads();
  }
}

// Each block's part of the rows' weight, in place of its loss, and a clean start. Without weights one block is enough.
__global__ void __launch_bounds__(kSweepThreads) stream_total(const SinkhornArgs a) {
  const StreamState state(a);
  float total = static_cast<float>(a.problem.rows);
  if (a.problem.weights || a.problem.isolate) {
    total = 0.0f;
    const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    for (int64_t row = first; row < a.problem.rows; row += gridDim.x * static_cast<int64_t>(blockDim.x)) {
      total += state.row_weight(a, row);
    }
    total = sum_block(total, shared_floats());
  }
  if (threadIdx.x != 0) return;
  state.losses[blockIdx.x] = total;
  if (blockIdx.x > 0) return;
  *state.settled = *state.bound = 0.0f;
  *state.empty = *state.far = 0;
}

// The part of the matrix that a block of the column sweep covers, and its threads' layout there.
struct Slab {
  int64_t first_row;
  int first_quad;
  Layout layout;

  PROTO_REG_DEVICE explicit Slab(const SinkhornArgs& a) {
    const int64_t rows = ceil_div(a.problem.rows, a.plan.slabs), quads = a.plan.stride / 4;
    const int width = static_cast<int>(sweep_quads(quads));
    first_row = smaller(a.problem.rows, blockIdx.y * rows);
    first_quad = blockIdx.x * width;
    layout = make_layout(static_cast<int>(smaller(rows, a.problem.rows - first_row)),
                         static_cast<int>(smaller(width, quads - first_quad)), 1, blockDim.x);
  }
};

// Computes for each slab and column the maximum score and the sum of exponentials below it.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) stream_start_columns(const SinkhornArgs a) {
  const StreamState state(a);
  const Slab slab(a);
  float* const out = state.partials + blockIdx.y * 2 * a.plan.stride + 4 * slab.first_quad;
  const MergeExponentials merge{a.scale};
  Quad top = filled(-infinity()), mass = filled(0.0f);
  float bound = 0.0f;
  auto source = [&](int row, int quad) {
    return stream_score<T>(a, slab.first_row + row, 4 * (slab.first_quad + quad));
  };
  for_columns<kLoads>(slab.layout, source, [&](int row, int, const Quad& x) {
    const float weight = state.row_weight(a, slab.first_row + row);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float size = x.at[j] == -infinity() ? 0.0f : fabsf(x.at[j]);
      bound = size <= bound ? bound : size == size ? size : infinity();
    }
    if (!(weight > 0.0f)) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float old = top.at[j];
      top.at[j] = fmaxf(old, x.at[j]);
      const float base = top.at[j] == -infinity() ? 0.0f : top.at[j];
      if (top.at[j] > old) mass.at[j] *= exp2_fast((old - base) * a.scale);
      mass.at[j] += weight * exp2_fast((x.at[j] - base) * a.scale);
    }
  });
  bound = reduce_lanes<1>({{bound}}, 32, Max()).at[0];
  // Floats that are not negative have the order of their bits.
  if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<int*>(state.bound), __float_as_int(bound));
  reduce_groups<true>(slab.layout, top, shared_floats(), out);
  if (slab.layout.quad < slab.layout.quads) {
    const Quad highest = load_quad(out + 4 * slab.layout.quad);
#pragma unroll
    for (int j = 0; j < 4; ++j) mass.at[j] = merge({{highest.at[j], 0.0f}}, {{top.at[j], mass.at[j]}}).at[1];
  }
  reduce_groups<false>(slab.layout, mass, shared_floats(), out + a.plan.stride);
}

// Computes for each slab and column the weighted sum of E, whose rows sum to 1 by their potentials.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) stream_sum_columns(const SinkhornArgs a) {
  const StreamState state(a);
  if (*state.settled != 0.0f || state.narrow(a)) return;
  const Slab slab(a);
  Quad sum = filled(0.0f);
  auto source = [&](int row, int quad) {
    return stream_score<T>(a, slab.first_row + row, 4 * (slab.first_quad + quad));
  };
  for_columns<kLoads>(slab.layout, source, [&](int row, int quad, const Quad& x) {
    const int64_t at = slab.first_row + row;
    const float weight = state.row_weight(a, at);
    const Quad e = exponentials(a, x, load_quad(state.columns.top + 4 * (slab.first_quad + quad)),
                                load_quad(state.columns.potential + 4 * (slab.first_quad + quad)), state.row_top[at],
                                state.shift[at], weight);
    unroll<4>([&](int j) { sum.at[j] += weight > 0.0f ? weight * e.at[j] : 0.0f; });
  });
  reduce_groups<false>(slab.layout, sum, shared_floats(),
                       state.partials + blockIdx.y * a.plan.stride + 4 * slab.first_quad);
}

// A block adds up `count` rows of partial sums for 32 columns. One thread for each column calls finish(k, values).
template <int N, class Combine, class Finish>
PROTO_REG_DEVICE void gather_partials(const SinkhornArgs& a, const float* partials, int64_t count, Values<N> sum,
                                      Combine combine, Finish finish) {
  const int lanes = blockDim.x / 32, lane = threadIdx.x / 32;
  const int64_t k = blockIdx.x * 32 + threadIdx.x % 32, stride = a.plan.stride;
  float* const own = shared_floats() + threadIdx.x * N;
#pragma unroll 4
  for (int64_t row = lane; k < stride && row < count; row += lanes) {
    Values<N> part;
    unroll<N>([&](int j) { part.at[j] = partials[(row * N + j) * stride + k]; });
    sum = combine(sum, part);
  }
  unroll<N>([&](int j) { own[j] = sum.at[j]; });
  __syncthreads();
  if (lane != 0 || k >= stride) return;
  for (int other = 1; other < lanes; ++other) {
    Values<N> part;
    unroll<N>([&](int j) { part.at[j] = own[other * 32 * N + j]; });
    sum = combine(sum, part);
  }
  finish(k, sum);
}

// `count`: blocks of stream_total.
__global__ void __launch_bounds__(kSweepThreads) stream_first_potentials(const SinkhornArgs a, int64_t count) {
  const StreamState state(a);
  float total = 0.0f;
  for (int64_t block = threadIdx.x; block < count; block += blockDim.x) total += state.losses[block];
  total = sum_block(total, shared_floats());
  if (blockIdx.x == 0 && threadIdx.x == 0) *state.total = total;
  gather_partials<2>(a, state.partials, a.plan.slabs, {{-infinity(), 0.0f}}, MergeExponentials{a.scale},
                     [&](int64_t k, const Values<2>& column) {
                       start_column(a.problem, 0, k, total, column.at[0], column.at[1], state.columns);
                       state.fold(a, k);
                     });
}

PROTO_REG_DEVICE void move_potential(const SinkhornArgs& a, const StreamState& state, int64_t k, float sum) {
  const float target = column_target(a.problem, 0, k, *state.total);
  state.columns.potential[k] = sum == 0.0f ? -infinity() : state.columns.potential[k] + log2f(divide(target, sum));
  state.fold(a, k);
}

// Computes column sums over all rows and, without tol, moves the potentials. `count`: rows of partial sums.
// `iteration`: 1, 2, ...
__global__ void __launch_bounds__(kSweepThreads) stream_gather(const SinkhornArgs a, int64_t count, int iteration) {
  const StreamState state(a);
  if (*state.settled != 0.0f) return;
  if (state.narrow(a)) count = a.plan.narrow_blocks / a.plan.narrow_cluster;
  gather_partials<1>(a, state.partials, count, {{0.0f}}, Add(), [&](int64_t k, const Values<1>& sum) {
    if (k >= a.problem.columns || *state.total == 0.0f) return;
    if (!(a.problem.tol >= 0.0)) return move_potential(a, state, k, sum.at[0]);
    state.sums[k] = sum.at[0];
    const float target = column_target(a.problem, 0, k, *state.total);
    if (is_far(a.problem, sum.at[0], target, 1.0f)) atomicMax(state.far, iteration);
    if (sum.at[0] == 0.0f && target > 0.0f) atomicMax(state.empty, iteration);
  });
}

// Stops if every column is within tol, or else moves the potentials. Where columns are empty, every block computes what
// they leave to the others.
__global__ void __launch_bounds__(kSweepThreads) stream_tolerance(const SinkhornArgs a, int iteration) {
  const StreamState state(a);
  const float settled = *state.settled;  // another block may be writing this iteration into it
  if ((settled != 0.0f && settled != static_cast<float>(iteration)) || *state.total == 0.0f) return;
  bool far = *state.far == iteration;
  if (*state.empty == iteration) {
    far = far_from_targets(a.problem, 0, *state.total, shared_floats(), [&](int k) { return state.sums[k]; });
  }
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (!far && first == 0) *state.settled = static_cast<float>(iteration);
  for (int64_t k = first; far && k < a.problem.columns; k += gridDim.x * static_cast<int64_t>(blockDim.x)) {
    move_potential(a, state, k, state.sums[k]);
  }
}

// Writes potentials, and the first block the loss.
__global__ void __launch_bounds__(kSweepThreads) stream_finish(const SinkhornArgs a) {
  const StreamState state(a);
  const float total = *state.total;
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  for (int64_t k = first; k < a.problem.columns; k += gridDim.x * static_cast<int64_t>(blockDim.x)) {
    a.problem.potentials[k] = public_potential(a, state.columns.potential[k], state.columns.top[k], total);
  }
  if (!a.problem.loss || blockIdx.x > 0) return;
  float loss = 0.0f;
  const int64_t blocks = state.narrow(a) ? a.plan.narrow_blocks : a.plan.sweep_blocks;
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) loss += state.losses[block];
  loss = sum_block(loss, shared_floats());
  if (threadIdx.x == 0) *a.problem.loss = total > 0.0f ? divide(loss, total) : 0.0f;
}

}  // namespace proto_reg
