// Decides how a problem lies over a device, on the host, from the shape and the device's limits, never from the data.
// sinkhorn_cuda.cu calls plan_sinkhorn, and the kernels read the plan.
#pragma once

#include <cstdint>

#include "sinkhorn_problem.h"

#ifdef __CUDACC__
#define PROTO_REG_BOTH __host__ __device__
#else
#define PROTO_REG_BOTH
#endif

namespace proto_reg {

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t threads_per_block;         // 1024 on every device so far
  int64_t shared_per_block;          // bytes that a block may ask for
  int64_t shared_per_multiprocessor;
  int64_t capability;                // 80, 90, ...
  bool cooperative;                  // a grid of one block per multiprocessor may wait for itself
  bool clusters;                     // blocks of a cluster reach each other's shared memory: capability 90 and above
  int64_t grid_clusters;             // clusters of 8 in a cooperative grid; fewer if a launch would not fit
};

// Where the matrix lives between the passes.
enum class Regime : int32_t {
  registers, // registers of one block, of a cluster or of a cooperative grid for each group
  block,     // shared memory of one block for each group
  cluster,   // shared memory of a cluster of at most 8 blocks for each group
  grid,      // shared memory of a cooperative grid, one group after the other
  streamed,  // device memory: every pass reads it again
};

struct SinkhornPlan {
  Regime regime;
  int64_t stride;          // columns, rounded up to whole quads (4 floats)
  int64_t threads;         // of a block
  int64_t blocks;          // for each group
  int64_t cluster;         // blocks of a cluster; 1: none
  int64_t rows_per_block;  // streamed: rows of a block's tile
  int64_t segments;        // pieces of a row, each summed by a warp, if there are fewer rows than warps
  int64_t shared_bytes;
  int64_t workspace_floats;

  // Registers alone.
  int64_t lanes;               // of a warp, for one row
  int64_t rows_per_thread, columns_per_thread;

  // Streamed alone.
  bool fused;              // one kernel sums rows and columns in one read; false: a sweep for each
  int64_t local_columns;   // of a block of the cluster that shares a row
  int64_t slabs;           // column sweep: pieces of the batch
  int64_t sweep_rows;      // row sweep: rows that a block takes at one time
  int64_t sweep_segments;
  int64_t sweep_blocks;
  int64_t sweep_threads;

  // Streamed, where the scores' range is narrow; 0 blocks: rows are too long for that.
  int64_t narrow_blocks, narrow_threads;
  int64_t narrow_cluster;           // blocks that share a row
  int64_t narrow_lanes;             // threads of a block that share a row, if they are fewer than all
  int64_t narrow_quads;             // of a row, for a block
  int64_t narrow_rows, narrow_own;  // rows and quads of a thread
};

constexpr int64_t kRegisterThreads = 512;   // with at most 128 registers each
constexpr int64_t kRegisterColumns = 12;   // of a thread
constexpr int64_t kRegisterEntries = 20;    // of the matrix, of a thread
constexpr int64_t kResidentThreads = 640;  // five warps to a scheduler: at most 96 registers each
constexpr int64_t kSweepThreads = 256;
constexpr int64_t kFusedThreads = 384;  // two such blocks on a multiprocessor
constexpr int64_t kClusterBlocks = 8;  // the most that every device with clusters grants
constexpr int64_t kNarrowThreads = 512;
constexpr int64_t kNarrowValues = 4;   // that are summed over a row at one time
constexpr float kNarrowLimit = 40.0f;  // of exponents, base 2, without shifts
constexpr int64_t kReserved = 1024;    // bytes of shared memory that the driver keeps of each block
constexpr int64_t kStateFloats = 8;    // streamed: total weight, and what is in StreamState after it
constexpr int64_t kScalars = 4;        // of a block's partial column sums: its weight, its loss

PROTO_REG_BOTH inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PROTO_REG_BOTH inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

PROTO_REG_BOTH inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
PROTO_REG_BOTH inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Threads of a block: one for each quad of as many rows as fit, or each with an equal number of quads of one row.
inline int64_t choose_threads(int64_t rows, int64_t quads, int64_t most) {
  if (quads > most) return round_up(ceil_div(quads, ceil_div(quads, most)), 32);
  const int64_t groups = smaller(rows, most / quads);
  return smaller(most, larger(64, round_up(groups * quads, 32)));
}

// The number of pieces of a row with which no warp waits long for the others.
inline int64_t choose_segments(int64_t rows, int64_t quads, int64_t threads) {
  const int64_t warps = threads / 32;
  int64_t best = 1;
  for (int64_t n = 2; n <= 32 && quads >= 32 * n; ++n) {
    if (ceil_div(rows * n, warps) * best < ceil_div(rows * best, warps) * n) best = n;
  }
  return best;
}

