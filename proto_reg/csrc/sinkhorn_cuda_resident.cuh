// The kernel that keeps the matrix in shared memory, of one block, a cluster or a cooperative grid. Scores are read
// once, and codes are written once. sinkhorn_cuda.cu launches sinkhorn_resident.
#pragma once

#include "sinkhorn_cuda_peers.cuh"
#include "sinkhorn_cuda_tile.cuh"

namespace proto_reg {

// Shared memory of a block, in the order of resident_floats().
struct ResidentShared {
  float *tile, *scale, *rows, *scratch, *columns;

  PROTO_REG_DEVICE explicit ResidentShared(const SinkhornPlan& plan) {
    tile = shared_floats();
    scale = tile + plan.rows_per_block * plan.stride;
    rows = scale + plan.stride;
    scratch = rows + round_up(5 * plan.rows_per_block, 4);
    columns = scratch + scratch_floats(plan.rows_per_block, plan.threads, plan.segments);
  }
};

template <class T, Regime kRegime>
struct Resident {
  const SinkhornArgs& a;
  const int64_t group, first_row;  // of this block, within the group
  const ResidentShared shared;
  const Layout layout;
  const RowState rows;
  const ColumnState columns;
  float* const scale;     // v
  float* const sums;      // of E^T (weight / s) over all rows
  Peers<kRegime> peers;
  float total = 0.0f;     // weight of all rows

  PROTO_REG_DEVICE Resident(const SinkhornArgs& args, int64_t group_, float* shared_state)
      : a(args), group(group_),
        first_row((kRegime == Regime::grid ? blockIdx.x : kRegime == Regime::cluster ? cluster_rank() : 0) *
                  args.plan.rows_per_block),
        shared(args.plan),
        layout(make_layout(block_rows(), static_cast<int>(args.plan.stride / 4), static_cast<int>(args.plan.segments),
                           static_cast<int>(args.plan.rows_per_block))),
        rows{shared.rows, static_cast<int>(args.plan.rows_per_block)},
        columns{shared_state, shared_state + args.plan.stride},
        scale(shared.scale), sums(shared_state + 2 * args.plan.stride),
        peers(args.plan, shared_state + 3 * args.plan.stride) {}

  PROTO_REG_DEVICE int block_rows() const {
    const int64_t left = a.problem.rows - first_row;
    return static_cast<int>(left < 0 ? 0 : left < a.plan.rows_per_block ? left : a.plan.rows_per_block);
  }

  PROTO_REG_DEVICE int64_t matrix_row(int row) const { return group * a.problem.rows + first_row + row; }

  PROTO_REG_DEVICE float* entry(int row, int quad) const {
    return shared.tile + (static_cast<int64_t>(row) * layout.quads + quad) * 4;
  }

  PROTO_REG_DEVICE Quad held(int row, int quad) const { return load_quad(entry(row, quad)); }

  PROTO_REG_DEVICE Quad score(int row, int quad) const {
    return read_scores(static_cast<const T*>(a.problem.scores) + matrix_row(row) * a.problem.columns, 4 * quad,
                       a.problem.columns, a.vectors);
  }

  PROTO_REG_DEVICE void load() {
    for_columns<kLoads>(layout, [&](int row, int quad) { return score(row, quad); },
                [&](int row, int quad, const Quad& x) { store_quad(entry(row, quad), x); });
    __syncthreads();
    fill_weights(a, layout, group, matrix_row(0), rows.weight(), shared.scratch,
                 [&](int row, int quad) { return held(row, quad); });
    float weight = 0.0f;
    for (int row = threadIdx.x; row < layout.rows; row += blockDim.x) weight += rows.weight()[row];
    weight = sum_block(weight, shared.scratch);
    if (threadIdx.x == 0) peers.scalars()[0] = weight;
  }

  // Computes column maxima and the sums of exponentials below them, and from both, over all blocks, the first
  // potentials.
  PROTO_REG_DEVICE void start_columns() {
    float* const top = peers.buffer();
    float* const mass = top + a.plan.stride;
    reduce_columns<true>(layout, shared.scratch, top, [&](int row, int quad) {
      return rows.weight()[row] > 0.0f ? held(row, quad) : filled(-infinity());
    });
    reduce_columns<false>(layout, shared.scratch, mass, [&](int row, int quad) {
      const float weight = rows.weight()[row];
      const Quad x = held(row, quad), below = load_quad(top + 4 * quad);
      Quad e = filled(0.0f);
      if (weight > 0.0f) {
        unroll<4>([&](int j) {
          e.at[j] = weight * exp2_fast((x.at[j] - (below.at[j] == -infinity() ? 0.0f : below.at[j])) * a.scale);
        });
      }
      return e;
    });
    peers.publish();
    total = peers.sum_scalar(0, shared.scratch);
    peers.template gather<2>(shared.scratch, {{-infinity(), 0.0f}}, MergeExponentials{a.scale},
                             [&](int k, const Values<2>& column) {
                               start_column(a.problem, group, k, total, column.at[0], column.at[1], columns);
                             });
  }

  PROTO_REG_DEVICE void start_rows() {
    auto term = [&](int row, int quad, Values<1>* top) {
      row_top_term(held(row, quad), columns.top + 4 * quad, top);
    };
    reduce_rows<1>(layout, {{-infinity()}}, shared.scratch, Max(), term, [&](int row, const Values<1>& top) {
      rows.top()[row] = top.at[0] == -infinity() ? 0.0f : top.at[0];
      rows.shift()[row] = 0.0f;
    });
    for (int k = threadIdx.x; k < a.plan.stride; k += blockDim.x) scale[k] = 1.0f;
    fill_exponentials<2>(a, layout, shared.tile, rows, columns, [&](int row, int quad) { return held(row, quad); });
  }

