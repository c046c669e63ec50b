// Gradients through the iterations of many small matrices, in the form of sinkhorn_cpu_lanes.h. A block runs its
// iterations again, keeps the scaling vectors of each, and goes through them backwards. reverse_sinkhorn in
// sinkhorn_cpu_reverse.h runs it.
#pragma once

#include "sinkhorn_cpu_lanes.h"

namespace proto_reg { namespace {

template <class S>
struct LanesReverse : LanesSinkhorn<S> {
  using Base = LanesSinkhorn<S>;
  using typename Base::V, typename Base::I, typename Base::Block;
  using Base::problem, Base::rows, Base::columns, Base::count, Base::period, Base::LANES;
  static constexpr int64_t MOST_VECTORS = 1 << 16;  // that a block takes

  const SinkhornGradient& gradient;

  static int64_t vectors(const SinkhornProblem& problem) {
    const int64_t rows = problem.rows, columns = problem.columns;
    return 3 * rows * columns + 3 * rows + 7 * columns + problem.num_iters * (rows + columns);
  }
  static bool takes(const SinkhornProblem& problem) {  // with a tol lanes would end at different iterations
    return Base::takes(problem) && problem.tol < 0 && problem.num_iters < MOST_VECTORS &&
           vectors(problem) <= MOST_VECTORS;
  }

  // What a block needs besides: v and u of each iteration, the gradients by scores and g, the coefficients of E that
  // by_scores lacks, and the sums of the gradients by marginals and weights.
  struct Reverse {
    float *v, *u, *by_scores, *by_g, *coefficients, *by_marginals, *by_weights, *inverse_targets, *y;
  };

  // Goes through the matrices of a block. Calls other(group) for each that needs another form.
  template <class Other>
  void solve(int64_t index, const Other& other) const {
    const int64_t first = index * LANES, present = std::min(LANES, problem.groups - first), n = problem.num_iters;
    float* at = thread_scratch(vectors(problem) * LANES);
    const auto take = [&](int64_t size) { return std::exchange(at, at + size * LANES); };
    Block block{first, present, take(count), take(rows), take(columns), take(columns), take(rows), take(columns), V{}};
    Reverse back{take(n * columns), take(n * rows), take(count), take(columns), take(count), take(columns), take(rows),
                 take(columns), take(columns)};
    std::fill(back.by_g, back.inverse_targets, 0.f);
    if (gradient.by_potentials)
      Base::gather(gradient.by_potentials + first * columns, columns, columns, present, back.by_g);
    Base::gather(static_cast<const float*>(problem.scores) + first * count, count, count, present, block.e);
    Base::gather(gradient.by_codes + first * count, count, count, present, back.by_scores);
    Base::read_targets(block);
    Base::exponentials(block);
    iterate(block, back);
    through_codes(block, back);
    through_iterations(block, back);
    finish(block, back);
    for (int64_t lane = 0; lane < present; ++lane)
      if (const I bad = block.bad; bad[lane]) other(first + lane);
  }

 private:
  // The iterations, as in Base::solve.
  void iterate(Block& block, const Reverse& back) const {
    for (int64_t t = 0; t < problem.num_iters; ++t) {
      if (t) Base::balance(block);
      if (t && t % period == 0) Base::check(block);
      std::copy_n(block.v, columns * LANES, back.v + t * columns * LANES);
      std::copy_n(block.u, rows * LANES, back.u + t * rows * LANES);
    }
    Base::check(block);
  }

