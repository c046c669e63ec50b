// Streamed kernels that go through whole rows: a sweep sums rows, one writes, and the fused pass sums rows and columns
// in one read. sinkhorn_cuda.cu launches them.
#pragma once

#include "sinkhorn_cuda_peers.cuh"
#include "sinkhorn_cuda_stream.cuh"

namespace proto_reg {

// Moves the potential of a row of E that sums to `sum`, so that it will sum to 1. A row whose sum is 0 or NaN is marked
// like one that holds a NaN.
PROTO_REG_DEVICE void move_row(const RowState& rows, int row, float sum) {
  rows.weighted()[row] = rows.weight()[row] > 0.0f ? divide(rows.weight()[row], sum) : 0.0f;
  if (sum > 0.0f) {
    rows.shift()[row] -= log2f(sum);
  } else {
    rows.top()[row] = infinity();
  }
}

// A batch of rows of a sweep, with their state in shared memory.
template <class T>
struct SweepRows {
  const SinkhornArgs& a;
  const StreamState& state;
  const int64_t first;
  const Layout layout;
  const RowState rows;
  const EntropyState entropy;
  float* const scratch;

  PROTO_REG_DEVICE SweepRows(const SinkhornArgs& args, const StreamState& state_, int64_t first_row)
      : a(args), state(state_), first(first_row),
        layout(make_layout(static_cast<int>(smaller(args.plan.sweep_rows, args.problem.rows - first_row)),
                           static_cast<int>(args.plan.stride / 4), static_cast<int>(args.plan.sweep_segments), 1)),
        rows{shared_floats(), static_cast<int>(args.plan.sweep_rows)},
        entropy{rows.weighted() + args.plan.sweep_rows, rows.weighted() + 2 * args.plan.sweep_rows,
                rows.weighted() + 3 * args.plan.sweep_rows},
        scratch(shared_floats() + round_up(8 * args.plan.sweep_rows, 4)) {}

  PROTO_REG_DEVICE Quad score(int row, int quad) const { return stream_score<T>(a, first + row, 4 * quad); }

  PROTO_REG_DEVICE Quad exponential(int row, int quad) const {
    return exponentials(a, score(row, quad), load_quad(state.columns.top + 4 * quad),
                        load_quad(state.columns.potential + 4 * quad), rows.top()[row], rows.shift()[row],
                        rows.weight()[row]);
  }

  // Reads the state from the workspace, or on the first pass from the scores. All threads are in step afterwards.
  PROTO_REG_DEVICE void load(bool start) const {
    for (int row = threadIdx.x; row < layout.rows; row += blockDim.x) {
      rows.weight()[row] = state.row_weight(a, first + row);
      rows.shift()[row] = start ? 0.0f : state.shift[first + row];
      if (!start) rows.top()[row] = state.row_top[first + row];
    }
    if (start) {
      auto term = [&](int row, int quad, Values<1>* top) {
        row_top_term(score(row, quad), state.columns.top + 4 * quad, top);
      };
      reduce_rows<1>(layout, {{-infinity()}}, scratch, Max(), term, [&](int row, const Values<1>& top) {
        rows.top()[row] = top.at[0] == -infinity() ? 0.0f : top.at[0];
      });
    }
    __syncthreads();
  }

  // `move`: also moves the rows' potentials.
  PROTO_REG_DEVICE void sum(bool move) const {
    auto term = [&](int row, int quad, Values<1>* sum) {
      const Quad e = exponential(row, quad);
      sum->at[0] += (e.at[0] + e.at[1]) + (e.at[2] + e.at[3]);
    };
    reduce_rows<1>(layout, {{0.0f}}, scratch, Add(), term, [&](int row, const Values<1>& sum) {
      rows.factor()[row] = divide(1.0f, sum.at[0]);
      if (move) move_row(rows, row, sum.at[0]);
    });
  }