  // Takes two rows at a time, which share the loads of v, because shared memory limits this.
  PROTO_REG_DEVICE void sum_rows() {
    Layout pairs = layout;
    pairs.rows = (layout.rows + 1) / 2;
    auto term = [&](int pair, int quad, Values<2>* sums) {
      const Quad v = load_quad(scale + 4 * quad);
      unroll<2>([&](int half) {
        const Quad e = held(min(2 * pair + half, layout.rows - 1), quad);
        unroll<4>([&](int j) { sums->at[half] += e.at[j] * v.at[j]; });
      });
    };
    reduce_rows<2>(pairs, {{0.0f, 0.0f}}, shared.scratch, Add(), term, [&](int pair, const Values<2>& sums) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 2 * pair + half;
        if (row >= layout.rows) break;
        rows.factor()[row] = divide(1.0f, sums.at[half]);
        rows.weighted()[row] = rows.weight()[row] > 0.0f ? rows.weight()[row] * rows.factor()[row] : 0.0f;
      }
    });
  }

  PROTO_REG_DEVICE void sum_columns() {
    reduce_columns<false>(layout, shared.scratch, peers.buffer(), [&](int row, int quad) {
      Quad e = held(row, quad);
      unroll<4>([&](int j) { e.at[j] *= rows.weighted()[row]; });
      return e;
    });
    peers.publish();
    peers.template gather<1>(shared.scratch, {{0.0f}}, Add(),
                             [&](int k, const Values<1>& sum) { sums[k] = sum.at[0]; });
  }

  // Sets v, in every block alike. If all columns are within tol, returns false and changes nothing.
  PROTO_REG_DEVICE bool update() {
    auto sum = [&](int k) { return scale[k] * column_sum(k); };
    if (a.problem.tol >= 0.0 && !far_from_targets(a.problem, group, total, shared.scratch, sum)) return false;
    bool wide = false;
    for (int k = threadIdx.x; k < a.problem.columns; k += blockDim.x) {
      const float sum = column_sum(k);
      const float v = sum == 0.0f ? 0.0f : divide(column_target(a.problem, group, k, total), sum);
      scale[k] = v;
      wide |= v > kLargestScale || (v < 1.0f / kLargestScale && v > 0.0f);
    }
    if (__syncthreads_or(wide)) rebuild();
    return true;
  }

  PROTO_REG_DEVICE float column_sum(int k) const { return kRegime == Regime::grid ? __ldcg(sums + k) : sums[k]; }

  PROTO_REG_DEVICE void rebuild() {
    for (int k = peers.first() + threadIdx.x; k < peers.last(); k += blockDim.x) {
      columns.potential[k] += log2f(scale[k]);
    }
    for (int row = threadIdx.x; row < layout.rows; row += blockDim.x) {
      if (rows.factor()[row] < infinity()) rows.shift()[row] += log2f(rows.factor()[row]);
    }
    peers.agree();
    for (int k = threadIdx.x; k < a.plan.stride; k += blockDim.x) scale[k] = 1.0f;
    fill_exponentials<1>(a, layout, shared.tile, rows, columns, [&](int row, int quad) { return score(row, quad); });
  }

  PROTO_REG_DEVICE void write() {
    auto code = [&](int row, int quad) {
      Quad e = held(row, quad);
      const Quad v = load_quad(scale + 4 * quad);
      unroll<4>([&](int j) { e.at[j] *= v.at[j] * rows.factor()[row]; });
      return e;
    };
    auto source = [&](int row, int quad) { return score(row, quad); };
    const EntropyState entropy{rows.top(), rows.shift(), rows.weighted()};
    if (a.problem.loss) row_entropies(a, layout, rows.weight(), entropy, shared.scratch, source, code);
    write_rows<T>(a, layout, matrix_row(0), rows.weight(), total, entropy, source, code);
    if (kRegime != Regime::cluster || peers.rank == 0) {
      for (int k = peers.first() + threadIdx.x; k < peers.last() && k < a.problem.columns; k += blockDim.x) {
        const float potential = columns.potential[k] + log2f(scale[k]);
        a.problem.potentials[group * a.problem.columns + k] = public_potential(a, potential, columns.top[k], total);
      }
    }
    if (a.problem.loss) write_loss();
    if (kRegime == Regime::cluster) cluster_sync();  // nobody leaves while others read its shared memory
  }

  PROTO_REG_DEVICE void write_loss() {
    float loss = 0.0f;
    for (int row = threadIdx.x; row < layout.rows; row += blockDim.x) loss += rows.weighted()[row];
    loss = sum_block(loss, shared.scratch);
    if (threadIdx.x == 0) peers.scalars()[1] = loss;
    peers.publish();
    if (peers.rank != 0) return;
    loss = peers.sum_scalar(1, shared.scratch);
    if (threadIdx.x == 0) a.problem.loss[group] = total > 0.0f ? divide(loss, total) : 0.0f;
  }

  PROTO_REG_DEVICE void run() {
    load();
    start_columns();
    start_rows();
    for (int64_t iteration = 1; iteration < a.problem.num_iters && total > 0.0f; ++iteration) {
      sum_rows();
      sum_columns();
      if (!update()) break;
    }
    sum_rows();
    write();
  }
};

template <class T, Regime kRegime>
__global__ void __launch_bounds__(kResidentThreads, 1) sinkhorn_resident(const SinkhornArgs a) {
  const int64_t group = kRegime == Regime::grid ? 0 : blockIdx.x / a.plan.blocks;
  float* const state = kRegime == Regime::grid ? a.workspace : ResidentShared(a.plan).columns;
  Resident<T, kRegime>(a, group, state).run();
}

}  // namespace proto_reg
