// The logarithmic form of Sinkhorn, for inputs that the others do not take: NaN, +inf, rows of nothing but -inf, scores
// beyond MOST_WHOLE, a single column. Each pass starts from the scores, so that nothing overflows. SinkhornGroupSolver
// in sinkhorn_cpu_solver.h runs it.
#pragma once

#include "sinkhorn_cpu_group.h"

namespace proto_reg { namespace {

struct LogSinkhorn {
  const Group& group;
  const Chunks& chunks;
  double* g;        // (columns,)
  double* partial;  // (chunks, columns)
  float* tops;      // (chunks, columns)
  double* losses;   // (chunks,)
  double* logits;   // (chunks, columns)
  float* scratch;   // (chunks, 3, padded columns)

  double* chunk_logits(int64_t chunk) const { return logits + chunk * group.columns; }
  float* chunk_scratch(int64_t chunk, int64_t which) const { return scratch + (3 * chunk + which) * chunks.padded; }
  const float* scores(int64_t i, int64_t chunk) const { return group.row(i, chunk_scratch(chunk, 0)); }

  // Whether row i takes part. A row of weight 0 does not, nor does an isolated one.
  bool counts(int64_t i, int64_t chunk) const { return group.weight(i) > 0 && !(group.isolate && unusable(i, chunk)); }

  // Whether row i holds a NaN, a +inf, or nothing but -inf in the columns that have a share.
  bool unusable(int64_t i, int64_t chunk) const {
    const float* s = scores(i, chunk);
    bool any = false;
    for (int64_t k = 0; k < group.columns; ++k) {
      const float x = s[k];
      if (!(x < INFINITY)) return true;
      any |= x > -INFINITY && group.marginal(k) > 0;
    }
    return !any;
  }

  // e^x in float32; 0 below e^-87.
  static INLINE float exponential(double x) {
    const float y = static_cast<float>(x * M_LOG2E);
    const float clamped = y < -126.f ? -126.f : y;
    return y < -126.f ? 0.f : exp2_in_range(clamped);
  }

  void column_tops(int64_t chunk) const {
    float* top = tops + chunk * group.columns;
    std::fill_n(top, group.columns, -INFINITY);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      if (!counts(i, chunk)) continue;
      const float* s = scores(i, chunk);
      for (int64_t k = 0; k < group.columns; ++k) top[k] = std::max(top[k], s[k]);
    }
  }

  // sum_i w_i exp((S_ik - top_k) / eps): the first column sums.
  void first_sums(int64_t chunk) const {
    double* c = partial + chunk * group.columns;
    std::fill_n(c, group.columns, 0.0);
    const double scale = 1 / group.epsilon;
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      if (!counts(i, chunk)) continue;
      const float* s = scores(i, chunk);
      const double w = group.weight(i);
#pragma omp simd
      for (int64_t k = 0; k < group.columns; ++k) {
        const float x = s[k];
        c[k] += x == -INFINITY ? 0.0 : w * exponential((x - static_cast<double>(tops[k])) * scale);
      }
    }
  }