  // by_scores = Q (G - sum_j Q_j G_j), and its column sums in by_g.
  void through_codes(Block& block, const Reverse& back) const {
    Base::template scale_rows<false>(block);
    for (int64_t k = 0; k < columns; ++k) {
      const V share = load<V>(block.shares + k * LANES);
      store(back.inverse_targets + k * LANES, share > 0 ? 1 / (block.total * share) : V{});
    }
    for (int64_t i = 0; i < rows; ++i) {
      const V u = load<V>(block.u + i * LANES);
      const float* e = block.e + i * columns * LANES;
      float* g = back.by_scores + i * columns * LANES;
      V mean{};
      for (int64_t k = 0; k < columns * LANES; k += LANES)
        mean += load<V>(e + k) * load<V>(block.v + k) * u * load<V>(g + k);
      for (int64_t k = 0; k < columns * LANES; k += LANES) {
        const V q = load<V>(e + k) * load<V>(block.v + k) * u, y = q > 0 ? q * (load<V>(g + k) - mean) : q;
        store(g + k, y);
        store(back.by_g + k, load<V>(back.by_g + k) + y);
      }
    }
  }

  // Of an iteration from v to next: h = (E y) u / w with u = w / (E v) and y = v b, the coefficients u (h v - y), and
  // the gradient by the g before, v (E^T u (h + mean)): b lacks its mean. In the first iteration u are constants.
  void through_iterations(const Block& block, const Reverse& back) const {
    V sum{};
    for (int64_t k = 0; k < columns; ++k) sum += load<V>(back.by_g + k * LANES);
    for (int64_t t = problem.num_iters - 1; t >= 0; --t) {
      const float *next = back.v + t * columns * LANES, *v = t ? next - columns * LANES : nullptr;
      const V scale = t ? V{} + 1 : block.total, mean = t ? sum / block.total : V{};  // the first column sums are r
      for (int64_t k = 0; k < columns * LANES; k += LANES) {
        const V a = load<V>(back.by_g + k), b = a * load<V>(next + k) * load<V>(back.inverse_targets + k) * scale;
        store(back.by_marginals + k, load<V>(back.by_marginals + k) + a);
        store(back.y + k, v ? b - mean * load<V>(v + k) : b);
        store(back.by_g + k, V{});
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float* e = block.e + i * columns * LANES;
        float* coefficients = back.coefficients + i * columns * LANES;
        const V w = load<V>(block.weights + i * LANES), u = load<V>(back.u + (t * rows + i) * LANES);
        V h{};
        for (int64_t k = 0; k < columns * LANES; k += LANES) h += load<V>(e + k) * load<V>(back.y + k);
        h *= problem.weights ? (w > 0 ? u / w : V{}) : u;
        store(back.by_weights + i * LANES, load<V>(back.by_weights + i * LANES) - h);
        for (int64_t k = 0; k < columns * LANES; k += LANES) {
          const V vk = v ? load<V>(v + k) : V{};
          store(back.by_g + k, load<V>(back.by_g + k) + load<V>(e + k) * (u * (h + mean) * vk));
          store(coefficients + k, load<V>(coefficients + k) + u * (h * vk - load<V>(back.y + k)));
        }
      }
    }
  }

  // Writes the gradients. A share or weight of 0 has none.
  void finish(const Block& block, const Reverse& back) const {
    const float inverse_epsilon = static_cast<float>(1 / problem.epsilon);
    const auto write = [&](const float* from, int64_t size, float* to) {
      if (to) Base::scatter(from, size, block.present, to + block.first * size);
    };
    for (int64_t j = 0; j < count * LANES; j += LANES) {
      const V e = load<V>(block.e + j), y = load<V>(back.by_scores + j);
      store(back.by_scores + j, (e > 0 ? y + e * load<V>(back.coefficients + j) : y) * inverse_epsilon);
    }
    for (int64_t k = 0; k < columns * LANES; k += LANES)
      store(back.by_marginals + k, load<V>(back.by_marginals + k) * load<V>(back.inverse_targets + k) * block.total);
    for (int64_t i = 0; i < rows * LANES; i += LANES)
      store(back.by_weights + i, load<V>(block.weights + i) > 0 ? load<V>(back.by_weights + i) : V{});
    write(back.by_scores, count, gradient.by_scores);
    write(back.by_marginals, columns, gradient.by_marginals);
    write(back.by_weights, rows, gradient.by_weights);
  }
};

}}  // namespace proto_reg
