// The kernel that keeps the matrix in registers: of one block, of a cluster, or of a cooperative grid. A row lies over
// neighbouring lanes of a warp. Rows are summed by shuffles. Columns are summed by shuffles, then over the warps
// through shared memory, over a cluster through its shared memory, and over a grid through device memory. Every block
// merges all columns in the same order, so that one barrier is enough. sinkhorn_cuda.cu launches sinkhorn_registers.
#pragma once

#include <type_traits>

#include "sinkhorn_cuda_peers.cuh"
#include "sinkhorn_cuda_tile.cuh"

namespace proto_reg {

// Merges `count` values; get(i, j) is the j-th number of value i.
struct MergeSums {
  template <class Get>
  PROTO_REG_DEVICE Values<1> operator()(int count, Get get) const {
    Values<1> sum{{0.0f}};
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum.at[0] += get(i, 0);
    return sum;
  }
};

// (m, z) means z exp2(scale m): see MergeExponentials.
struct MergeMasses {
  float scale;
  template <class Get>
  PROTO_REG_DEVICE Values<2> operator()(int count, Get get) const {
    Values<2> sum{{-infinity(), 0.0f}};
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum.at[0] = fmaxf(sum.at[0], get(i, 0));
    const float base = sum.at[0] == -infinity() ? 0.0f : sum.at[0];
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum.at[1] += get(i, 1) * exp2_fast((get(i, 0) - base) * scale);
    return sum;
  }
};

// Each thread has R rows and C columns.
template <int R, int C>
struct Registers {
  const SinkhornArgs& a;
  const SinkhornPlan& plan;
  const int lanes, lane, place, warp, pitch;  // lanes of a row; this thread's, and which row of its warp it is in
  const int rank;                             // of this block in its group
  const int64_t group;
  float *const partials, *const own, *const scale, *const sums, *const slot;
  const ColumnState columns;
  float total = 0.0f;  // weight of all rows
  int turn = 0;        // of two buffers of `own` and of the workspace
  float weight[R], top[R], shift[R], factor[R];
  float e[R][C];

  PROTO_REG_DEVICE explicit Registers(const SinkhornArgs& args)
      : a(args), plan(args.plan), lanes(static_cast<int>(plan.lanes)), lane(threadIdx.x % 32 % lanes),
        place(threadIdx.x % 32 / lanes), warp(threadIdx.x / 32), pitch(C * lanes),
        rank(blockIdx.x % static_cast<unsigned>(plan.blocks)),
        group(blockIdx.x / static_cast<unsigned>(plan.blocks)), partials(shared_floats()),
        own(partials + 2 * (blockDim.x / 32) * pitch), scale(own + 4 * pitch), sums(scale + pitch),
        slot(sums + 3 * pitch), columns{sums + pitch, sums + 2 * pitch} {}

  PROTO_REG_DEVICE int column(int c) const { return c * lanes + lane; }

  // The thread's row r, as a row of the group; -1: none. A block's rows are few enough for numbers of 32 bits.
  PROTO_REG_DEVICE int row(int r) const {
    const int most = static_cast<int>(plan.rows_per_block);
    const int local = (warp * R + r) * (32 / lanes) + place, at = rank * most + local;
    return local < most && at < static_cast<int>(a.problem.rows) ? at : -1;
  }

  // Calls use(r, c, offset) for each entry of the matrix that this thread holds.
  template <class Use>
  PROTO_REG_DEVICE void for_entries(Use use) const {
    unroll<R>([&](int r) {
      const int at = row(r), columns_of_all = static_cast<int>(a.problem.columns);
      const int64_t offset = (group * a.problem.rows + at) * columns_of_all;
      unroll<C>([&](int c) { if (at >= 0 && column(c) < columns_of_all) use(r, c, offset + column(c)); });
    });
  }

  // Calls use with a null pointer to the scores' type.
  template <class Use>
  PROTO_REG_DEVICE void with_type(Use use) const {
    if (a.problem.dtype == Dtype::f32) {
      use(static_cast<float*>(nullptr));
    } else if (a.problem.dtype == Dtype::f16) {
      use(static_cast<__half*>(nullptr));
    } else {
      use(static_cast<__nv_bfloat16*>(nullptr));
    }
  }

