// Gradients through Sinkhorn's iterations. The forms of solve_sinkhorn run again and leave each iteration's potentials.
// Then the iterations are gone through backwards, by the formulas in proto_reg/kernels/sinkhorn_gradient.py.
#pragma once

#include "rows_cpu_kernel.h"
#include "sinkhorn_cpu_lanes_reverse.h"
#include "sinkhorn_cpu_solver.h"

namespace proto_reg { namespace {

// One group. The plan of iteration t is P_t = softmax(S / eps + g_t). Of an earlier plan `p` it is
// p_ik s_k / (p s)_i with s = exp(g_t - g), so that exponentials are taken again only where s spans too much.
template <class S>
struct ReverseSinkhorn {
  using V = typename S::V;
  // Codes below 2^-46 are lost, see MOST_SPAN: beside them s must not span more.
  static constexpr float MOST_RATIO = 0x1p20f;
  static constexpr int64_t MOST_STEPS = 64, ROWS = 4;  // iterations until the gradient is brought up to date

  const Group& group;
  const Chunks& chunks;
  const ParallelFor parallel_for;
  const double* history;  // (steps, columns): g after each iteration
  const int64_t steps;
  const float *by_codes, *by_potentials;  // the second one may be null
  float* p;
  float *by_scores, *by_marginals, *by_weights;  // the last two may be null
  const int64_t rows = group.rows, columns = group.columns;
  int64_t pending = 0;  // steps that by_scores lacks
  const double* base = history + (std::max<int64_t>(steps, 1) - 1) * group.columns;  // g of p
  // The gradient by g_t, and its sum over t. Without any weight there is no step, and g is constant.
  std::vector<double> a = std::vector<double>(columns), totals;
  double mean = 0;  // of b, weighted with c: the same in every iteration, and of no effect on the scores
  // by_scores lacks p (left right): of each pending step two columns and two rows.
  const int64_t width = 2 * std::min(MOST_STEPS, steps);
  std::vector<float> left = std::vector<float>(rows * width);
  std::vector<float> right = std::vector<float>(width * columns + 2 * S::LANES);
  std::vector<float> partial = std::vector<float>(chunks.count * chunks.padded);
  std::vector<float> row_sums = std::vector<float>(by_weights ? rows : 0);  // of -h, the gradient by w

  template <class Body>
  void each_chunk(const Body& body) const { share(chunks.count, parallel_for, body); }
  float* sums_of(int64_t chunk) { return partial.data() + chunk * chunks.padded; }
  double joined(int64_t k) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) total += sums_of(chunk)[k];
    return total;
  }

  void run() {
    each_chunk([&](int64_t chunk) { through_codes(chunk); });
    for (int64_t k = 0; steps && k < columns; ++k) a[k] = joined(k) + (by_potentials ? by_potentials[k] : 0);
    mean = steps ? std::accumulate(a.begin(), a.end(), 0.0) / group.total_weight : 0;
    totals = a;
    for (int64_t t = steps - 1; t > 0; --t) {
      if (pending == MOST_STEPS) bring_up_to_date();
      if (!set_factors(t)) rebase(t);
      each_chunk([&](int64_t chunk) { through_iteration(chunk); });
      const float* s = right.data() + 2 * pending++ * columns;
      for (int64_t k = 0; k < columns; ++k) totals[k] += a[k] = s[k] * joined(k);
    }
    bring_up_to_date();
    each_chunk([&](int64_t chunk) { through_start(chunk); });
    // A share or weight of 0 has no gradient.
    for (int64_t k = 0; by_marginals && k < columns; ++k)
      by_marginals[k] = group.marginal(k) > 0 ? static_cast<float>(totals[k] / group.marginal(k)) : 0.f;
    for (int64_t i = 0; by_weights && i < rows; ++i) by_weights[i] = group.weight(i) > 0 ? row_sums[i] : 0.f;
  }

