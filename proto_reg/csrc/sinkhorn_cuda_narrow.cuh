// Streamed passes for scores of a narrow range, where exponentials need no shift for their rows. A thread holds some
// quads of some rows in registers; a row lies over neighbouring lanes, a block, or a cluster. All logarithms are to
// base 2. sinkhorn_cuda.cu launches stream_narrow.
#pragma once

#include "sinkhorn_cuda_peers.cuh"
#include "sinkhorn_cuda_stream.cuh"

namespace proto_reg {

enum class Narrow { sums, codes, entropy };  // what a pass is for: column sums; codes; codes, loss and gradient

// Each thread has R rows and Q quads of each.
template <class T, int R, int Q, Narrow kFor>
struct NarrowPass {
  const SinkhornArgs& a;
  const SinkhornPlan& plan;
  const StreamState state;
  const int team;                       // threads of a block that share a row: lanes of a warp, or all of them
  const int lane, place, places;        // this thread's, and which of the block's rows it is at
  const int rank, first_quad, quads;    // of this block's part of the row
  const int rows_at_once;
  float *const sums, *const shared_by_cluster, *const totals;  // shared memory
  int turn = 0;                         // of two buffers of each
  Quad potential[Q], x[R][Q];

  PROTO_REG_DEVICE explicit NarrowPass(const SinkhornArgs& args)
      : a(args), plan(args.plan), state(args), team(static_cast<int>(smaller(plan.narrow_lanes, blockDim.x))),
        lane(threadIdx.x % team), place(threadIdx.x / team), places(blockDim.x / team),
        rank(plan.narrow_cluster > 1 ? cluster_rank() : 0), first_quad(static_cast<int>(rank * plan.narrow_quads)),
        quads(static_cast<int>(smaller(plan.narrow_quads, plan.stride / 4 - first_quad))), rows_at_once(R * places),
        sums(shared_floats()), shared_by_cluster(sums + 2 * 32 * kNarrowValues),
        totals(shared_by_cluster + 2 * kNarrowValues) {}

  PROTO_REG_DEVICE int64_t row(int64_t first, int r) const { return first + r * places + place; }
  PROTO_REG_DEVICE int64_t column(int q) const { return 4 * static_cast<int64_t>(first_quad + q * team + lane); }
  PROTO_REG_DEVICE bool owns(int q) const { return q * team + lane < quads; }

  // Sums each of N numbers over the row's threads; every thread gets the sums.
  template <int N>
  PROTO_REG_DEVICE void sum_over_row(Values<N>* x) {
    static_assert(N <= kNarrowValues, "shared memory");
    *x = reduce_lanes<N>(*x, team < 32 ? team : 32, Add());
    if (team <= 32) return;
    float* const parts = sums + turn * 32 * kNarrowValues;
    if (threadIdx.x % 32 == 0) {
      unroll<N>([&](int n) { parts[threadIdx.x / 32 * N + n] = x->at[n]; });
    }
    __syncthreads();
    *x = Values<N>{};
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
      unroll<N>([&](int n) { x->at[n] += parts[warp * N + n]; });
    }
    if (plan.narrow_cluster > 1) sum_over_cluster(x);
    turn ^= 1;
  }

  template <int N>
  PROTO_REG_DEVICE void sum_over_cluster(Values<N>* x) {
    float* const mine = shared_by_cluster + turn * kNarrowValues;
    if (threadIdx.x == 0) {
      unroll<N>([&](int n) { mine[n] = x->at[n]; });
    }
    cluster_sync();
    if (static_cast<int>(threadIdx.x) < N) {
      float total = 0.0f;
      for (int other = 0; other < plan.narrow_cluster; ++other) total += cluster_shared(mine, other)[threadIdx.x];
      totals[turn * kNarrowValues + threadIdx.x] = total;
    }
    __syncthreads();
    unroll<N>([&](int n) { x->at[n] = totals[turn * kNarrowValues + n]; });
  }

  PROTO_REG_DEVICE void load(int64_t first) {
    const T* const scores = static_cast<const T*>(a.problem.scores);
    unroll<R>([&](int r) {
      const int64_t at = row(first, r);
      unroll<Q>([&](int q) {
        x[r][q] = at < a.problem.rows && owns(q)
                      ? read_quad(scores + at * a.problem.columns, column(q), a.problem.columns, a.vectors)
                      : filled(-infinity());
      });
    });
  }

  PROTO_REG_DEVICE float exponential(const Quad& scores, int q, int j) const {
    return exp2_fast(fmaf(scores.at[j], a.scale * kEighth, potential[q].at[j]));
  }

  // Turns scores into exponentials, and returns their sums over each row.
  PROTO_REG_DEVICE Values<R> fill() {
    Values<R> sum{};
    unroll<R>([&](int r) {
      unroll<Q>([&](int q) {
        unroll<4>([&](int j) {
          x[r][q].at[j] = exponential(x[r][q], q, j);
          sum.at[r] += x[r][q].at[j];
        });
      });
    });
    sum_over_row(&sum);
    return sum;
  }

  PROTO_REG_DEVICE void add_columns() {
    Quad column_sums[Q];
    unroll<Q>([&](int q) { column_sums[q] = filled(0.0f); });
    for (int64_t first = first_row(); first < a.problem.rows; first += step()) {
      load(first);
      const Values<R> sum = fill();
      unroll<R>([&](int r) {
        const int64_t at = row(first, r);
        const float weight = at < a.problem.rows ? state.row_weight(a, at) : 0.0f;
        const float weighted = weight > 0.0f ? divide(weight, sum.at[r]) : 0.0f;
        unroll<Q>([&](int q) { unroll<4>([&](int j) { column_sums[q].at[j] += weighted * x[r][q].at[j]; }); });
      });
    }
    publish(column_sums);
  }

