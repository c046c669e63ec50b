// The form of Sinkhorn for many small matrices: a vector holds the same entry of as many matrices as it has lanes.
// Threads share the blocks of matrices. solve_sinkhorn in sinkhorn_cpu_solver.h runs it.
#pragma once

#include "sinkhorn_cpu_scaling.h"

namespace proto_reg { namespace {

// Lane l of x[j] and lane j of x[l] change places.
template <int64_t DISTANCE, class V, size_t LANES>
INLINE void transpose(V (&x)[LANES]) {
  const IntsOf<V> upper = (lane_numbers<V>() & (int32_t)DISTANCE) != 0;
#pragma GCC unroll 16
  for (size_t i = 0; i < LANES; ++i) {
    if (i & DISTANCE) continue;
    const V a = x[i], b = x[i + DISTANCE];
    x[i] = upper ? swapped(b, DISTANCE) : a;
    x[i + DISTANCE] = upper ? b : swapped(a, DISTANCE);
  }
  if constexpr (DISTANCE > 1) transpose<DISTANCE / 2>(x);
}

// Arrays of one entry of each matrix, in memory: entry j is the vector at j * LANES.
template <class S>
struct LanesSinkhorn {
  using V = typename S::V;
  using I = IntsOf<V>;
  static constexpr int64_t LANES = S::LANES, STRIP = 8, MOST_COUNT = 256, MOST_COLUMNS = 64;

  const SinkhornProblem& problem;
  const int64_t rows = problem.rows, columns = problem.columns, count = rows * columns;
  const Split<S> split{problem.epsilon};
  // With neither weights nor marginals an iteration changes a scaling factor by at most `rows` or `columns`.
  const int64_t period = problem.weights || problem.marginals
                             ? 1 : std::max<int64_t>(1, static_cast<int64_t>(48 / std::log2(count)));

  // Larger matrices are faster one by one: their rows fill vectors.
  static bool takes(const SinkhornProblem& problem) {
    return problem.groups >= LANES / 2 && problem.columns > 1 && problem.columns <= MOST_COLUMNS &&
           problem.rows * problem.columns <= MOST_COUNT && !problem.loss;
  }
  static int64_t blocks(const SinkhornProblem& problem) { return (problem.groups + LANES - 1) / LANES; }

  // The arrays of one block.
  struct Block {
    int64_t first, present;  // groups
    float *e, *u, *v, *shifts, *weights, *shares;
    V total;
    I bad{};   // lanes whose matrix needs another form
    I done{};  // lanes that are within tol
    I steps{};  // iterations of each lane after the first
  };

  // Solves the matrices of a block. Calls other(group) for each that needs another form.
  template <class Other>
  void solve(int64_t index, const Other& other) const {
    const int64_t first = index * LANES, present = std::min(LANES, problem.groups - first);
    const int64_t vectors = count + 2 * rows + 3 * columns;
    const bool wide = problem.dtype == Dtype::f32;
    const uint16_t* half_scores = static_cast<const uint16_t*>(problem.scores) + first * count;
    float *memory = thread_scratch(vectors * LANES + (wide ? 0 : count * LANES)), *halves = memory + vectors * LANES;
    float* at = memory;
    const auto take = [&](int64_t size) { return std::exchange(at, at + size * LANES); };
    Block block{first, present, take(count), take(rows), take(columns), take(columns), take(rows), take(columns), V{}};
    if (!wide) widen<V>(problem.dtype, half_scores, present * count, halves);
    gather(wide ? static_cast<const float*>(problem.scores) + first * count : halves, count, count, present, block.e);
    read_targets(block);
    exponentials(block);
    for (int64_t iteration = 1; iteration < problem.num_iters; ++iteration) {
      balance(block);
      if (iteration % period == 0) check(block);
      if (problem.tol >= 0 && all(block.done | block.bad)) break;
    }
    check(block);
    finish_codes(block);
    float* codes = wide ? static_cast<float*>(problem.codes) + first * count : halves;
    scatter(block.e, count, present, codes);
    if (!wide) narrow<V>(problem.dtype, codes, present * count, static_cast<uint16_t*>(problem.codes) + first * count);
    if (problem.potentials) write_potentials(block);
    if (problem.iterations)
      for (int64_t lane = 0; lane < present; ++lane) problem.iterations[first + lane] = 1 + block.steps[lane];
    const I bad = block.bad;
    for (int64_t lane = 0; lane < present; ++lane)
      if (bad[lane]) other(first + lane);
  }