  // by_scores = P (G - sum_j P_j G_j), and its column sums.
  void through_codes(int64_t chunk) {
    float* sums = sums_of(chunk);
    std::fill_n(sums, chunks.padded, 0.f);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const float *q = p + i * columns, *g = by_codes + i * columns;
      float* out = by_scores + i * columns;
      const float average = dot<V>(q, g, columns);
      for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
        const V y = part.get(q + k) * (part.get(g + k) - average);
        part.put(out + k, y);
        part.put(sums + k, part.get(sums + k) + part.once(y));
      });
    }
  }

  // Sets s and y = s b of step t, with b = a / c - mean and the column sums c = W r exp(g_t-1 - g_t) of P_t-1. Returns
  // false if s spans too much.
  bool set_factors(int64_t t) {
    const double *now = history + t * columns, *before = now - columns;
    float *s = right.data() + 2 * pending * columns, *y = s + columns;
    float top = -INFINITY, low = INFINITY;
    for (int64_t k = 0; k < columns; ++k) {
      const bool alive = before[k] > -INFINITY && base[k] > -INFINITY;
      s[k] = alive ? static_cast<float>(before[k] - base[k]) : -INFINITY;
      top = std::max(top, s[k]), low = std::min(low, alive ? s[k] : low);
    }
    for (int64_t k = 0; k < columns; ++k) {
      const double target = group.total_weight * group.marginal(k);
      s[k] = std::exp(s[k] - top);
      y[k] = s[k] > 0 ? static_cast<float>(s[k] * (a[k] * std::exp(now[k] - before[k]) / target - mean)) : 0.f;
    }
    return before == base || !(top - low > std::log(MOST_RATIO));
  }

  // p becomes the plan of iteration t, whose s is 1.
  void rebase(int64_t t) {
    bring_up_to_date();
    base = history + (t - 1) * columns;
    std::vector<double> potentials(base, base + columns), logits(chunks.count * columns);
    std::vector<float> scratch(3 * chunks.count * chunks.padded);
    const LogSinkhorn plan{group, chunks, potentials.data(), nullptr, nullptr, nullptr, logits.data(), scratch.data()};
    each_chunk([&](int64_t chunk) {
      for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
        const float scale = static_cast<float>(1 / plan.row(i, chunk, plan.chunk_logits(chunk), p + i * columns));
        for (int64_t k = 0; k < columns; ++k) p[i * columns + k] *= scale;
      }
    });
    set_factors(t);
  }

  // The column sums of p u (h + mean): the gradient by g_t-1, but for s.
  void through_iteration(int64_t chunk) {
    std::fill_n(sums_of(chunk), chunks.padded, 0.f);
    int64_t i = chunks.begin(chunk);
    for (; i + ROWS <= chunks.end(chunk); i += ROWS) through_rows<ROWS>(i, sums_of(chunk));
    for (; i < chunks.end(chunk); ++i) through_rows<1>(i, sums_of(chunk));
  }

  // u = w / (p s) and h = P b of R rows.
  template <int R>
  INLINE void through_rows(int64_t i, float* sums) {
    const float *s = right.data() + 2 * pending * columns, *y = s + columns, *row = p + i * columns;
    V d[R] = {}, h[R] = {}, z[R];
    for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      const V sk = part.once(part.get(s + k)), yk = part.once(part.get(y + k));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V x = part.get(row + r * columns + k);
        d[r] += x * sk;
        h[r] += x * yk;
      }
    });
    for (int r = 0; r < R; ++r) {
      const float inverse = 1 / sum(d[r]), hr = sum(h[r]) * inverse;
      const float u = group.weight(i + r) > 0 ? group.weight(i + r) * inverse : 0.f;
      float* pair = left.data() + (i + r) * width + 2 * pending;
      pair[0] = u > 0 ? u * hr : 0.f;
      pair[1] = -u;
      if (by_weights && u > 0) row_sums[i + r] -= hr;
      z[r] = V{} + (pair[0] + u * static_cast<float>(mean));
    }
    for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      V c{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c += part.get(row + r * columns + k) * z[r];
      part.put(sums + k, part.get(sums + k) + part.once(c));
    });
  }

  // by_scores += p (left right): w_i P_ik (h_i - b_k) of all pending steps.
  void bring_up_to_date() {
    if (pending)
      each_chunk([&](int64_t chunk) {
        std::vector<float> products(ROWS * columns);
        for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); i += ROWS) {
          const int64_t count = std::min(ROWS, chunks.end(chunk) - i);
          product<V>(left.data() + i * width, width, 1, right.data(), count, 2 * pending, columns, products.data());
          for (int64_t j = 0; j < count * columns; ++j) by_scores[i * columns + j] += p[i * columns + j] * products[j];
        }
      });
    pending = 0;
  }

  // The first iteration: by_scores_ik -= w_i exp(S_ik / eps) a_k / m_k, where m_k = r_k exp(-g_k) are its column sums.
  // Exponents are split, so that they are right for scores of any size. Until here the gradient is that by S / eps.
  void through_start(int64_t chunk) {
    const Split<S> split(group.epsilon);
    std::vector<float> factors(3 * chunks.padded);
    float *whole = factors.data(), *fraction = whole + chunks.padded, *y = fraction + chunks.padded;
    for (int64_t k = 0; k < columns; ++k) {
      const bool alive = steps > 0 && history[k] > -INFINITY;
      y[k] = alive ? static_cast<float>(a[k]) : 0.f;
      const double exponent = alive ? (history[k] - std::log(group.marginal(k))) * M_LOG2E : -INFINITY;
      whole[k] = static_cast<float>(std::nearbyint(exponent));
      fraction[k] = alive ? static_cast<float>(exponent - std::nearbyint(exponent)) : 0.f;
    }
    const float inverse = static_cast<float>(1 / group.epsilon);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const float *s = static_cast<const float*>(group.scores) + i * columns, w = group.weight(i);
      float* out = by_scores + i * columns;
      V total{};
      each_vector<S::LANES>(columns, [&](int64_t k, int64_t present) ALWAYS_INLINE {
        const V score = load_first<V>(s + k, present), n = split.whole(score);
        const V exponent = n + load<V>(whole + k), x = split.fraction(score, n) + load<V>(fraction + k) + exponent;
        const V e = exponent < -124.f ? V{} : exp2_in_range(S::minimum(x, V{} + 126.f)) * load<V>(y + k);
        store_first(out + k, (load_first<V>(out + k, present) - e * w) * inverse, present);
        total += e;
      });
      if (by_weights) row_sums[i] -= sum(total);
    }
  }
};