  // If a warp holds whole rows, sums are merged over its lanes first, and then over the warps in their order.
  PROTO_REG_DEVICE void publish(Quad (&column_sums)[Q]) {
    float* const out = state.partials + blockIdx.x / plan.narrow_cluster * a.plan.stride;
    float* const scratch = shared_floats();
    const int warps = team > 32 ? 1 : blockDim.x / 32, warp = team > 32 ? 0 : threadIdx.x / 32;
    const bool stores = team > 32 || static_cast<int>(threadIdx.x) % 32 < team;
    unroll<Q>([&](int q) {
      Values<4> sum;
      unroll<4>([&](int j) { sum.at[j] = column_sums[q].at[j]; });
      if (team < 32) sum = reduce_lanes<4>(sum, 32, Add(), team);
      unroll<4>([&](int j) { column_sums[q].at[j] = sum.at[j]; });
    });
    for (int turn_of = 0; turn_of < warps; ++turn_of) {
      if (warps > 1) __syncthreads();
      if (warp != turn_of || !stores) continue;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        if (!owns(q)) continue;
        float* const at = scratch + 4 * (q * team + lane);
        Quad sum = column_sums[q];
        if (turn_of > 0) {
          const Quad before = load_quad(at);
          unroll<4>([&](int j) { sum.at[j] += before.at[j]; });
        }
        store_quad(turn_of + 1 == warps ? out + column(q) : at, sum);
      }
    }
  }

  PROTO_REG_DEVICE int64_t first_row() const { return blockIdx.x / plan.narrow_cluster * rows_at_once; }
  PROTO_REG_DEVICE int64_t step() const { return gridDim.x / plan.narrow_cluster * rows_at_once; }

  PROTO_REG_DEVICE void put(void* to, int64_t at, int q, Quad values) const {
    if (!to || at >= a.problem.rows || !owns(q)) return;
    write_quad(static_cast<T*>(to) + at * a.problem.columns, column(q), a.problem.columns, a.vectors, values);
  }

  PROTO_REG_DEVICE void write() {
    for (int64_t first = first_row(); first < a.problem.rows; first += step()) {
      load(first);
      const Values<R> sum = fill();
      unroll<R>([&](int r) {
        const float factor = divide(1.0f, sum.at[r]);
        unroll<Q>([&](int q) { put(a.problem.codes, row(first, r), q, code(x[r][q], factor)); });
      });
    }
  }

  PROTO_REG_DEVICE Quad code(Quad e, float factor) const {
    unroll<4>([&](int j) {
      e.at[j] *= factor;
      if (a.problem.columns == 1 && e.at[j] == e.at[j]) e.at[j] = 1.0f;  // exactly
    });
    return e;
  }

  // Writes codes, cross-entropy and its gradient; each thread takes one of its rows at a time.
  PROTO_REG_DEVICE void write_entropy() {
    const float sharpness = a.entropy_scale * kEighth, total = *state.total;
    const float per_weight = divide(sharpness * kLn2, total);
    float loss = 0.0f;
    for (int64_t first = first_row(); first < a.problem.rows; first += step()) {
      load(first);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        Values<3> sum{};  // of exponentials, of those of the prediction, of exponentials times scores
#pragma unroll
        for (int q = 0; q < Q; ++q) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float score = x[r][q].at[j], e = exponential(x[r][q], q, j);
            sum.at[0] += e;
            sum.at[1] += exp2_fast(score * sharpness);
            sum.at[2] += e == 0.0f ? 0.0f : e * score;
          }
        }
        sum_over_row(&sum);
        const int64_t at = row(first, r);
        const float weight = at < a.problem.rows ? state.row_weight(a, at) : 0.0f;
        const float factor = divide(1.0f, sum.at[0]), norm = divide(1.0f, sum.at[1]);
        if (lane == 0 && rank == 0 && weight > 0.0f) {
          loss += weight * (logf(sum.at[1]) - sum.at[2] * factor * sharpness * kLn2);
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          Quad e, gradient;
#pragma unroll
          for (int j = 0; j < 4; ++j) e.at[j] = exponential(x[r][q], q, j);
          const Quad codes = code(e, factor);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float predicted = a.problem.columns == 1 ? codes.at[j] : exp2_fast(x[r][q].at[j] * sharpness) * norm;
            gradient.at[j] = weight > 0.0f ? weight * per_weight * (predicted - codes.at[j]) : 0.0f;
          }
          put(a.problem.codes, at, q, codes);
          put(a.problem.gradient, at, q, gradient);
        }
      }
    }
    __syncthreads();
    loss = sum_block(loss, shared_floats());
    if (threadIdx.x == 0) state.losses[blockIdx.x] = loss;
  }

  PROTO_REG_DEVICE void run() {
    unroll<Q>([&](int q) { potential[q] = owns(q) ? load_quad(state.folded + column(q)) : filled(-infinity()); });
    if constexpr (kFor == Narrow::sums) add_columns();
    if constexpr (kFor == Narrow::codes) write();
    if constexpr (kFor == Narrow::entropy) write_entropy();
    if (plan.narrow_cluster > 1) cluster_sync();  // nobody leaves while others read its shared memory
  }
};

template <class T, int R, int Q, Narrow kFor>
__global__ void __launch_bounds__(kNarrowThreads, kFor == Narrow::entropy || Q == 4 ? 1 : 2) stream_narrow(const SinkhornArgs a) {
  const StreamState state(a);
  if (!state.narrow(a) || (kFor == Narrow::sums && *state.settled != 0.0f)) return;
  NarrowPass<T, R, Q, kFor>(a).run();
}

}  // namespace proto_reg