PROTO_REG_BOTH inline int64_t scratch_floats(int64_t rows, int64_t threads, int64_t segments) {
  return larger(4 * threads, round_up(2 * rows * segments, 4));
}

// Floats of shared memory of the resident kernel: the matrix, and what every pass needs for each row and column.
inline int64_t resident_floats(Regime regime, int64_t rows, int64_t stride, int64_t threads, int64_t segments) {
  const int64_t held = rows * stride + stride + round_up(5 * rows, 4) + scratch_floats(rows, threads, segments);
  if (regime == Regime::grid) return held;
  return held + 3 * stride + (regime == Regime::cluster ? 2 : 1) * (2 * stride + kScalars);
}

// Plans the resident regime over `blocks` blocks. Returns whether their shared memory holds the matrix.
inline bool plan_resident(const SinkhornProblem& p, const DeviceLimits& d, Regime regime, int64_t blocks,
                          SinkhornPlan* plan) {
  plan->regime = regime;
  plan->rows_per_block = ceil_div(p.rows, blocks);
  plan->blocks = ceil_div(p.rows, plan->rows_per_block);
  plan->cluster = regime == Regime::cluster ? blocks : 1;
  if (regime == Regime::cluster) plan->blocks = blocks;  // some may hold no row
  const int64_t quads = plan->stride / 4;
  plan->threads = choose_threads(plan->rows_per_block, quads, smaller(kResidentThreads, d.threads_per_block));
  plan->segments = choose_segments(ceil_div(plan->rows_per_block, 2), quads, plan->threads);  // rows go in pairs
  plan->shared_bytes =
      4 * resident_floats(regime, plan->rows_per_block, plan->stride, plan->threads, plan->segments);
  plan->workspace_floats =
      regime == Regime::grid ? 3 * plan->stride + plan->blocks * (2 * plan->stride + kScalars) : 0;
  return plan->shared_bytes <= d.shared_per_block;
}

// Plans how a row lies over lanes of a warp. Each has an even number of columns, best about four, and few are unused.
// Returns false if the row is too long.
inline bool plan_lanes(const SinkhornProblem& p, SinkhornPlan* plan) {
  int64_t best = INT64_MAX;
  for (int64_t lanes = 1; lanes <= 32; lanes *= 2) {
    const int64_t columns = round_up(ceil_div(p.columns, lanes), 2);
    if (columns > kRegisterColumns) continue;
    const int64_t cost = lanes * columns + 2 * larger(columns - 4, 4 - columns);
    if (cost >= best) continue;
    best = cost;
    plan->lanes = lanes;
    plan->columns_per_thread = columns;
  }
  return best < INT64_MAX;
}

// Plans the registers of `blocks` blocks, in clusters of `cluster`. Returns whether they hold the matrix.
inline bool plan_registers(const SinkhornProblem& p, const DeviceLimits& d, int64_t blocks, int64_t cluster,
                           SinkhornPlan* plan) {
  plan->regime = Regime::registers;
  plan->cluster = cluster;
  plan->rows_per_block = ceil_div(p.rows, blocks);
  plan->blocks = round_up(ceil_div(p.rows, plan->rows_per_block), cluster);  // some may hold no row
  if (!plan_lanes(p, plan)) return false;
  const int64_t most = smaller(kRegisterThreads, d.threads_per_block) / 32, places = 32 / plan->lanes;
  int64_t warps = INT64_MAX;
  for (plan->rows_per_thread = 1;; plan->rows_per_thread *= 2) {
    if (plan->rows_per_thread > 4 || plan->rows_per_thread * plan->columns_per_thread > kRegisterEntries) return false;
    warps = ceil_div(plan->rows_per_block, places * plan->rows_per_thread);
    if (warps <= most) break;
  }
  plan->threads = 32 * larger(2, warps);
  const int64_t pitch = plan->lanes * plan->columns_per_thread;
  plan->shared_bytes = 4 * (2 * (plan->threads / 32) * pitch + 8 * pitch + kScalars);
  const int64_t clusters = plan->blocks / cluster;
  plan->workspace_floats = clusters > 1 ? 4 * clusters * pitch : 0;
  return plan->shared_bytes <= d.shared_per_block;
}

// Floats of shared memory of the fused pass: a tile, the column sums so far, per row what the pass needs.
inline int64_t fused_floats(int64_t rows, int64_t local, int64_t threads, int64_t segments) {
  return rows * local + larger(local, 4 * threads) + round_up(7 * rows, 4) + scratch_floats(rows, threads, segments);
}

// The most rows of a tile of the fused pass; they keep its threads busy.
inline int64_t most_fused_rows(int64_t local) { return larger(16, 2048 / (local / 4)); }