 protected:
  static INLINE bool all(I x) {
    bool every = true;
    for (int64_t lane = 0; lane < LANES; ++lane) every &= x[lane] != 0;
    return every;
  }

  // Reads `size` entries of each matrix at from + lane * apart. Lanes beyond the `present` ones repeat the last.
  static INLINE void gather(const float* from, int64_t apart, int64_t size, int64_t present, float* to) {
    const auto matrix = [&](int64_t lane) { return from + std::min(lane, present - 1) * apart; };
    if (size < LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane)
        for (int64_t j = 0; j < size; ++j) to[j * LANES + lane] = matrix(lane)[j];
      return;
    }
    for (int64_t next = 0; next < size; next += LANES) {
      const int64_t j = std::min(next, size - LANES);
      V x[LANES];
      for (int64_t lane = 0; lane < LANES; ++lane) x[lane] = load<V>(matrix(lane) + j);
      transpose<LANES / 2>(x);
      for (int64_t k = 0; k < LANES; ++k) store(to + (j + k) * LANES, x[k]);
    }
  }

  static INLINE void scatter(const float* from, int64_t size, int64_t present, float* to) {
    if (size < LANES) {
      for (int64_t lane = 0; lane < present; ++lane)
        for (int64_t j = 0; j < size; ++j) to[lane * size + j] = from[j * LANES + lane];
      return;
    }
    for (int64_t next = 0; next < size; next += LANES) {
      const int64_t j = std::min(next, size - LANES);
      V x[LANES];
      for (int64_t k = 0; k < LANES; ++k) x[k] = load<V>(from + (j + k) * LANES);
      transpose<LANES / 2>(x);
      for (int64_t lane = 0; lane < present; ++lane) store(to + lane * size + j, x[lane]);
    }
  }

  // Weights of the rows and shares of the columns, which sum to 1.
  void read_targets(Block& block) const {
    V total{}, sum{};
    if (problem.weights) gather(problem.weights + block.first * rows, rows, rows, block.present, block.weights);
    else std::fill_n(block.weights, rows * LANES, 1.f);
    for (int64_t i = 0; i < rows; ++i) total += load<V>(block.weights + i * LANES);
    block.total = total;
    block.bad |= !(total > 0);
    const int64_t stride = problem.marginals_stride;
    const float* marginals = problem.marginals;
    if (marginals) gather(marginals + block.first * stride, stride, columns, block.present, block.shares);
    else std::fill_n(block.shares, columns * LANES, 1.f);
    for (int64_t k = 0; k < columns; ++k) sum += load<V>(block.shares + k * LANES);
    for (int64_t k = 0; k < columns; ++k) store(block.shares + k * LANES, load<V>(block.shares + k * LANES) / sum);
  }

  // Turns the scores in block.e into E, and finds the first v.
  void exponentials(Block& block) const {
    column_shifts(block);
    V c[MOST_COLUMNS] = {};
    for (int64_t i = 0; i < rows; ++i) {
      float* row = block.e + i * columns * LANES;
      V top = V{} - DEAD;
      for (int64_t k = 0; k < columns; ++k)
        top = S::maximum(load<V>(row + k * LANES) * split.scale + load<V>(block.shifts + k * LANES), top);
      top = (top + MAGIC) - MAGIC;
      block.bad |= !(top > -MOST_WHOLE);
      const V w = load<V>(block.weights + i * LANES), u = w > 0 ? w * power_or_zero(top) : V{};
      store(block.u + i * LANES, u);
      for (int64_t k = 0; k < columns; ++k) {
        const V x = shifted_exponential(split, load<V>(row + k * LANES), load<V>(block.shifts + k * LANES) - top);
        store(row + k * LANES, x);
        c[k] += x * u;
      }
    }
    for (int64_t k = 0; k < columns; ++k) {
      const V r = load<V>(block.shares + k * LANES);
      const I alive = load<V>(block.shifts + k * LANES) > -DEAD;
      store(block.v + k * LANES, alive ? r / c[k] : V{});
      block.bad |= alive ? !((c[k] > 0x1p-100f) & (c[k] < INFINITY)) : (c[k] != 0);
    }
  }

  // The columns' maxima over the rows that count, rounded to whole units, negative.
  void column_shifts(Block& block) const {
    for (int64_t k = 0; k < columns; ++k) {
      V top = V{} - INFINITY;
      for (int64_t i = 0; i < rows; ++i) {
        const V s = load<V>(block.e + (i * columns + k) * LANES);
        top = S::maximum(load<V>(block.weights + i * LANES) > 0 ? s : V{} - INFINITY, top);
      }
      const I alive = (top > -INFINITY) & (load<V>(block.shares + k * LANES) > 0);
      const V whole = split.whole(top);
      block.bad |= alive & !((whole < MOST_WHOLE) & (whole > -MOST_WHOLE));
      store(block.shifts + k * LANES, alive ? -whole : V{} - DEAD);
    }
  }