  // Writes p_k = exp(y_k - max y) for y = S_i / eps + g, and returns their sum.
  double row(int64_t i, int64_t chunk, double* y, float* p) const {
    const float* s = scores(i, chunk);
    const double scale = 1 / group.epsilon;
    double top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < group.columns; ++k) {
      y[k] = s[k] * scale + g[k];
      top = y[k] > top ? y[k] : top;
    }
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < group.columns; ++k) {
      p[k] = exponential(y[k] - top);
      total += p[k];
    }
    return total;
  }

  void balance(int64_t chunk) const {
    double* c = partial + chunk * group.columns;
    float* p = chunk_scratch(chunk, 1);
    std::fill_n(c, group.columns, 0.0);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      if (!counts(i, chunk)) continue;
      const double u = group.weight(i) / row(i, chunk, chunk_logits(chunk), p);
#pragma omp simd
      for (int64_t k = 0; k < group.columns; ++k) c[k] += p[k] * u;
    }
  }

  double column_sum(int64_t k) const {
    double column = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) column += partial[chunk * group.columns + k];
    return column;
  }

  void join_tops() const {
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
      for (int64_t k = 0; k < group.columns; ++k) tops[k] = std::max(tops[k], tops[chunk * group.columns + k]);
  }

  void first_update() const {
    for (int64_t k = 0; k < group.columns; ++k) {
      // A column of nothing but -inf sums to 0. It gets nothing, like a column whose marginal is 0.
      const double column = column_sum(k);
      g[k] = column == 0 ? -INFINITY : std::log(group.marginal(k) / column) - tops[k] / group.epsilon;
    }
  }

  // g_k -= log(c_k / (W r_k)). If all columns are within tol, returns false and leaves g.
  bool update(double tol) const {
    if (tol >= 0 && within(tol)) return false;
    for (int64_t k = 0; k < group.columns; ++k) {
      const double column = column_sum(k);
      g[k] = column == 0 ? -INFINITY : g[k] - std::log(column / (group.total_weight * group.marginal(k)));
    }
    return true;
  }

  // Whether every column's error is at most tol; that of a NaN is not. What columns of nothing but -inf leave is shared
  // by the others.
  bool within(double tol) const {
    double present = 0;
    for (int64_t k = 0; k < group.columns; ++k) present += column_sum(k) == 0 ? 0 : group.marginal(k);
    for (int64_t k = 0; k < group.columns; ++k) {
      const double column = column_sum(k), target = group.total_weight * group.marginal(k) / present;
      if (column != 0 && !(std::abs(column / target - 1) <= tol)) return false;
    }
    return true;
  }

  void keep_potentials(double* potentials) const { std::copy_n(g, group.columns, potentials); }

  void write_potentials(float* potentials) const {
    const double largest = std::numeric_limits<float>::max();
    for (int64_t k = 0; k < group.columns; ++k) {
      const double bounded = std::min(std::max(g[k], -largest), largest);
      potentials[k] = static_cast<float>(std::isfinite(g[k]) ? bounded : g[k]);
    }
  }

  void write(int64_t chunk) const {
    losses[chunk] = 0;
    float* p = chunk_scratch(chunk, 1);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const bool isolated = group.isolate && unusable(i, chunk);
      const double u = isolated ? NAN : 1 / row(i, chunk, chunk_logits(chunk), p);
      for (int64_t k = 0; k < group.columns; ++k) p[k] = isolated ? NAN : static_cast<float>(p[k] * u);
      if (group.gradient) losses[chunk] += cross_entropy(i, chunk, p, isolated);
      if (group.codes) {
        float* codes = group.output(group.codes, i, p);
        if (codes != p) std::copy_n(p, group.columns, codes);
        group.finish(codes, group.codes, i);
      }
    }
  }

  // Writes the gradient and returns the loss of row i with codes q. Both are 0 for a row that does not count.
  double cross_entropy(int64_t i, int64_t chunk, const float* q, bool isolated) const {
    double* y = chunk_logits(chunk);
    float* gradient = group.output(group.gradient, i, chunk_scratch(chunk, 2));
    double loss = 0;
    if (isolated || group.weight(i) == 0) {
      std::fill_n(gradient, group.columns, 0.f);
    } else {
      const float* s = scores(i, chunk);
      const float top = *std::max_element(s, s + group.columns);
      double z = 0, product = 0;
      for (int64_t k = 0; k < group.columns; ++k) {
        const double x = (s[k] - static_cast<double>(top)) / group.temperature;
        y[k] = exponential(x);
        z += y[k];
        product += q[k] == 0 ? 0 : q[k] * x;  // the -inf of a column that gets nothing does not count
      }
      const double w = group.weight(i) * group.gradient_scale;
      for (int64_t k = 0; k < group.columns; ++k) gradient[k] = static_cast<float>((y[k] / z - q[k]) * w);
      loss = group.weight(i) * (std::log(z) - product);
    }
    group.finish(gradient, group.gradient, i);
    return loss;
  }
};

}}  // namespace proto_reg
