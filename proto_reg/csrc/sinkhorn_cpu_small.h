// The small form of Sinkhorn, for a matrix that stays in the nearest caches: E = exp((S - origin) / eps) lies in rows
// of whole vectors, and each iteration reads it once, as many rows at a time as a vector has lanes. One thread.
// SinkhornGroupSolver in sinkhorn_cpu_solver.h runs it.
#pragma once

#include "sinkhorn_cpu_scaling.h"

namespace proto_reg { namespace {

// Lane l of the result is what `join` makes of all lanes of x[l], such as their sum.
template <int64_t DISTANCE, class V, size_t LANES, class Join>
INLINE V joined_lanes(V (&x)[LANES], const Join& join) {
  const IntsOf<V> upper = (lane_numbers<V>() & (int32_t)DISTANCE) != 0;
#pragma GCC unroll 8
  for (int32_t i = 0; i < DISTANCE; ++i) {
    const V a = x[i], b = x[i + DISTANCE];
    x[i] = join(upper ? b : a, swapped(upper ? a : b, DISTANCE));
  }
  if constexpr (DISTANCE > 1) return joined_lanes<DISTANCE / 2>(x, join);
  return x[0];
}

template <class S>
struct SmallSinkhorn {
  using V = typename S::V;
  static constexpr int64_t LANES = S::LANES;
  static constexpr int64_t MOST_VECTORS = 8, MOST_COLUMNS = MOST_VECTORS * LANES, MOST_REST = LANES / 4;

  const Group& group;
  const float* s;   // (rows, columns) scores
  float* e;         // (rows, columns) exp((S - origin) / eps) in blocks of LANES rows, both rounded up to whole vectors
  float* v;         // (columns rounded up,)
  float* c;         // (columns rounded up,) column sums
  float* codes;     // (rows, columns), or null
  float* gradient;  // (rows, columns), or null
  const Exponential<S> exponential{group.first(), group.epsilon};
  // The columns beyond the last whole vector, if they are few. They lie across: in each block of rows such a column is
  // one vector, with row r in lane r.
  const int64_t rest = group.columns > LANES && group.columns % LANES <= MOST_REST ? group.columns % LANES : 0;

  static int64_t rounded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

  // Computes E and the first v. Returns false if the scores' range is not safe, or they hold a NaN or an infinity.
  bool exponentials() const {
    std::fill_n(v, rounded(group.columns), 0.0f);
    Extrema range;
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE {
      constexpr bool ACROSS = across();
      range = group.weights ? exponentials_of<vectors(), ACROSS, true>() : exponentials_of<vectors(), ACROSS, false>();
    });
    return exponential.safe(range) && all_finite(c, group.columns) && update_scaling(group, c, true, -1, v);
  }

  // One iteration. If all columns were within tol, returns false and leaves v.
  bool balance(double tol) const {
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE { balance_rows<vectors(), across()>(); });
    return update_scaling(group, c, false, tol, v);
  }

  void write_potentials(float* potentials) const {
    write_logarithms<S>(v, group.columns, exponential.origin(), potentials);
  }