template <class Isa>
inline void reverse_group(const SinkhornGradient& problem, int64_t index, const Chunks& chunks,
                          ParallelFor parallel_for) {
  SinkhornProblem one = problem.forward;
  const int64_t rows = one.rows, columns = one.columns, offset = index * rows * columns;
  const auto at = [&](auto* base, int64_t size) { return base ? base + index * size : nullptr; };
  const std::unique_ptr<float[]> plan(new float[rows * columns]);
  const std::unique_ptr<double[]> history(new double[one.num_iters * columns]);
  one.groups = 1;
  one.scores = static_cast<const float*>(one.scores) + offset;
  one.marginals = at(one.marginals, one.marginals_stride);
  one.weights = at(one.weights, rows);
  one.codes = plan.get();
  const auto [group, steps] = solve_group<Isa>(one, 0, chunks, parallel_for, history.get());
  const auto run = [&, &group = group, steps = steps](auto simd) {
    ReverseSinkhorn<decltype(simd)>{group, chunks, parallel_for, history.get(), steps, problem.by_codes + offset,
                                    at(problem.by_potentials, columns), plan.get(), problem.by_scores + offset,
                                    at(problem.by_marginals, columns), at(problem.by_weights, rows)}.run();
  };
  if (columns >= 64) run(Simd<Isa>{});
  else run(Simd<Isa, std::min<int64_t>(Isa::LANES, 8)>{});
}

template <class Isa>
void reverse_sinkhorn(const SinkhornGradient& problem, ParallelFor parallel_for) {
  const Chunks chunks(problem.forward.rows, problem.forward.columns);
  each_group(LanesReverse<Simd<Isa>>{{problem.forward}, problem}, chunks, parallel_for,
             [&](int64_t group) { reverse_group<Isa>(problem, group, chunks, parallel_for); });
}

}}  // namespace proto_reg
