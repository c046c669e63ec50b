// The small form of Sinkhorn, for a matrix that stays in the nearest caches or has few columns: E lies in rows of whole
// vectors, and each iteration reads it once, as many rows at a time as a vector has lanes. Threads share its chunks.
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
struct SmallSinkhorn : ChunkedScaling<S> {  // e: (chunks, blocks of LANES rows), rows and columns rounded up
  using V = typename S::V;
  using Base = ChunkedScaling<S>;
  using Base::group, Base::chunks, Base::e, Base::v, Base::losses, Base::exponential, Base::split, Base::absorbed;
  static constexpr int64_t LANES = S::LANES;
  static constexpr int64_t MOST_VECTORS = 8, MOST_COLUMNS = MOST_VECTORS * LANES, MOST_REST = LANES / 4;

  const float* s;   // (rows, columns) scores; those of half precision are converted to here
  float* codes;     // (rows, columns), or null
  float* gradient;  // (rows, columns), or null
  // The columns beyond the last whole vector, if they are few. They lie across: in each block of rows such a column is
  // one vector, with row r in lane r.
  const int64_t rest = group.columns > LANES && group.columns % LANES <= MOST_REST ? group.columns % LANES : 0;

  static int64_t rounded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }
  static int64_t chunk_floats(const Chunks& chunks, int64_t columns) { return rounded(chunks.size) * rounded(columns); }

  // The column maxima of a chunk's scores, over the rows that count.
  void column_tops(int64_t chunk) const {
    const Part part = part_of(chunk);
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE { column_maxima<vectors(), across()>(part); });
  }

  // Computes E of a chunk's rows, and the chunk's part of the first column sums.
  void exponentials(int64_t chunk) const {
    const Part part = part_of(chunk);
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE {
      constexpr bool ACROSS = across();
      if (group.weights) exponentials_of<vectors(), ACROSS, true>(part);
      else exponentials_of<vectors(), ACROSS, false>(part);
    });
  }

  // Computes E of a chunk's rows, absorbed. first: also the chunk's part of the first column sums.
  void absorb(int64_t chunk, bool first) const {
    const Part part = part_of(chunk);
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE { absorbed_rows<vectors(), across()>(part, first); });
  }

  // One iteration: the column sums of diag(u) E with u_i = w_i / (E v)_i.
  void balance(int64_t chunk) const {
    const Part part = part_of(chunk);
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE { balance_rows<vectors(), across()>(part); });
  }

  // Writes codes and gradient, and the sum of the rows' losses.
  void write(int64_t chunk) const {
    const Part part = part_of(chunk);
    losses[chunk] = 0;
    with_vectors([&](auto vectors, auto across) ALWAYS_INLINE {
      if (gradient) losses[chunk] = write_gradient<vectors(), across()>(part);
      else write_codes<vectors(), across()>(part);
    });
  }

 private:
  // A chunk's rows, their E and their column sums.
  struct Part {
    int64_t begin, end;
    float *e, *c;

    // The block of E that starts with row i.
    template <int VECTORS>
    INLINE float* block(int64_t i, int64_t rest) const { return e + (i - begin) * (VECTORS * LANES + rest); }
    INLINE int64_t present(int64_t i) const { return std::min(LANES, end - i); }
  };
  Part part_of(int64_t chunk) const {
    float* part = e + chunk * chunk_floats(chunks, group.columns);
    return {chunks.begin(chunk), chunks.end(chunk), part, Base::sums_of(chunk)};
  }

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
  // past the end of the chunk.
  template <int VECTORS, bool ACROSS>
  struct Rows {
    int64_t columns, count;
    INLINE Rows(const Group& group, const Part& part) : columns(group.columns), count(part.end * group.columns) {}

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

  // Where in a block column `VECTORS * LANES + t` lies, behind all rows.
  template <int VECTORS>
  INLINE static int64_t across_at(int64_t t) { return (LANES * VECTORS + t) * LANES; }

  // Weights of LANES rows from row i on; 0 past the last row.
  INLINE V row_weights(int64_t i, int64_t present) const {
    V w = V{} + 1.f;
    if (group.weights) __builtin_memcpy(&w, group.weights + i, sizeof(float) * present);
    return lane_numbers<V>() < static_cast<int32_t>(present) ? w : V{};
  }

  template <int VECTORS, bool ACROSS>
  void column_maxima(const Part& part) const {
    const Rows<VECTORS, ACROSS> rows(group, part);
    // Some rows have maxima of their own, because a maximum waits for the one before.
    constexpr int ROWS = VECTORS <= 1 ? 4 : VECTORS <= 3 ? 2 : 1;
    V high[ROWS][VECTORS];
    std::fill_n(&high[0][0], ROWS * VECTORS, V{} - INFINITY);
    float beyond[MOST_REST];
    std::fill_n(beyond, MOST_REST, -INFINITY);
    for (int64_t i = part.begin; i < part.end;) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const int64_t row = std::min(i++, part.end - 1);  // beyond the last row comes that row again
        if (!(group.weight(row) > 0)) continue;
        for (int j = 0; j < VECTORS; ++j) high[r][j] = S::maximum(rows.get(s, row, j), high[r][j]);
        for (int64_t t = 0; ACROSS && t < rest; ++t)
          beyond[t] = std::max(beyond[t], s[row * rows.columns + VECTORS * LANES + t]);
      }
    }
    for (int j = 0; j < VECTORS; ++j) {
      for (int r = 1; r < ROWS; ++r) high[0][j] = S::maximum(high[r][j], high[0][j]);
      store(part.c + j * LANES, high[0][j]);
    }
    for (int64_t t = 0; t < rest; ++t) part.c[VECTORS * LANES + t] = beyond[t];
  }

  // Computes E and its column sums, weighted by row. A NaN shows only in the sums, also that of a row of weight 0.
  template <int VECTORS, bool ACROSS, bool WEIGHTED>
  void exponentials_of(const Part& part) const {
    // Copies, because the compiler cannot know that no store changes the originals.
    const Rows<VECTORS, ACROSS> rows(group, part);
    const Exponential<S> exp = exponential;
    const float *const scores = s, *const weights = group.weights;
    const int64_t end = part.end, others = rest;
    V total[VECTORS] = {}, total_across[MOST_REST] = {}, high = V{} - INFINITY;
    const auto value = [&](V score) ALWAYS_INLINE {
      high = S::maximum(score, high);
      return exp(score);
    };
    for (int64_t first = part.begin; first < end && !Base::has_failed(); first += LANES) {
      float *const at = part.template block<VECTORS>(first, others), *to = at;
      const int64_t last = std::min(first + LANES, end);
      for (int64_t i = first; i < last; ++i, to += VECTORS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
          const V x = rows.within(j, value(rows.get(scores, i, j)));
          store(to + j * LANES, x);
          total[j] += WEIGHTED ? x * weights[i] : x;
        }
      std::fill_n(to, (first + LANES - last) * VECTORS * LANES, 1.0f);
      if constexpr (ACROSS) {
        const V w = row_weights(first, last - first);
        for (int64_t t = 0; t < others; ++t) {
          const V x = value(rows.get_across(scores, first, last - first, t));
          store(at + across_at<VECTORS>(t), x);
          total_across[t] += x * w;
        }
      }
      if (first == part.begin || last == end) Base::fail_unless(S::maximum(high) <= exp.ceiling);
    }
    put_sums(part.c, total, total_across);
  }

  // Computes E with the rows' maxima and the columns' shifts moved out, and the first column sums if `first`.
  template <int VECTORS, bool ACROSS>
  void absorbed_rows(const Part& part, bool first) const {
    const Rows<VECTORS, ACROSS> rows(group, part);
    const Split<S> splitter = split;
    const float *const scores = s, *const shifts = Base::shifts;
    V total[VECTORS] = {}, total_across[MOST_REST] = {}, across[MOST_REST];
    const auto height = [&](V score, V shift) ALWAYS_INLINE { return score * splitter.scale + shift; };
    for (int64_t i = part.begin; i < part.end; i += LANES) {
      const int64_t present = part.present(i);
      float* to = part.template block<VECTORS>(i, rest);
      V high[LANES];
      for (int64_t r = 0; r < LANES; ++r) {
        high[r] = V{} - DEAD;
        for (int j = 0; j < VECTORS; ++j) {
          const V x = height(rows.get(scores, i + std::min(r, present - 1), j), load<V>(shifts + j * LANES));
          high[r] = S::maximum(rows.within(j, x, V{} - DEAD), high[r]);
        }
      }
      V tops = maxima(high);
      for (int64_t t = 0; ACROSS && t < rest; ++t) {
        across[t] = rows.get_across(scores, i, present, t);
        tops = S::maximum(height(across[t], V{} + shifts[VECTORS * LANES + t]), tops);
      }
      tops = (tops + MAGIC) - MAGIC;
      Base::fail_unless(S::minimum(tops) > -MOST_WHOLE);
      const V w = row_weights(i, present), weighted = w > 0 ? w * power_or_zero(tops) : V{};
      for (int64_t t = 0; ACROSS && t < rest; ++t) {
        const V x = shifted_exponential(splitter, across[t], shifts[VECTORS * LANES + t] - tops);
        store(to + across_at<VECTORS>(t), x);
        total_across[t] += x * weighted;
      }
      alignas(V) float top[LANES], u[LANES];
      store(top, tops);
      store(u, weighted);
      for (int64_t r = 0; r < LANES; ++r, to += VECTORS * LANES)
        for (int j = 0; j < VECTORS; ++j) {
          const V score = rows.get(scores, i + std::min(r, present - 1), j);
          const V x = rows.within(j, shifted_exponential(splitter, score, load<V>(shifts + j * LANES) - top[r]));
          store(to + j * LANES, x);
          if (first) total[j] += x * u[r];
        }
    }
    put_sums(part.c, total, total_across);
  }

  template <int VECTORS>
  INLINE void put_sums(float* c, const V (&total)[VECTORS], const V (&total_across)[MOST_REST]) const {
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
  void balance_rows(const Part& part) const {
    // Some rows have sums of their own, because an addition to a sum waits for the one before.
    constexpr int ROWS = VECTORS <= 1 ? 4 : VECTORS <= 3 ? 2 : 1;
    V total[ROWS][VECTORS] = {}, total_across[MOST_REST] = {}, largest{};
    for (int64_t i = part.begin; i < part.end; i += LANES) {
      const float* row = part.template block<VECTORS>(i, rest);
      const V scales = row_scales<VECTORS, ACROSS>(row), w = row_weights(i, part.present(i));
      const V weighted = w > 0 ? scales * w : V{};
      largest = S::maximum(scales, largest);
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
    put_sums(part.c, total[0], total_across);
    Base::check_rows(S::maximum(largest));
  }

  template <int VECTORS, bool ACROSS>
  void write_codes(const Part& part) const {
    const Rows<VECTORS, ACROSS> rows(group, part);
    float* const to = codes;
    const int64_t end = part.end;
    V by_column[VECTORS];
    for (int j = 0; j < VECTORS; ++j) by_column[j] = load<V>(v + j * LANES);
    for (int64_t i = part.begin; i < end; i += LANES) {
      const float* row = part.template block<VECTORS>(i, rest);
      const V scales = row_scales<VECTORS, ACROSS>(row);
      if constexpr (ACROSS)
        for (int64_t t = 0; t < rest; ++t) {
          const V x = load<V>(row + across_at<VECTORS>(t)) * v[VECTORS * LANES + t];
          rows.put_across(to, i, part.present(i), t, x * scales);
        }
      alignas(V) float u[LANES];
      store(u, scales);
      asm("" : "+r"(row));
      for (int64_t r = 0; r < std::min(LANES, end - i); ++r, row += VECTORS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) rows.put(to, i + r, j, load<V>(row + j * LANES) * by_column[j] * u[r]);
    }
  }

  // Writes the gradient, and the codes unless null. Returns the sum of the rows' losses: log z - q . (S - row maximum)
  // / tau.
  template <int VECTORS, bool ACROSS>
  double write_gradient(const Part& part) const {
    V each{};
    int64_t i = part.begin;
    // As long as the last row's vectors end with the chunk.
    for (; (i + LANES - 1) * group.columns + VECTORS * LANES <= part.end * group.columns; i += LANES)
      each += write_gradients<VECTORS, ACROSS, LANES>(part, i, LANES);
    for (; i < part.end; i += LANES) each += write_gradients<VECTORS, ACROSS, 0>(part, i, part.present(i));
    double loss = 0;
    for (int64_t r = 0; r < LANES; ++r) loss += each[r];
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
  INLINE V write_gradients(const Part& part, int64_t i, int64_t present) const {
    if (WHOLE) present = WHOLE;
    const Rows<VECTORS, ACROSS> rows(group, part);
    // Copies, because the compiler cannot know that no store changes the originals.
    const float *const scores = s, *const row = part.template block<VECTORS>(i, rest);
    float *const by_scores = gradient, *const q = codes;
    const int64_t others = ACROSS ? rest : 0;
    const float by_temperature = static_cast<float>(M_LOG2E / group.temperature);
    const auto score = [&](int64_t r, int j) ALWAYS_INLINE {
      // Beyond the last row comes that row again, with a weight of 0.
      return WHOLE ? load<V>(scores + (i + r) * rows.columns + j * LANES)
                   : rows.get(scores, i + std::min(r, present - 1), j);
    };
    const auto power = [&](V x) ALWAYS_INLINE { return exp2_in_range(S::maximum(x * by_temperature, V{} - 126.f)); };
    const V least = V{} - std::numeric_limits<float>::max();  // a code of 0 times -inf would be NaN
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
        const V x = S::maximum(score(r, j) - top[r], least), pj = power(x);
        const V qj = load<V>(row + (r * VECTORS + j) * LANES) * load<V>(v + j * LANES);  // 0 beyond the end of the row
        store(p + (r * VECTORS + j) * LANES, pj);
        z += rows.within(j, pj);
        qx += qj * x;
      }
      normaliser[r] = z, product[r] = qx;
    }
    V z = sums(normaliser), qx = sums(product);
    for (int64_t t = 0; t < others; ++t) {
      const V x = S::maximum(x_across[t] - tops, least);
      z += p_across[t] = power(x);
      q_across[t] = load<V>(row + across_at<VECTORS>(t)) * v[VECTORS * LANES + t];
      qx += q_across[t] * x;
    }
    const V w = row_weights(i, present), share = w * static_cast<float>(group.gradient_scale);
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