  // Writes codes and gradient, and returns the sum of the rows' losses.
  double write() const {
    double loss = 0;
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE {
      if (gradient) loss = write_gradient<vectors(), across()>();
      else write_codes<vectors(), across()>();
    });
    return loss;
  }

 private:
  static INLINE V sums(V (&x)[LANES]) {
    return joined_lanes<LANES / 2>(x, [](V a, V b) ALWAYS_INLINE { return a + b; });
  }
  static INLINE V maxima(V (&x)[LANES]) {
    return joined_lanes<LANES / 2>(x, [](V a, V b) ALWAYS_INLINE { return S::maximum(a, b); });
  }

  // Calls body(vectors, across) with two constants: the number of vectors along a row, and whether columns lie across.
  template <class Body>
  INLINE void with_vectors(const Body& body) const {
    if (rest) choose<true>(group.columns / LANES, body);
    else choose<false>((group.columns + LANES - 1) / LANES, body);
  }
  template <bool ACROSS, int VECTORS = 1, class Body>
  INLINE void choose(int64_t vectors, const Body& body) const {
    if (vectors == VECTORS) return body(std::integral_constant<int, VECTORS>{}, std::bool_constant<ACROSS>{});
    if constexpr (VECTORS < MOST_VECTORS) choose<ACROSS, VECTORS + 1>(vectors, body);
  }

  // Rows of a matrix without padding. Without columns across, a row's last vector reaches into the next row, but never
  // past the end of the matrix.
  template <int VECTORS, bool ACROSS>
  struct Rows {
    int64_t columns, count;
    explicit INLINE Rows(const Group& group) : columns(group.columns), count(group.rows * group.columns) {}

    INLINE V get(const float* from, int64_t i, int j) const {
      const int64_t at = i * columns + j * LANES;
      if (ACROSS || j < VECTORS - 1 || at + LANES <= count) return load<V>(from + at);
      return Short<V>{count - at}.get(from + at);
    }
    // Rows are put in their order, so that the next row overwrites what reaches too far.
    INLINE void put(float* to, int64_t i, int j, V x) const {
      const int64_t at = i * columns + j * LANES;
      if (ACROSS || j < VECTORS - 1 || at + LANES <= count) return store(to + at, x);
      Short<V>{count - at}.put(to + at, x);
    }
    // x, but `other` in the lanes of vector j that lie past the end of the row.
    INLINE V within(int j, V x, V other = V{}) const {
      return ACROSS || j < VECTORS - 1 || lane_numbers<V>() < static_cast<int32_t>(columns - j * LANES) ? x : other;
    }
    // Column `VECTORS * LANES + t` of `present` rows from row i on. Lanes beyond the last row repeat it.
    INLINE V get_across(const float* from, int64_t i, int64_t present, int64_t t) const {
      const float* at = from + i * columns + VECTORS * LANES + t;
      alignas(V) float x[LANES];
      for (int64_t r = 0; r < LANES; ++r) x[r] = at[std::min(r, present - 1) * columns];
      return load<V>(x);
    }
    INLINE void put_across(float* to, int64_t i, int64_t present, int64_t t, V column) const {
      float* at = to + i * columns + VECTORS * LANES + t;
      alignas(V) float x[LANES];
      store(x, column);
      for (int64_t r = 0; r < present; ++r) at[r * columns] = x[r];
    }
  };

  // The block of E that starts with row i; and where in a block column `VECTORS * LANES + t` lies, behind all rows.
  template <int VECTORS>
  INLINE float* block(int64_t i) const { return e + i * (VECTORS * LANES + rest); }
  template <int VECTORS>
  INLINE static int64_t across_at(int64_t t) { return (LANES * VECTORS + t) * LANES; }

  INLINE int64_t present(int64_t i) const { return std::min(LANES, group.rows - i); }

  // Weights of LANES rows from row i on; 0 past the last row.
  INLINE V row_weights(int64_t i) const {
    V w = V{} + 1.f;
    if (group.weights) __builtin_memcpy(&w, group.weights + i, sizeof(float) * present(i));
    return lane_numbers<V>() < static_cast<int32_t>(present(i)) ? w : V{};
  }

  // Computes E and its column sums, weighted by row. Returns the scores' range. A NaN shows only in the sums, also that
  // of a row of weight 0.
  template <int VECTORS, bool ACROSS, bool WEIGHTED>
  Extrema exponentials_of() const {
    // Copies, because the compiler cannot know that no store changes the originals.
    const Rows<VECTORS, ACROSS> rows(group);
    const Exponential<S> exp = exponential;
    const float *const scores = s, *const weights = group.weights;
    const int64_t count = group.rows, others = rest;
    V total[VECTORS] = {}, total_across[MOST_REST] = {}, low = V{} + group.first(), high = low;
    const auto value = [&](V score) ALWAYS_INLINE {
      low = S::minimum(low, score);
      high = S::maximum(high, score);
      return exp(score);
    };
    for (int64_t first = 0; first < count; first += LANES) {
      float *const at = block<VECTORS>(first), *to = at;
      const int64_t last = std::min(first + LANES, count);
      for (int64_t i = first; i < last; ++i, to += VECTORS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
          const V x = rows.within(j, value(rows.get(scores, i, j)));
          store(to + j * LANES, x);
          total[j] += WEIGHTED ? x * weights[i] : x;
        }
      std::fill_n(to, (first + LANES - last) * VECTORS * LANES, 0.0f);
      if constexpr (ACROSS) {
        const V w = row_weights(first);
        for (int64_t t = 0; t < others; ++t) {
          const V x = value(rows.get_across(scores, first, last - first, t));
          store(at + across_at<VECTORS>(t), lane_numbers<V>() < static_cast<int32_t>(last - first) ? x : V{});
          total_across[t] += x * w;
        }
      }
    }
    put_sums(total, total_across);
    return {S::minimum(low), S::maximum(high)};
  }

  template <int VECTORS>
  INLINE void put_sums(const V (&total)[VECTORS], const V (&total_across)[MOST_REST]) const {
    for (int j = 0; j < VECTORS; ++j) store(c + j * LANES, total[j]);
    for (int64_t t = 0; t < rest; ++t) c[VECTORS * LANES + t] = sum(total_across[t]);
  }

  // u_i = 1 / (E v)_i of the rows of a block.
  template <int VECTORS, bool ACROSS>
  INLINE V row_scales(const float* row) const {
    V d[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) {
      d[r] = load<V>(row + r * VECTORS * LANES) * load<V>(v);
#pragma GCC unroll 8
      for (int j = 1; j < VECTORS; ++j) d[r] += load<V>(row + (r * VECTORS + j) * LANES) * load<V>(v + j * LANES);
    }
    V total = sums(d);
    if constexpr (ACROSS)
      for (int64_t t = 0; t < rest; ++t) total += load<V>(row + across_at<VECTORS>(t)) * v[VECTORS * LANES + t];
    return 1 / total;
  }

  // c_k = sum_i w_i u_i E_ik.
  template <int VECTORS, bool ACROSS>
  void balance_rows() const {
    // Some rows have sums of their own, because an addition to a sum waits for the one before.
    constexpr int ROWS = VECTORS <= 1 ? 4 : VECTORS <= 3 ? 2 : 1;
    V total[ROWS][VECTORS] = {}, total_across[MOST_REST] = {};
    for (int64_t i = 0; i < group.rows; i += LANES) {
      const float* row = block<VECTORS>(i);
      const V scales = row_scales<VECTORS, ACROSS>(row), w = row_weights(i), weighted = w > 0 ? scales * w : V{};
      if constexpr (ACROSS)
        for (int64_t t = 0; t < rest; ++t) total_across[t] += load<V>(row + across_at<VECTORS>(t)) * weighted;
      alignas(V) float u[LANES];
      store(u, weighted);
      asm("" : "+r"(row));  // without this the compiler keeps rows from row_scales, on the stack
      for (int r = 0; r < LANES; ++r, row += VECTORS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) total[r % ROWS][j] += load<V>(row + j * LANES) * u[r];
    }
    for (int j = 0; j < VECTORS; ++j)
      for (int r = 1; r < ROWS; ++r) total[0][j] += total[r][j];
    put_sums(total[0], total_across);
  }

  template <int VECTORS, bool ACROSS>
  void write_codes() const {
    const Rows<VECTORS, ACROSS> rows(group);
    float* const to = codes;
    const int64_t count = group.rows;
    V by_column[VECTORS];
    for (int j = 0; j < VECTORS; ++j) by_column[j] = load<V>(v + j * LANES);
    for (int64_t i = 0; i < count; i += LANES) {
      const float* row = block<VECTORS>(i);
      const V scales = row_scales<VECTORS, ACROSS>(row);
      if constexpr (ACROSS)
        for (int64_t t = 0; t < rest; ++t)
          rows.put_across(to, i, present(i), t, load<V>(row + across_at<VECTORS>(t)) * v[VECTORS * LANES + t] * scales);
      alignas(V) float u[LANES];
      store(u, scales);
      asm("" : "+r"(row));
      for (int64_t r = 0; r < std::min(LANES, count - i); ++r, row += VECTORS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) rows.put(to, i + r, j, load<V>(row + j * LANES) * by_column[j] * u[r]);
    }
  }

  // Writes the gradient, and the codes unless null. Returns the sum of the rows' losses: log z - q . (S - row maximum)
  // / tau.
  template <int VECTORS, bool ACROSS>
  double write_gradient() const {
    V losses{};
    int64_t i = 0;
    for (; i + LANES < group.rows; i += LANES) losses += write_gradients<VECTORS, ACROSS, LANES>(i, LANES);
    losses += write_gradients<VECTORS, ACROSS, 0>(i, group.rows - i);
    double loss = 0;
    for (int64_t r = 0; r < LANES; ++r) loss += losses[r];
    return loss;
  }

  // Returns the row maxima of a block's scores, and reads its scores across.
  template <int VECTORS, bool ACROSS, class Score>
  INLINE V row_maxima(const Rows<VECTORS, ACROSS>& rows, int64_t i, int64_t present, const Score& score,
                      V (&x_across)[MOST_REST]) const {
    V high[LANES];
#pragma GCC unroll 16
    for (int64_t r = 0; r < LANES; ++r) {
      high[r] = rows.within(0, score(r, 0), V{} - INFINITY);
#pragma GCC unroll 8
      for (int j = 1; j < VECTORS; ++j) high[r] = S::maximum(high[r], rows.within(j, score(r, j), V{} - INFINITY));
    }
    V top = maxima(high);
    if constexpr (ACROSS)
      for (int64_t t = 0; t < rest; ++t) {
        x_across[t] = rows.get_across(s, i, present, t);
        top = S::maximum(top, x_across[t]);
      }
    return top;
  }

  // For LANES rows from row i on; if WHOLE is 0, for the last `present` rows. Returns their losses.
  template <int VECTORS, bool ACROSS, int64_t WHOLE>
  INLINE V write_gradients(int64_t i, int64_t present) const {
    if (WHOLE) present = WHOLE;
    const Rows<VECTORS, ACROSS> rows(group);
    // Copies, because the compiler cannot know that no store changes the originals.
    const float *const scores = s, *const row = block<VECTORS>(i);
    float *const by_scores = gradient, *const q = codes;
    const int64_t others = ACROSS ? rest : 0;
    const float by_temperature = static_cast<float>(M_LOG2E / group.temperature);
    const auto score = [&](int64_t r, int j) ALWAYS_INLINE {
      // Beyond the last row comes that row again, with a weight of 0.
      return WHOLE ? load<V>(scores + (i + r) * rows.columns + j * LANES)
                   : rows.get(scores, i + std::min(r, present - 1), j);
    };
    const auto power = [&](V x) ALWAYS_INLINE { return exp2_in_range(S::maximum(x * by_temperature, V{} - 126.f)); };
    alignas(V) float top[LANES], by_p[LANES], by_q[LANES], u[LANES];
    alignas(V) float p[LANES * VECTORS * LANES];  // exp((S - row maximum) / tau)
    V normaliser[LANES], product[LANES], x_across[MOST_REST], p_across[MOST_REST], q_across[MOST_REST];
    const V tops = row_maxima(rows, i, present, score, x_across);
    store(top, tops);
#pragma GCC unroll 4
    for (int64_t r = 0; r < LANES; ++r) {
      V z{}, qx{};
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) {
        const V x = score(r, j) - top[r], pj = power(x);
        const V qj = load<V>(row + (r * VECTORS + j) * LANES) * load<V>(v + j * LANES);  // 0 beyond the end of the row
        store(p + (r * VECTORS + j) * LANES, pj);
        z += rows.within(j, pj);
        qx += qj * x;
      }
      normaliser[r] = z, product[r] = qx;
    }
    V z = sums(normaliser), qx = sums(product);
    for (int64_t t = 0; t < others; ++t) {
      const V x = x_across[t] - tops;
      z += p_across[t] = power(x);
      q_across[t] = load<V>(row + across_at<VECTORS>(t)) * v[VECTORS * LANES + t];
      qx += q_across[t] * x;
    }
    const V w = row_weights(i), share = w * static_cast<float>(group.gradient_scale);
    const V all = row_scales<VECTORS, ACROSS>(row);
    const V scales = lane_numbers<V>() < static_cast<int32_t>(present) ? all : V{};
    const V of_p = share / z, of_q = share * scales;
    for (int64_t t = 0; t < others; ++t) {
      rows.put_across(by_scores, i, present, t, p_across[t] * of_p - q_across[t] * of_q);
      if (q) rows.put_across(q, i, present, t, q_across[t] * scales);
    }
    store(by_p, of_p);
    store(by_q, of_q);
    store(u, scales);
    const auto put = [&](float* to, int64_t r, int j, V x) ALWAYS_INLINE {
      if (WHOLE) store(to + (i + r) * rows.columns + j * LANES, x);
      else rows.put(to, i + r, j, x);
    };
#pragma GCC unroll 4
    for (int64_t r = 0; r < present; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) {
        const V qj = load<V>(row + (r * VECTORS + j) * LANES) * load<V>(v + j * LANES);
        put(by_scores, r, j, load<V>(p + (r * VECTORS + j) * LANES) * by_p[r] - qj * by_q[r]);
        if (q) put(q, r, j, qj * u[r]);
      }
    }
    return w * (logarithm(z) - qx * scales * static_cast<float>(1 / group.temperature));
  }
};

}}  // namespace proto_reg