  PROTO_REG_DEVICE void read_scores(float (&x)[R][C]) const {
    unroll<R>([&](int r) { unroll<C>([&](int c) { x[r][c] = -infinity(); }); });
    with_type([&](auto* type) {
      const auto* const scores = static_cast<const std::remove_pointer_t<decltype(type)>*>(a.problem.scores);
      for_entries([&](int r, int c, int64_t at) { x[r][c] = kEighth * to_float(scores[at]); });
    });
  }

  PROTO_REG_DEVICE void write(void* to, const float (&x)[R][C]) const {
    with_type([&](auto* type) {
      auto* const out = static_cast<decltype(type)>(to);
      for_entries([&](int r, int c, int64_t at) { from_float(x[r][c], &out[at]); });
    });
  }

  // Merges N numbers for each column, and calls finish(k, values) for it in every block of the group. `mine`: merged
  // over the rows of this warp. The caller waits for its block before it uses the outcome.
  template <int N, class Merge, class Finish>
  PROTO_REG_DEVICE void merge_columns(const Values<C> (&mine)[N], Merge merge, Finish finish) {
    if (place == 0) {
      unroll<N>([&](int j) {
        unroll<C>([&](int c) { partials[(warp * N + j) * pitch + column(c)] = mine[j].at[c]; });
      });
    }
    __syncthreads();
    const int blocks = static_cast<int>(plan.blocks), cluster = static_cast<int>(plan.cluster);
    float* const buffer = own + 2 * turn * pitch;
    for (int k = threadIdx.x; k < pitch; k += blockDim.x) {
      const auto sum = merge(static_cast<int>(blockDim.x / 32),
                             [&](int i, int j) { return partials[(i * N + j) * pitch + k]; });
      if (blocks == 1) {
        finish(k, sum);
      } else {
        unroll<N>([&](int j) { buffer[j * pitch + k] = sum.at[j]; });
      }
    }
    if (blocks == 1) return;
    turn ^= 1;
    if (cluster > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
    const int clusters = blocks / cluster;
    float* const shared_by_all = a.workspace + (turn * clusters) * 2 * pitch;
    if (clusters == 1 || rank % cluster == 0) {
      for (int k = threadIdx.x; k < pitch; k += blockDim.x) {
        const auto sum =
            merge(cluster, [&](int i, int j) { return cluster_shared(buffer, i)[j * pitch + k]; });
        if (clusters == 1) {
          finish(k, sum);
        } else {
          unroll<N>([&](int j) { shared_by_all[(rank / cluster * N + j) * pitch + k] = sum.at[j]; });
        }
      }
    }
    if (clusters == 1) return;
    cooperative_groups::this_grid().sync();
    for (int k = threadIdx.x; k < pitch; k += blockDim.x) {
      finish(k, merge(clusters, [&](int i, int j) { return __ldcg(shared_by_all + (i * N + j) * pitch + k); }));
    }
  }

  // Reduces over the rows of a warp.
  template <class Combine>
  PROTO_REG_DEVICE Values<C> over_places(Values<C> x, Combine combine) const {
    return reduce_lanes<C>(x, 32, combine, lanes);
  }

  // The sum of one number for each row, over the group, for every thread.
  PROTO_REG_DEVICE float sum_over_rows(const float (&x)[R]) {
    Values<C> mine[1];
    unroll<C>([&](int c) { mine[0].at[c] = 0.0f; });
    unroll<R>([&](int r) { mine[0].at[0] += lane == 0 ? x[r] : 0.0f; });
    mine[0] = over_places(mine[0], Add());
    merge_columns(mine, MergeSums(), [&](int k, const Values<1>& sum) {
      if (k == 0) *slot = sum.at[0];
    });
    __syncthreads();
    return *slot;
  }

  PROTO_REG_DEVICE void load() {
    read_scores(e);
    Values<R> largest;
    unroll<R>([&](int r) {
      const int at = row(r);
      weight[r] = at < 0 ? 0.0f : a.problem.weights ? a.problem.weights[group * a.problem.rows + at] : 1.0f;
      largest.at[r] = -infinity();
      unroll<C>([&](int c) {
        largest.at[r] = fmaxf(largest.at[r], row_evidence(a.problem, group, column(c), e[r][c]));
      });
      shift[r] = 0.0f;
    });
    if (a.problem.isolate) {
      largest = reduce_lanes<R>(largest, lanes, Max());
      unroll<R>([&](int r) { weight[r] = fabsf(largest.at[r]) == infinity() ? 0.0f : weight[r]; });
    }
    total = a.problem.weights || a.problem.isolate ? sum_over_rows(weight) : static_cast<float>(a.problem.rows);
  }

  // The first potentials, from column maxima and the sums of exponentials below them.
  PROTO_REG_DEVICE void start_columns() {
    Values<C> both[2];
    unroll<C>([&](int c) { both[0].at[c] = -infinity(), both[1].at[c] = 0.0f; });
    unroll<R>([&](int r) {
      unroll<C>([&](int c) { both[0].at[c] = weight[r] > 0.0f ? fmaxf(both[0].at[c], e[r][c]) : both[0].at[c]; });
    });
    both[0] = over_places(both[0], Max());
    unroll<C>([&](int c) {
      const float base = both[0].at[c] == -infinity() ? 0.0f : both[0].at[c];
      unroll<R>([&](int r) {
        both[1].at[c] += weight[r] > 0.0f ? weight[r] * exp2_fast((e[r][c] - base) * a.scale) : 0.0f;
      });
    });
    both[1] = over_places(both[1], Add());
    merge_columns(both, MergeMasses{a.scale}, [&](int k, const Values<2>& sum) {
      start_column(a.problem, group, k, total, sum.at[0], sum.at[1], columns);
      scale[k] = 1.0f;
    });
    __syncthreads();
  }

  // Centres the scores by row.
  PROTO_REG_DEVICE void start_rows() {
    Values<R> largest;
    unroll<R>([&](int r) {
      largest.at[r] = -infinity();
      unroll<C>([&](int c) {
        const float x = e[r][c] - columns.top[column(c)];
        largest.at[r] = fmaxf(largest.at[r], x < infinity() ? x : infinity());
      });
    });
    largest = reduce_lanes<R>(largest, lanes, Max());
    unroll<R>([&](int r) { top[r] = largest.at[r] == -infinity() ? 0.0f : largest.at[r]; });
  }

  // Scores in `e` become exponentials.
  PROTO_REG_DEVICE void fill() {
    unroll<C>([&](int c) {
      const float column_top = columns.top[column(c)], potential = columns.potential[column(c)];
      unroll<R>([&](int r) { e[r][c] = exponential(a, e[r][c], column_top, potential, top[r], shift[r], weight[r]); });
    });
  }

  PROTO_REG_DEVICE void sum_rows() {
    Values<R> sum;
    unroll<R>([&](int r) { sum.at[r] = 0.0f; });
    unroll<C>([&](int c) {
      const float v = scale[column(c)];
      unroll<R>([&](int r) { sum.at[r] += e[r][c] * v; });
    });
    sum = reduce_lanes<R>(sum, lanes, Add());
    unroll<R>([&](int r) { factor[r] = divide(1.0f, sum.at[r]); });
  }

  PROTO_REG_DEVICE void sum_columns() {
    Values<C> mine[1];
    unroll<C>([&](int c) { mine[0].at[c] = 0.0f; });
    unroll<R>([&](int r) {
      const float weighted = weight[r] > 0.0f ? weight[r] * factor[r] : 0.0f;
      unroll<C>([&](int c) { mine[0].at[c] += weighted * e[r][c]; });
    });
    mine[0] = over_places(mine[0], Add());
    merge_columns(mine, MergeSums(), [&](int k, const Values<1>& sum) { sums[k] = sum.at[0]; });
  }

  // Sets v. If all columns are within tol, returns false and changes nothing. A thread takes the columns that it has
  // merged.
  PROTO_REG_DEVICE bool update() {
    auto sum = [&](int k) { return scale[k] * sums[k]; };
    if (a.problem.tol >= 0.0 && !far_from_targets(a.problem, group, total, partials, sum)) return false;
    bool wide = false;
    for (int k = threadIdx.x; k < pitch; k += blockDim.x) {
      const float v = sums[k] == 0.0f ? 0.0f : divide(column_target(a.problem, group, k, total), sums[k]);
      scale[k] = v;
      wide |= v > kLargestScale || (v < 1.0f / kLargestScale && v > 0.0f);
    }
    if (__syncthreads_or(wide)) rebuild();
    return true;
  }

  // Moves the scaling vectors into the potentials, and computes the exponentials again.
  PROTO_REG_DEVICE void rebuild() {
    for (int k = threadIdx.x; k < pitch; k += blockDim.x) {
      columns.potential[k] += log2f(scale[k]);
      scale[k] = 1.0f;
    }
    unroll<R>([&](int r) { shift[r] += factor[r] < infinity() ? log2f(factor[r]) : 0.0f; });
    __syncthreads();
    read_scores(e);
    fill();
  }

  PROTO_REG_DEVICE void finish() {
    unroll<C>([&](int c) {
      const float v = scale[column(c)];
      unroll<R>([&](int r) {
        e[r][c] *= v * factor[r];
        if (a.problem.columns == 1 && column(c) == 0 && e[r][c] == e[r][c]) e[r][c] = 1.0f;  // exactly
      });
    });
    if (a.problem.codes) write(a.problem.codes, e);
    for (int k = threadIdx.x; rank == 0 && k < a.problem.columns; k += blockDim.x) {
      const float potential = columns.potential[k] + log2f(scale[k]);
      a.problem.potentials[group * a.problem.columns + k] = public_potential(a, potential, columns.top[k], total);
    }
    if (a.problem.loss) write_entropy();
    if (plan.cluster > 1) cluster_sync();  // nobody leaves while others read its shared memory
  }

  // Cross-entropy of softmax(scores / temperature) against the codes in `e`, and its gradient.
  PROTO_REG_DEVICE void write_entropy() {
    float x[R][C], loss[R];
    read_scores(x);
    Values<R> largest, norm, along;  // a row's maximum; sums of exponentials below it, and of codes times scores
    unroll<R>([&](int r) {
      largest.at[r] = -infinity(), norm.at[r] = along.at[r] = 0.0f;
      unroll<C>([&](int c) { largest.at[r] = fmaxf(largest.at[r], x[r][c]); });
    });
    largest = reduce_lanes<R>(largest, lanes, Max());
    unroll<R>([&](int r) {
      unroll<C>([&](int c) {
        const float below = x[r][c] - largest.at[r];
        along.at[r] += e[r][c] == 0.0f ? 0.0f : e[r][c] * below;
        x[r][c] = exp2_fast(below * a.entropy_scale);
        norm.at[r] += column(c) < a.problem.columns ? x[r][c] : 0.0f;
      });
    });
    norm = reduce_lanes<R>(norm, lanes, Add());
    along = reduce_lanes<R>(along, lanes, Add());
    const float per_weight = divide(a.entropy_scale * (kLn2 / 8), total);
    unroll<R>([&](int r) {
      const bool counts = weight[r] > 0.0f;
      loss[r] = counts ? weight[r] * (logf(norm.at[r]) - along.at[r] * a.entropy_scale * kLn2) : 0.0f;
      const float inverse = divide(1.0f, norm.at[r]);
      unroll<C>([&](int c) {
        const float predicted = a.problem.columns == 1 ? e[r][c] : x[r][c] * inverse;
        x[r][c] = counts ? weight[r] * per_weight * (predicted - e[r][c]) : 0.0f;
      });
    });
    write(a.problem.gradient, x);
    const float sum = sum_over_rows(loss);
    if (rank == 0 && threadIdx.x == 0) a.problem.loss[group] = total > 0.0f ? divide(sum, total) : 0.0f;
  }

  PROTO_REG_DEVICE void run() {
    load();
    start_columns();
    start_rows();
    fill();
    for (int64_t iteration = 1; iteration < a.problem.num_iters && total > 0.0f; ++iteration) {
      sum_rows();
      sum_columns();
      if (!update()) break;
    }
    sum_rows();
    finish();
  }
};

template <int R, int C>
__global__ void __launch_bounds__(kRegisterThreads, 1) sinkhorn_registers(const SinkhornArgs a) {
  Registers<R, C>(a).run();
}

}  // namespace proto_reg