  PROTO_REG_DEVICE Quad code(int row, int quad) const {
    Quad e = exponential(row, quad);
    unroll<4>([&](int j) { e.at[j] *= rows.factor()[row]; });
    return e;
  }
};

// Sets row potentials so that each row of E sums to 1. `start`: for the first time.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) stream_sum_rows(const SinkhornArgs a, bool start) {
  const StreamState state(a);
  if (*state.settled != 0.0f || state.narrow(a)) return;
  for (int64_t first = blockIdx.x * a.plan.sweep_rows; first < a.problem.rows;
       first += gridDim.x * a.plan.sweep_rows) {
    const SweepRows<T> batch(a, state, first);
    batch.load(start);
    batch.sum(true);
    for (int row = threadIdx.x; row < batch.layout.rows; row += blockDim.x) {
      state.row_top[first + row] = batch.rows.top()[row];
      state.shift[first + row] = batch.rows.shift()[row];
    }
    __syncthreads();
  }
}

// Codes, cross-entropy and its gradient.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) stream_write(const SinkhornArgs a) {
  const StreamState state(a);
  if (state.narrow(a)) return;
  float loss = 0.0f;
  for (int64_t first = blockIdx.x * a.plan.sweep_rows; first < a.problem.rows;
       first += gridDim.x * a.plan.sweep_rows) {
    const SweepRows<T> batch(a, state, first);
    batch.load(false);
    batch.sum(false);
    auto source = [&](int row, int quad) { return batch.score(row, quad); };
    auto code = [&](int row, int quad) { return batch.code(row, quad); };
    if (a.problem.loss) {
      row_entropies(a, batch.layout, batch.rows.weight(), batch.entropy, batch.scratch, source, code);
      for (int row = threadIdx.x; row < batch.layout.rows; row += blockDim.x) loss += batch.entropy.loss[row];
    }
    write_rows<T>(a, batch.layout, first, batch.rows.weight(), *state.total, batch.entropy, source, code);
    __syncthreads();
  }
  if (!a.problem.loss) return;
  loss = sum_block(loss, shared_floats());
  if (threadIdx.x == 0) state.losses[blockIdx.x] = loss;
}

// One pass over the matrix, with tiles of rows in shared memory. The blocks of a cluster share a long row.
template <class T, bool kCluster>
struct FusedPass {
  const SinkhornArgs& a;
  const StreamState state;
  const int rank, most_rows;
  const int64_t first_column;
  const int quads;        // of this block
  float *const tile, *const sums;
  const RowState rows;
  float* const parts;     // per row, this block's part of a reduction; two buffers
  float* const scratch;
  int turn = 0;

  PROTO_REG_DEVICE explicit FusedPass(const SinkhornArgs& args)
      : a(args), state(args), rank(kCluster ? cluster_rank() : 0),
        most_rows(static_cast<int>(args.plan.rows_per_block)), first_column(rank * args.plan.local_columns),
        quads(static_cast<int>(smaller(args.plan.local_columns, args.plan.stride - first_column) / 4)),
        tile(shared_floats()), sums(tile + most_rows * args.plan.local_columns),
        rows{sums + larger(args.plan.local_columns, 4 * args.plan.threads), most_rows},
        parts(rows.weighted() + most_rows), scratch(rows.weight() + round_up(7 * most_rows, 4)) {}

  // Combines this block's parts with those of the cluster's other blocks, in their order, and calls finish(row, value).
  template <class Combine, class Finish>
  PROTO_REG_DEVICE void over_cluster(const Layout& l, Combine combine, Finish finish) {
    float* const mine = parts + turn * most_rows;
    if (kCluster) cluster_sync();
    for (int row = threadIdx.x; row < l.rows; row += blockDim.x) {
      Values<1> value{{kCluster ? cluster_shared(mine, 0)[row] : mine[row]}};
      for (int other = 1; kCluster && other < a.plan.cluster; ++other) {
        value = combine(value, Values<1>{{cluster_shared(mine, other)[row]}});
      }
      finish(row, value.at[0]);
    }
    turn ^= 1;
    __syncthreads();
  }

  PROTO_REG_DEVICE float* entry(int row, int quad) const {
    return tile + (static_cast<int64_t>(row) * quads + quad) * 4;
  }