// Rows of a tile of the fused pass in `bytes` of shared memory; 0: not even one.
inline int64_t fused_rows(int64_t local, int64_t threads, int64_t bytes) {
  for (int64_t rows = most_fused_rows(local); rows > 0; --rows) {
    const int64_t segments = choose_segments(rows, local / 4, threads);
    if (4 * fused_floats(rows, local, threads, segments) <= bytes) return rows;
  }
  return 0;
}

// Plans a tile of the fused pass. Two blocks share a multiprocessor, so that one loads while the other computes. Takes
// the smallest cluster that gives tiles of four rows, or else the one with the most rows.
inline void plan_fused(const SinkhornProblem& p, const DeviceLimits& d, SinkhornPlan* plan) {
  const int64_t half = smaller(d.shared_per_block, d.shared_per_multiprocessor / 2 - kReserved);
  const int64_t most = smaller(kFusedThreads, d.threads_per_block);
  plan->rows_per_block = 0;
  for (int64_t cluster = 1; cluster <= (d.clusters ? kClusterBlocks : 1) && plan->rows_per_block < 4; cluster *= 2) {
    const int64_t local = round_up(ceil_div(p.columns, cluster), 4);
    if (cluster > 1 && (cluster - 1) * local >= p.columns) break;  // a block would be left without columns
    const int64_t threads = choose_threads(most_fused_rows(local), local / 4, most);
    const int64_t rows = smaller(p.rows, fused_rows(local, threads, half));
    if (rows <= plan->rows_per_block) continue;
    plan->rows_per_block = rows;
    plan->cluster = cluster;
    plan->local_columns = local;
    plan->threads = threads;
  }
  plan->fused = plan->rows_per_block > 0;
  if (!plan->fused) return;
  plan->segments = choose_segments(plan->rows_per_block, plan->local_columns / 4, plan->threads);
  plan->shared_bytes = 4 * fused_floats(plan->rows_per_block, plan->local_columns, plan->threads, plan->segments);
  const int64_t clusters =
      smaller(ceil_div(p.rows, plan->rows_per_block), larger(1, 2 * d.multiprocessors / plan->cluster));
  plan->blocks = clusters * plan->cluster;
}

// Floats of shared memory of a row sweep.
inline int64_t sweep_floats(int64_t rows, int64_t threads, int64_t segments) {
  return round_up(8 * rows, 4) + scratch_floats(rows, threads, segments);
}

// Quads that one block of the column sweep covers: those of a warp, if there are so many.
PROTO_REG_BOTH inline int64_t sweep_quads(int64_t quads) { return smaller(quads, 32); }

// Plans the narrow pass: a row lies over as few lanes as hold it in one, two or four quads each, or a block, or a
// cluster.
inline void plan_narrow(const SinkhornProblem& p, const DeviceLimits& d, SinkhornPlan* plan) {
  const int64_t quads = plan->stride / 4, most = smaller(kNarrowThreads, d.threads_per_block);
  plan->narrow_blocks = 0;
  plan->narrow_cluster = 1;
  while (plan->narrow_cluster < (d.clusters ? kClusterBlocks : 1) && quads > 4 * most * plan->narrow_cluster) {
    plan->narrow_cluster *= 2;
  }
  plan->narrow_quads = ceil_div(quads, plan->narrow_cluster);
  if (plan->narrow_quads > 4 * most || (plan->narrow_cluster - 1) * plan->narrow_quads >= quads) return;
  const bool in_a_warp = plan->narrow_quads <= 4 * 32;
  plan->narrow_own = ceil_div(plan->narrow_quads, in_a_warp ? 32 : most);
  if (plan->narrow_own == 3) plan->narrow_own = 4;
  if (in_a_warp) {
    for (plan->narrow_lanes = 1; plan->narrow_lanes * plan->narrow_own < plan->narrow_quads;) plan->narrow_lanes *= 2;
    plan->narrow_threads = smaller(256, most);
  } else {
    plan->narrow_threads = plan->narrow_lanes = round_up(ceil_div(plan->narrow_quads, plan->narrow_own), 32);
  }
  plan->narrow_rows = plan->narrow_own == 1 ? 4 : 2;
  const int64_t rows_at_once = plan->narrow_rows * (plan->narrow_threads / plan->narrow_lanes);
  const int64_t together = d.multiprocessors * larger(1, 1024 / plan->narrow_threads) / plan->narrow_cluster;
  plan->narrow_blocks = smaller(ceil_div(p.rows, rows_at_once), larger(1, together)) * plan->narrow_cluster;
}

// Floats of shared memory of a narrow pass: sums over rows, or over columns at its end.
inline int64_t narrow_floats(const SinkhornPlan& plan) {
  const int64_t sums = (2 * 32 + 2 + 2) * kNarrowValues;
  return plan.narrow_threads > plan.narrow_lanes ? larger(sums, 4 * plan.narrow_own * plan.narrow_lanes) : sums;
}

