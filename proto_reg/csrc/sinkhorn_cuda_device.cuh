// What every CUDA kernel uses: reading and writing quads of scores, reductions in a fixed order, and how threads lie
// over a tile. The other .cuh files include it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "sinkhorn_problem.h"

namespace proto_reg {

#define PROTO_REG_DEVICE __device__ __forceinline__

// Scores are held in eighths (multiplied by it), so that no difference of two finite shifts and a score overflows.
constexpr float kEighth = 0.125f;

constexpr int kLoads = 4;  // so many quads a thread loads from device memory before it uses the first

PROTO_REG_DEVICE float infinity() { return __int_as_float(0x7f800000); }
PROTO_REG_DEVICE float nan() { return __int_as_float(0x7fc00000); }

// 2^x by the GPU's own instruction. So the CPU's polynomial, which is slower here, is not used.
PROTO_REG_DEVICE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// a / b with an error of an ulp or two. A division would call a slow function.
PROTO_REG_DEVICE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(b));
  return a * y;
#else
  return a * (1.0f / b);
#endif
}

#ifdef __CUDACC__
extern __shared__ float4 dynamic_shared[];
PROTO_REG_DEVICE float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared); }
#else
float* shared_floats();  // the emulation's
#endif

PROTO_REG_DEVICE float to_float(float x) { return x; }
PROTO_REG_DEVICE float to_float(__half x) { return __half2float(x); }
PROTO_REG_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
PROTO_REG_DEVICE void from_float(float x, float* out) { *out = x; }
PROTO_REG_DEVICE void from_float(float x, __half* out) { *out = __float2half_rn(x); }
PROTO_REG_DEVICE void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// body(0), ..., body(N - 1), unrolled, so that arrays which the body indexes can stay in registers.
template <int N, class Body>
PROTO_REG_DEVICE void unroll(Body body) {
#pragma unroll
  for (int i = 0; i < N; ++i) body(i);
}

// Four neighbouring columns of a row. A thread moves them together.
struct alignas(16) Quad {
  float at[4];
};

template <class T>
struct alignas(4 * sizeof(T)) Packed {
  T at[4];
};

PROTO_REG_DEVICE Quad load_quad(const float* from) { return *reinterpret_cast<const Quad*>(from); }
PROTO_REG_DEVICE void store_quad(float* to, const Quad& x) { *reinterpret_cast<Quad*>(to) = x; }

PROTO_REG_DEVICE Quad filled(float value) { return Quad{{value, value, value, value}}; }

// Reads the four columns from `first` on; -inf beyond the last column. `vectors`: rows are whole, aligned quads.
template <class T>
PROTO_REG_DEVICE Quad read_quad(const T* row, int64_t first, int64_t columns, bool vectors) {
  Quad x;
  if (vectors) {
    const Packed<T> packed = *reinterpret_cast<const Packed<T>*>(row + first);
    unroll<4>([&](int j) { x.at[j] = to_float(packed.at[j]); });
  } else {
    unroll<4>([&](int j) { x.at[j] = first + j < columns ? to_float(row[first + j]) : -infinity(); });
  }
  return x;
}

// The same in eighths.
template <class T>
PROTO_REG_DEVICE Quad read_scores(const T* row, int64_t first, int64_t columns, bool vectors) {
  Quad x = read_quad(row, first, columns, vectors);
  unroll<4>([&](int j) { x.at[j] *= kEighth; });
  return x;
}

template <class T>
PROTO_REG_DEVICE void write_quad(T* row, int64_t first, int64_t columns, bool vectors, const Quad& x) {
  if (vectors) {
    Packed<T> packed;
    unroll<4>([&](int j) { from_float(x.at[j], &packed.at[j]); });
    *reinterpret_cast<Packed<T>*>(row + first) = packed;
  } else {
    unroll<4>([&](int j) { if (first + j < columns) from_float(x.at[j], &row[first + j]); });
  }
}

