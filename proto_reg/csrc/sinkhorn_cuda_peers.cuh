// How blocks that share a problem add up their columns: each publishes a row of partial sums, all wait, and the owner
// of a column adds its sums in the order of the blocks. Without atomics results repeat bit by bit. All kernels include
// it.
#pragma once

#include "sinkhorn_cuda_device.cuh"
#include "sinkhorn_cuda_plan.h"

namespace proto_reg {

// Clusters need compute capability 9.0. Code for less would end the launch with an error; nobody launches it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
PROTO_REG_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
PROTO_REG_DEVICE int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
PROTO_REG_DEVICE const float* cluster_shared(float* mine, int rank) {  // of block `rank`: what lies there at `mine`
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
PROTO_REG_DEVICE void cluster_sync() { __trap(); }
PROTO_REG_DEVICE int cluster_rank() { return __trap(), 0; }
PROTO_REG_DEVICE const float* cluster_shared(float* mine, int) { return mine; }
#endif

template <Regime kRegime>
struct Peers {
  int rank, count;
  int columns;
  float* mine;            // partial sums of this block; in a cluster the first of two buffers
  int turn = 0;           // which of two buffers; in a cluster the other may still be read

  PROTO_REG_DEVICE Peers(const SinkhornPlan& plan, float* partials) {
    columns = static_cast<int>(plan.stride);
    count = kRegime == Regime::block ? 1 : static_cast<int>(plan.blocks);
    rank = kRegime == Regime::grid ? blockIdx.x : kRegime == Regime::cluster ? cluster_rank() : 0;
    mine = partials + (kRegime == Regime::grid ? static_cast<int64_t>(rank) * pitch() : 0);
  }

  PROTO_REG_DEVICE int pitch() const { return 2 * columns + kScalars; }  // from one block's partial sums to the next's

  // The columns that this block adds up: a slice in a grid, or else all of them.
  PROTO_REG_DEVICE int slice() const { return kRegime == Regime::grid ? (columns + count - 1) / count : columns; }
  PROTO_REG_DEVICE int first() const { return kRegime == Regime::grid ? min(columns, rank * slice()) : 0; }
  PROTO_REG_DEVICE int last() const { return min(columns, first() + slice()); }

  PROTO_REG_DEVICE float* buffer() { return kRegime == Regime::cluster && turn ? mine + pitch() : mine; }
  PROTO_REG_DEVICE float* scalars() { return buffer() + pitch() - kScalars; }

  PROTO_REG_DEVICE float at(int peer, int index) {
    if (kRegime == Regime::cluster) return cluster_shared(buffer(), peer)[index];
    if (kRegime == Regime::grid) return __ldcg(mine + static_cast<int64_t>(peer - rank) * pitch() + index);
    return mine[index];
  }

  // Waits until the partial sums of all blocks can be read.
  PROTO_REG_DEVICE void publish() {
    if (kRegime == Regime::cluster) {
      cluster_sync();
    } else {
      agree();
    }
  }

  // Waits until all owners have written their results.
  PROTO_REG_DEVICE void agree() {
    if (kRegime == Regime::grid) {
      cooperative_groups::this_grid().sync();
    } else {
      __syncthreads();
    }
  }

  // The sum of one of the blocks' scalars, for every thread.
  PROTO_REG_DEVICE float sum_scalar(int which, float* scratch) {
    float sum = 0.0f;
    for (int peer = threadIdx.x; peer < count; peer += blockDim.x) sum += at(peer, pitch() - kScalars + which);
    return sum_block(sum, scratch);
  }

  // Calls finish(k, values) for every column that this block owns, with N rows of partial sums combined over the
  // blocks. If there are more threads than columns, several share one. `scratch`: N floats for each thread.
  template <int N, class Combine, class Finish>
  PROTO_REG_DEVICE void gather(float* scratch, const Values<N>& start, Combine combine, Finish finish) {
    const int first = this->first(), last = this->last();
    const int width = max(1, min(last - first, static_cast<int>(blockDim.x)));
    const int lanes = min(count, static_cast<int>(blockDim.x) / width);
    const int lane = threadIdx.x / width;
    for (int base = first; base < last; base += width) {
      const int k = base + threadIdx.x % width;
      const bool active = lane < lanes && k < last;
      Values<N> sum = start;
      for (int peer = lane; active && peer < count; peer += lanes) {
        Values<N> part;
        unroll<N>([&](int j) { part.at[j] = at(peer, j * columns + k); });
        sum = combine(sum, part);
      }
      if (lanes > 1) sum = over_lanes(width, lanes, scratch, sum, combine);
      if (active && lane == 0) finish(k, sum);
    }
    if (kRegime == Regime::cluster) turn ^= 1;
    agree();
  }

 private:
  template <int N, class Combine>
  PROTO_REG_DEVICE Values<N> over_lanes(int width, int lanes, float* scratch, Values<N> sum, Combine combine) {
    float* own = scratch + threadIdx.x * N;
    const int lane = threadIdx.x / width;
    for (int step = 1; step < lanes; step *= 2) {  // a tree
      unroll<N>([&](int j) { own[j] = sum.at[j]; });
      __syncthreads();
      if (lane % (2 * step) == 0 && lane + step < lanes) {
        Values<N> other;
        unroll<N>([&](int j) { other.at[j] = own[step * width * N + j]; });
        sum = combine(sum, other);
      }
      __syncthreads();
    }
    return sum;
  }
};

}  // namespace proto_reg