inline void plan_streamed(const SinkhornProblem& p, const DeviceLimits& d, bool fuse, SinkhornPlan* plan) {
  plan->regime = Regime::streamed;
  plan->cluster = 1;
  plan->segments = 1;
  plan->blocks = plan->shared_bytes = plan->rows_per_block = plan->local_columns = 0;
  plan->fused = false;
  plan->sweep_threads = plan->threads = smaller(kSweepThreads, d.threads_per_block);
  const int64_t quads = plan->stride / 4;
  if (fuse) plan_fused(p, d, plan);

  const int64_t tiles = ceil_div(quads, sweep_quads(quads));
  plan->slabs = smaller(ceil_div(p.rows, 32), larger(1, 8 * d.multiprocessors / tiles));
  const int64_t warps = plan->sweep_threads / 32, per_warp = larger(1, 32 / larger(quads, 1));
  plan->sweep_rows = smaller(p.rows, quads >= 512 ? larger(1, 8192 / quads) : 4 * warps * per_warp);
  plan->sweep_segments = choose_segments(plan->sweep_rows, quads, plan->sweep_threads);
  plan->sweep_blocks = smaller(ceil_div(p.rows, plan->sweep_rows), 8 * d.multiprocessors);
  plan_narrow(p, d, plan);
  const int64_t rows_of_partials = larger(2 * plan->slabs, larger(plan->blocks / plan->cluster,
                                                                  plan->narrow_blocks / plan->narrow_cluster));
  plan->workspace_floats = 4 * plan->stride + kStateFloats + round_up(3 * p.rows, 4) + rows_of_partials * plan->stride +
                           round_up(larger(plan->sweep_blocks, plan->narrow_blocks), 4);
}

// Plans registers. If groups fill the device, takes as few blocks as hold one. Else takes the first that there is: one
// block or a cluster with one row to a thread, a cluster of 8 with two, a small grid of clusters.
inline bool choose_registers(const SinkhornProblem& p, const DeviceLimits& d, bool many, SinkhornPlan* plan) {
  const SinkhornPlan before = *plan;
  const int64_t most = d.clusters && p.rows > 1 ? kClusterBlocks : 1;
  for (int64_t size = 1; size <= most; size *= 2) {
    if (!plan_registers(p, d, size, size, plan)) continue;
    if (many || plan->rows_per_thread == 1 || (size == most && plan->rows_per_thread == 2)) return true;
  }
  const bool grid = most == kClusterBlocks && d.cooperative && p.groups == 1;
  for (int64_t rows = 1; grid && rows <= 4; rows *= 2) {
    for (int64_t clusters = 2; clusters <= d.grid_clusters; ++clusters) {
      if (plan_registers(p, d, clusters * most, most, plan) && plan->rows_per_thread == rows) return true;
    }
  }
  if (plan_registers(p, d, most, most, plan)) return true;
  *plan = before;
  return false;
}

// With more elements, one block is slower than several that exchange sums.
constexpr int64_t kBlockElements = 16384, kBlockElementsWithoutClusters = 32768, kClusterShare = 8192;

// The plan for a problem. `allow` forbids all regimes before it, for tests and for a launch that the device refused.
inline SinkhornPlan plan_sinkhorn(const SinkhornProblem& p, const DeviceLimits& d, Regime allow = Regime::block) {
  SinkhornPlan plan{};
  plan.stride = round_up(p.columns, 4);
  const int64_t elements = p.rows * plan.stride;
  plan.cluster = plan.segments = 1;
  const bool many = 2 * p.groups >= d.multiprocessors;  // groups fill the device, so no block should wait
  if (allow <= Regime::registers && choose_registers(p, d, many, &plan)) return plan;
  const int64_t one_block = many ? INT64_MAX : d.clusters ? kBlockElements : kBlockElementsWithoutClusters;
  if (allow <= Regime::block && elements <= one_block && plan_resident(p, d, Regime::block, 1, &plan)) return plan;
  if (allow <= Regime::cluster && d.clusters && p.rows > 1) {
    int64_t size = 2;
    while (size < kClusterBlocks && (size * kClusterShare < elements)) size *= 2;
    for (; size <= kClusterBlocks; size *= 2) {
      if (plan_resident(p, d, Regime::cluster, size, &plan)) return plan;
    }
  }
  if (allow <= Regime::grid && d.cooperative && p.rows > 1) {
    if (plan_resident(p, d, Regime::grid, smaller(p.rows, d.multiprocessors), &plan)) return plan;
  }
  if (allow <= Regime::block && plan_resident(p, d, Regime::block, 1, &plan)) return plan;
  plan_streamed(p, d, true, &plan);
  return plan;
}

}  // namespace proto_reg