// Values that are reduced together, and the ways to reduce two of them.
template <int N>
struct Values {
  float at[N];
};

struct Add {
  template <int N>
  PROTO_REG_DEVICE Values<N> operator()(Values<N> a, const Values<N>& b) const {
    unroll<N>([&](int j) { a.at[j] += b.at[j]; });
    return a;
  }
};

struct Max {
  template <int N>
  PROTO_REG_DEVICE Values<N> operator()(Values<N> a, const Values<N>& b) const {
    unroll<N>([&](int j) { a.at[j] = fmaxf(a.at[j], b.at[j]); });
    return a;
  }
};

// (m, z) means z exp2(scale m): a sum of exponentials relative to their maximum m.
struct MergeExponentials {
  float scale;
  PROTO_REG_DEVICE Values<2> operator()(const Values<2>& a, const Values<2>& b) const {
    const float top = fmaxf(a.at[0], b.at[0]);
    if (top == -infinity()) return {{top, a.at[1] + b.at[1]}};
    return {{top, a.at[1] * exp2_fast((a.at[0] - top) * scale) + b.at[1] * exp2_fast((b.at[0] - top) * scale)}};
  }
};

// Reduces over each `stride`-th of `lanes` neighbouring lanes (powers of two up to a warp). Every lane gets the result.
// Whole warps call this.
template <int N, class Combine>
PROTO_REG_DEVICE Values<N> reduce_lanes(Values<N> x, int lanes, Combine combine, int stride = 1) {
  for (int step = lanes / 2; step >= stride; step /= 2) {
    Values<N> other;
    unroll<N>([&](int j) { other.at[j] = __shfl_xor_sync(0xffffffffu, x.at[j], step); });
    x = combine(x, other);
  }
  return x;
}

// The block's sum, for every thread. `scratch`: 32 floats. All threads are in step afterwards.
PROTO_REG_DEVICE float sum_block(float value, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = reduce_lanes<1>({{value}}, 32, Add()).at[0];
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < warps ? scratch[lane] : 0.0f;
  __syncthreads();
  return reduce_lanes<1>({{value}}, 32, Add()).at[0];
}

// How a block's threads lie over its tile of rows x quads. By columns, a thread owns quads and goes through the rows of
// its group. By rows, a team of lanes goes through the quads of a row, or of one of its segments.
struct Layout {
  int rows, quads;
  int quad, group, groups;  // by columns
  int lanes, segments;      // by rows
};

PROTO_REG_DEVICE Layout make_layout(int rows, int quads, int segments, int most_rows) {
  Layout l{rows, quads, 0, 0, 1, 32, segments};
  const int tid = threadIdx.x, threads = blockDim.x;
  l.quad = tid;
  if (2 * quads <= threads) {
    l.groups = min(most_rows, threads / quads);
    l.group = tid / quads;
    l.quad = l.group < l.groups ? tid % quads : quads;  // threads left over own nothing
  }
  while (l.lanes / 2 >= quads) l.lanes /= 2;
  return l;
}

// By rows: calls visit(row, quad) for every quad, with the lanes of a team side by side.
template <class Visit>
PROTO_REG_DEVICE void for_rows(const Layout& l, Visit visit) {
  const int lane = threadIdx.x % l.lanes, team = threadIdx.x / l.lanes, teams = blockDim.x / l.lanes;
  const int width = (l.quads + l.segments - 1) / l.segments;
  for (int task = team; task < l.rows * l.segments; task += teams) {
    const int row = task / l.segments, segment = task - row * l.segments;
    const int end = min(l.quads, (segment + 1) * width);
#pragma unroll 2
    for (int quad = segment * width + lane; quad < end; quad += l.lanes) visit(row, quad);
  }
}

