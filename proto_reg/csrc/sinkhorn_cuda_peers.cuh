// Blocks that share a problem exchange sums over their rows: each publishes a row of partial sums, all wait, and owners
// add the partial sums of their columns in the order of the blocks. No atomics, so that results repeat bit by bit.
#pragma once

#include "sinkhorn_cuda_device.cuh"
#include "sinkhorn_cuda_plan.h"

namespace proto_reg {

// Clusters and access to each other's shared memory come with compute capability 9.0. Code for less ends the launch
// with an error; the launcher asks for none.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
PROTO_REG_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
PROTO_REG_DEVICE int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
PROTO_REG_DEVICE const float* cluster_shared(float* mine, int rank) {  // what lies at `mine` here, of block `rank`
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
PROTO_REG_DEVICE void cluster_sync() { __trap(); }
PROTO_REG_DEVICE int cluster_rank() {
  __trap();
  return 0;
}
PROTO_REG_DEVICE const float* cluster_shared(float* mine, int) { return mine; }
#endif

template <Regime kRegime>
struct Peers {
  int rank, count;
  int columns;
  float* mine;            // partial sums of this block; in a cluster the first of two buffers
  int turn = 0;           // cluster: a buffer is written again only after all have left the barrier after the next

  PROTO_REG_DEVICE Peers(const SinkhornPlan& plan, float* partials) {
    columns = static_cast<int>(plan.stride);
    count = kRegime == Regime::block ? 1 : static_cast<int>(plan.blocks);
    rank = kRegime == Regime::grid ? blockIdx.x : kRegime == Regime::cluster ? cluster_rank() : 0;
    mine = partials + (kRegime == Regime::grid ? static_cast<int64_t>(rank) * pitch() : 0);
  }

  PROTO_REG_DEVICE int pitch() const { return 2 * columns + kScalars; }  // from one block's partial sums to the next's

  // The columns that this block adds up: in a grid a slice, else all of them, each block for itself.
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

  // All partial sums so far are there to be read.
  PROTO_REG_DEVICE void publish() {
    if (kRegime == Regime::cluster) {
      cluster_sync();
    } else {
      agree();
    }
  }

  // All owners have written what follows from them.
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

  // finish(k, values) for every column of this block's: N rows of partial sums, combined over the blocks, by several
  // threads where there are more threads than columns. `scratch`: N floats for each thread.
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
#pragma unroll
        for (int j = 0; j < N; ++j) part.at[j] = at(peer, j * columns + k);
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
#pragma unroll
    for (int j = 0; j < N; ++j) own[j] = sum.at[j];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) {
      for (int lane = 1; lane < lanes; ++lane) {
        Values<N> other;
#pragma unroll
        for (int j = 0; j < N; ++j) other.at[j] = own[lane * width * N + j];
        sum = combine(sum, other);
      }
    }
    return sum;  // agree() follows
  }
};

}  // namespace proto_reg