  // Computes the tile's E, and the first time the rows' shifts. All threads are in step afterwards.
  PROTO_REG_DEVICE void fill(const Layout& l, int64_t first, bool start) {
    const ColumnState columns{state.columns.top + first_column, state.columns.potential + first_column};
    auto score = [&](int row, int quad) { return stream_score<T>(a, first + row, first_column + 4 * quad); };
    auto held = [&](int row, int quad) { return load_quad(entry(row, quad)); };
    for (int row = threadIdx.x; row < l.rows; row += blockDim.x) {
      rows.weight()[row] = state.row_weight(a, first + row);
      rows.shift()[row] = start ? 0.0f : state.shift[first + row];
      if (!start) rows.top()[row] = state.row_top[first + row];
    }
    if (start) {
      for_columns<kLoads>(l, score, [&](int row, int quad, const Quad& x) { store_quad(entry(row, quad), x); });
      __syncthreads();
      auto term = [&](int row, int quad, Values<1>* top) {
        row_top_term(held(row, quad), columns.top + 4 * quad, top);
      };
      reduce_rows<1>(l, {{-infinity()}}, scratch, Max(), term,
                     [&](int row, const Values<1>& top) { parts[turn * most_rows + row] = top.at[0]; });
      over_cluster(l, Max(), [&](int row, float top) { rows.top()[row] = top == -infinity() ? 0.0f : top; });
      fill_exponentials<2>(a, l, tile, rows, columns, held);
    } else {
      __syncthreads();
      fill_exponentials<kLoads>(a, l, tile, rows, columns, score);
    }
  }

  PROTO_REG_DEVICE void sum_rows(const Layout& l, int64_t first) {
    auto term = [&](int row, int quad, Values<1>* sum) {
      const Quad e = load_quad(entry(row, quad));
      sum->at[0] += (e.at[0] + e.at[1]) + (e.at[2] + e.at[3]);
    };
    reduce_rows<1>(l, {{0.0f}}, scratch, Add(), term,
                   [&](int row, const Values<1>& sum) { parts[turn * most_rows + row] = sum.at[0]; });
    over_cluster(l, Add(), [&](int row, float sum) {
      move_row(rows, row, sum);
      if (rank != 0) return;
      state.row_top[first + row] = rows.top()[row];
      state.shift[first + row] = rows.shift()[row];
    });
  }

  // A thread's own sums, at the place that the layout by columns gives them.
  PROTO_REG_DEVICE float* own_sums(const Layout& l, int quad) const {
    return sums + 4 * (l.groups == 1 ? quad : static_cast<int>(threadIdx.x));
  }

  PROTO_REG_DEVICE void add_columns(const Layout& l) const {
    for (int quad = l.quad; quad < l.quads; quad += blockDim.x) {
      Quad sum = filled(0.0f), before = load_quad(own_sums(l, quad));
#pragma unroll 4
      for (int row = l.group; row < l.rows; row += l.groups) {
        const Quad e = load_quad(entry(row, quad));
        unroll<4>([&](int j) { sum.at[j] += rows.weighted()[row] * e.at[j]; });
      }
      unroll<4>([&](int j) { sum.at[j] += before.at[j]; });
      store_quad(own_sums(l, quad), sum);
    }
  }

  PROTO_REG_DEVICE void run(bool start) {
    const int64_t clusters = gridDim.x / a.plan.cluster, cluster = blockIdx.x / a.plan.cluster;
    Layout l = make_layout(0, quads, static_cast<int>(a.plan.segments), most_rows);
    for (int quad = l.quad; quad < l.quads; quad += blockDim.x) store_quad(own_sums(l, quad), filled(0.0f));
    for (int64_t first = cluster * most_rows; first < a.problem.rows; first += clusters * most_rows) {
      l.rows = static_cast<int>(smaller(most_rows, a.problem.rows - first));
      fill(l, first, start);
      sum_rows(l, first);
      add_columns(l);  // needs no barrier: until the next one, threads overwrite only what they alone read
    }
    float* const out = state.partials + cluster * a.plan.stride + first_column;
    if (l.groups == 1) {
      for (int quad = l.quad; quad < l.quads; quad += blockDim.x) {
        store_quad(out + 4 * quad, load_quad(own_sums(l, quad)));
      }
    } else {
      reduce_groups<false>(l, l.quad < l.quads ? load_quad(own_sums(l, l.quad)) : filled(0.0f), scratch, out);
    }
    if (kCluster) cluster_sync();  // nobody leaves while others read its shared memory
  }
};

template <class T, bool kCluster>
__global__ void __launch_bounds__(kFusedThreads, 2) stream_pass(const SinkhornArgs a, bool start) {
  FusedPass<T, kCluster> pass(a);
  if (*pass.state.settled == 0.0f && !pass.state.narrow(a)) pass.run(start);
}

}  // namespace proto_reg