// By rows: term(row, quad, &values) adds a quad, and one thread calls finish(row, values) for each row. `scratch`: N
// floats for each row and segment. All threads are in step afterwards.
template <int N, class Term, class Combine, class Finish>
PROTO_REG_DEVICE void reduce_rows(const Layout& l, Values<N> start, float* scratch, Combine combine, Term term,
                                  Finish finish) {
  const int lane = threadIdx.x % l.lanes, team = threadIdx.x / l.lanes, teams = blockDim.x / l.lanes;
  const int tasks = l.rows * l.segments, width = (l.quads + l.segments - 1) / l.segments;
  for (int first = 0; first < tasks; first += teams) {  // every lane of a warp takes part in its shuffles
    const int task = first + team, row = task / l.segments, segment = task - row * l.segments;
    Values<N> sum = start;
    if (task < tasks) {
      const int end = min(l.quads, (segment + 1) * width);
#pragma unroll 2
      for (int quad = segment * width + lane; quad < end; quad += l.lanes) term(row, quad, &sum);
    }
    sum = reduce_lanes<N>(sum, l.lanes, combine);
    if (lane != 0 || task >= tasks) continue;
    if (l.segments == 1) {
      finish(row, sum);
    } else {
      unroll<N>([&](int j) { scratch[task * N + j] = sum.at[j]; });
    }
  }
  __syncthreads();
  if (l.segments == 1) return;
  for (int row = threadIdx.x; row < l.rows; row += blockDim.x) {
    Values<N> sum = start;
    for (int segment = 0; segment < l.segments; ++segment) {
      Values<N> part;
      unroll<N>([&](int j) { part.at[j] = scratch[(row * l.segments + segment) * N + j]; });
      sum = combine(sum, part);
    }
    finish(row, sum);
  }
  __syncthreads();
}

// Reduces the groups' values of every column to `out` (shared or device memory), in two steps, in the order of the
// groups. `scratch`: 4 floats for each thread. Every thread calls this, and all are in step afterwards.
template <bool kMaximum>
PROTO_REG_DEVICE void reduce_groups(const Layout& l, const Quad& mine, float* scratch, float* out) {
  int leaders = 1;
  while (leaders * leaders < l.groups) ++leaders;
  const bool active = l.quad < l.quads;
  if (active) store_quad(scratch + 4 * threadIdx.x, mine);
  for (int step = leaders, end = l.groups;; step = 1, end = leaders) {  // all to the leaders, the leaders to one
    __syncthreads();
    if (active && l.group < step) {
      Quad sum = load_quad(scratch + 4 * threadIdx.x);
      for (int group = l.group + step; group < end; group += step) {
        const Quad other = load_quad(scratch + 4 * (group * l.quads + l.quad));
        unroll<4>([&](int j) { sum.at[j] = kMaximum ? fmaxf(sum.at[j], other.at[j]) : sum.at[j] + other.at[j]; });
      }
      store_quad(step == 1 ? out + 4 * l.quad : scratch + 4 * threadIdx.x, sum);
    }
    if (step == 1) break;
  }
  __syncthreads();
}

// By columns: out[k] is the sum, or the maximum, of term(row, quad) over the tile's rows. Threads are in step
// afterwards.
template <bool kMaximum, class Term>
PROTO_REG_DEVICE void reduce_columns(const Layout& l, float* scratch, float* out, Term term) {
  auto over_rows = [&](int quad) {
    Quad sum = filled(kMaximum ? -infinity() : 0.0f);
#pragma unroll 4
    for (int row = l.group; row < l.rows; row += l.groups) {
      const Quad x = term(row, quad);
      unroll<4>([&](int j) { sum.at[j] = kMaximum ? fmaxf(sum.at[j], x.at[j]) : sum.at[j] + x.at[j]; });
    }
    return sum;
  };
  if (l.groups == 1) {
    for (int quad = l.quad; quad < l.quads; quad += blockDim.x) store_quad(out + 4 * quad, over_rows(quad));
    __syncthreads();
  } else {
    reduce_groups<kMaximum>(l, l.quad < l.quads ? over_rows(l.quad) : filled(0), scratch, out);
  }
}

}  // namespace proto_reg