  // Calls body(W, at) for strips of W = 8 out of `size`, and for the rest. W is a constant.
  template <int W = STRIP, class Body>
  static INLINE void strips(int64_t size, const Body& body, int64_t at = 0) {
    for (; at + W <= size; at += W) body(std::integral_constant<int, W>{}, at);
    if constexpr (W > 1) strips<W / 2>(size, body, at);
  }

  // sum_j matrix[s * apart + j * step] x[j] for s = 0 .. W - 1.
  template <int W>
  static INLINE void products(const float* matrix, int64_t apart, int64_t step, int64_t size, const float* x,
                              V (&sums)[W]) {
    for (int s = 0; s < W; ++s) sums[s] = V{};
    for (int64_t j = 0; j < size; ++j, matrix += step * LANES) {
      const V factor = load<V>(x + j * LANES);
#pragma GCC unroll 8
      for (int s = 0; s < W; ++s) sums[s] += load<V>(matrix + s * apart * LANES) * factor;
    }
  }

  // u = w / (E v), or 1 / (E v) for the codes.
  template <bool WEIGHTED>
  void scale_rows(const Block& block) const {
    strips(rows, [&](auto width, int64_t i) ALWAYS_INLINE {
      V d[width()];
      products<width()>(block.e + i * columns * LANES, columns, 1, columns, block.v, d);
      for (int s = 0; s < width(); ++s)
        store(block.u + (i + s) * LANES, (WEIGHTED ? load<V>(block.weights + (i + s) * LANES) : V{} + 1) / d[s]);
    });
  }

  // One iteration. Lanes that are within tol keep their v.
  void balance(Block& block) const {
    if (problem.weights) scale_rows<true>(block);
    else scale_rows<false>(block);
    const V total = block.total;
    V next[MOST_COLUMNS], worst{}, present{};
    strips(columns, [&](auto width, int64_t k) ALWAYS_INLINE {
      V c[width()];
      products<width()>(block.e + k * LANES, 1, columns, rows, block.u, c);
      for (int s = 0; s < width(); ++s) {
        const V target = total * load<V>(block.shares + (k + s) * LANES);
        next[k + s] = c[s] > 0 ? target / c[s] : V{};
      }
    });
    if (problem.tol >= 0) {
      for (int64_t k = 0; k < columns; ++k) present += next[k] > 0 ? load<V>(block.shares + k * LANES) : V{};
      for (int64_t k = 0; k < columns; ++k) {
        const V ratio = load<V>(block.v + k * LANES) / next[k] * present - 1;
        worst = S::maximum(next[k] > 0 ? (ratio < 0 ? -ratio : ratio) : V{}, worst);
      }
      block.done |= worst <= static_cast<float>(problem.tol);
    }
    block.steps += block.done + 1;  // done is -1
    for (int64_t k = 0; k < columns; ++k)
      store(block.v + k * LANES, block.done ? load<V>(block.v + k * LANES) : next[k]);
  }

  // Marks the lanes whose v spans too much for E.
  void check(Block& block) const {
    V low = V{} + INFINITY, high{};
    for (int64_t k = 0; k < columns; ++k) {
      const V v = load<V>(block.v + k * LANES);
      low = S::minimum(v > 0 ? v : low, low);
      high = S::maximum(v, high);
    }
    block.bad |= !((high < low * MOST_SPAN) & (high < INFINITY));
  }

  void finish_codes(const Block& block) const {
    scale_rows<false>(block);
    for (int64_t i = 0; i < rows; ++i) {
      const V u = load<V>(block.u + i * LANES);
      float* row = block.e + i * columns * LANES;
      for (int64_t k = 0; k < columns; ++k, row += LANES) store(row, load<V>(row) * load<V>(block.v + k * LANES) * u);
    }
  }

  void write_potentials(const Block& block) const {
    for (int64_t k = 0; k < columns; ++k) {
      const V v = load<V>(block.v + k * LANES), whole = load<V>(block.shifts + k * LANES);
      const V g = v > 0 ? logarithm(v) + whole * 0.6931471805599453f : V{} - INFINITY;
      for (int64_t lane = 0; lane < block.present; ++lane)
        problem.potentials[(block.first + lane) * columns + k] = g[lane];
    }
  }
};

}}  // namespace proto_reg
