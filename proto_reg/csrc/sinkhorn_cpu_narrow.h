// The narrow form of Sinkhorn, for rows shorter than a vector: eight rows stand side by side, one in each lane.
// Otherwise it computes as the linear form does. SinkhornGroupSolver in sinkhorn_cpu_solver.h runs it.
#pragma once

#include "sinkhorn_cpu_scaling.h"

namespace proto_reg { namespace {

template <class S>
struct NarrowSinkhorn : ChunkedScaling<S> {  // e: (chunks, blocks of eight rows, columns, 8)
  using V = typename S::V;
  using Base = ChunkedScaling<S>;
  using Base::group, Base::chunks, Base::e, Base::v, Base::partial, Base::extrema, Base::losses, Base::exponential;
  static constexpr int64_t LANES = S::LANES, MOST_COLUMNS = LANES - 1;

  // Eight rows of scores from row `first` on: x[k] is column k. Lanes beyond the last row repeat it.
  struct Block {
    int64_t first, present;
    float scores[MOST_COLUMNS * LANES];
    V x[MOST_COLUMNS], weight{};
  };

  static int64_t chunk_floats(const Chunks& chunks, int64_t columns) { return (chunks.size + 7) / 8 * 8 * columns; }

  // Calls body(block, its part of E) for every eight rows of a chunk.
  template <class Body>
  INLINE void each_block(int64_t chunk, const Body& body) const {
    float* at = e + chunk * chunk_floats(chunks, group.columns);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); i += LANES, at += LANES * group.columns) {
      Block block{i, std::min(LANES, chunks.end(chunk) - i), {}, {}};
      for (int64_t lane = 0; lane < block.present; ++lane) block.weight[lane] = group.weight(i + lane);
      body(block, at);
    }
  }

  INLINE void read(Block& block) const {
    const float* s = block.scores;
    if (group.dtype == Dtype::f32) s = group.row(block.first, nullptr);
    else widen<V>(group.dtype, static_cast<const uint16_t*>(group.scores) + block.first * group.columns,
               block.present * group.columns, block.scores);
    for (int64_t k = 0; k < group.columns; ++k)
      for (int64_t lane = 0; lane < LANES; ++lane)
        block.x[k][lane] = s[std::min(lane, block.present - 1) * group.columns + k];
  }

  INLINE void write_rows(const Block& block, const V* values, void* matrix) const {
    float buffer[MOST_COLUMNS * LANES];
    float* rows = group.output(matrix, block.first, buffer);
    for (int64_t lane = 0; lane < block.present; ++lane)
      for (int64_t k = 0; k < group.columns; ++k) rows[lane * group.columns + k] = values[k][lane];
    if (group.dtype != Dtype::f32)
      narrow<V>(group.dtype, rows, block.present * group.columns,
             static_cast<uint16_t*>(matrix) + block.first * group.columns);
  }

  void exponentials(int64_t chunk) const {
    const Exponential<S> exp = exponential;
    V c[MOST_COLUMNS] = {}, low = V{} + INFINITY, high = V{} - INFINITY;
    each_block(chunk, [&](Block& block, float* at) ALWAYS_INLINE {
      read(block);
      for (int64_t k = 0; k < group.columns; ++k) {
        low = S::minimum(low, block.x[k]);
        high = S::maximum(high, block.x[k]);
        const V x = exp(block.x[k]);
        store(at + LANES * k, x);
        c[k] += x * block.weight;
      }
    });
    extrema[chunk] = {S::minimum(low), S::maximum(high)};
    finish_sums(chunk, c);
  }

  void finish_sums(int64_t chunk, const V* c) const {
    for (int64_t k = 0; k < chunks.padded; ++k) partial[chunk * chunks.padded + k] = k < group.columns ? sum(c[k]) : 0;
  }

  // 1 / (E v) of eight rows.
  INLINE V row_scales(const float* at) const {
    V d{};
    for (int64_t k = 0; k < group.columns; ++k) d += load<V>(at + LANES * k) * v[k];
    return 1 / d;
  }

  void balance(int64_t chunk) const {
    V c[MOST_COLUMNS] = {};
    each_block(chunk, [&](Block& block, float* at) ALWAYS_INLINE {
      const V u = block.weight * row_scales(at);
      for (int64_t k = 0; k < group.columns; ++k) c[k] += u * load<V>(at + LANES * k);
    });
    finish_sums(chunk, c);
  }

  void write(int64_t chunk) const {
    losses[chunk] = 0;
    each_block(chunk, [&](Block& block, float* at) ALWAYS_INLINE {
      const V u = row_scales(at);
      V q[MOST_COLUMNS];
      for (int64_t k = 0; k < group.columns; ++k) q[k] = load<V>(at + LANES * k) * v[k] * u;
      if (group.codes) write_rows(block, q, group.codes);
      if (group.gradient) losses[chunk] += cross_entropy(block, q);
    });
  }

  // Writes the gradients of eight rows and returns the sum of their weighted losses.
  INLINE double cross_entropy(Block& block, const V* q) const {
    const float scale = static_cast<float>(M_LOG2E / group.temperature);
    read(block);
    V top = block.x[0], z{}, product{}, p[MOST_COLUMNS];
    for (int64_t k = 1; k < group.columns; ++k) top = S::maximum(top, block.x[k]);
    for (int64_t k = 0; k < group.columns; ++k) {
      const V x = block.x[k] - top;
      p[k] = exp2_in_range(S::maximum(x * scale, V{} - 126.f));
      z += p[k];
      product += q[k] * x;
    }
    const V w = block.weight * static_cast<float>(group.gradient_scale);
    for (int64_t k = 0; k < group.columns; ++k) p[k] = (p[k] / z - q[k]) * w;
    write_rows(block, p, group.gradient);
    return sum(block.weight * (logarithm(z) - product / static_cast<float>(group.temperature)));
  }
};

}}  // namespace proto_reg
