// The linear form of Sinkhorn, for large matrices: E = exp(S / eps) is computed once, except for powers of two. Then
// only the scaling vectors u (rows) and v (columns) change. Each iteration reads E once, and threads share its chunks.
// SinkhornGroupSolver in sinkhorn_cpu_solver.h runs it.
#pragma once

#include "sinkhorn_cpu_scaling.h"

namespace proto_reg { namespace {

// A row of E that codes or gradient may overwrite. The last vector is read first, because the one before it overwrites
// a part of it.
template <class V>
struct Row {
  const float* e;
  V last;
  INLINE Row(const float* e_, int64_t columns)
      : e(e_), last(columns < LANES_OF<V> ? V{} : load<V>(e_ + columns - LANES_OF<V>)) {}
  INLINE V get(Full<V>, int64_t k) const { return load<V>(e + k); }
  INLINE V get(Last<V>, int64_t) const { return last; }
  INLINE V get(Short<V> part, int64_t k) const { return part.get(e + k); }
};

// Writes the codes q = u E_i diag(v) of the row of E at `e`. The row that lies AHEAD rows behind it is fetched.
template <class V, int AHEAD>
INLINE void write_codes(const float* e, int64_t columns, const float* v, float u, float* codes) {
  const Row<V> row(e, columns);
  for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
    __builtin_prefetch(e + AHEAD * columns + k);
    part.put(codes + k, row.get(part, k) * part.get(v + k) * u);
  });
}

// Writes the gradient, and the codes unless null, of the row with scores s and weight w / (tau W). Returns its loss.
// p: scratch for exp((S - maximum) / tau). apart: E lies under the codes; the gradient is elsewhere, and is streamed.
template <class S>
INLINE double cross_entropy(const float* s, const float* e, int64_t columns, const float* v, float u, float w,
                            double temperature, float* p, float* gradient, bool apart, float* codes) {
  using V = typename S::V;
  const float scale = static_cast<float>(M_LOG2E / temperature);
  V high[2] = {V{} - INFINITY, V{} - INFINITY}, normaliser[2] = {}, product[2] = {};
  for_each_vector<V>(columns, [&](auto part, int64_t k, auto slot) ALWAYS_INLINE {
    high[slot] = S::maximum(high[slot], part.get(s + k));
  });
  const float top = S::maximum(S::maximum(high[0], high[1]));
  const Row<V> row(e, columns);
  for_each_vector<V>(columns, [&](auto part, int64_t k, auto slot) ALWAYS_INLINE {
    const V x = S::maximum(part.get(s + k) - top, V{} - std::numeric_limits<float>::max());  // a code of 0 times -inf
    const V pk = exp2_in_range(S::maximum(x * scale, V{} - 126.f));
    part.put(p + k, pk);
    normaliser[slot] += part.once(pk);
    product[slot] += part.once(row.get(part, k) * part.get(v + k) * x);
  });
  const float z = sum(normaliser[0] + normaliser[1]), wz = w / z, wu = w * u;
  if (apart)
    for_each_aligned_vector<V>(gradient, columns, [&](auto part, int64_t k) ALWAYS_INLINE {
      __builtin_prefetch(s + columns + k);
      const V q = part.get(e + k) * part.get(v + k);
      part.stream_to(gradient + k, part.get(p + k) * wz - q * wu);
      part.put(codes + k, q * u);
    });
  else
    for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      __builtin_prefetch(s + columns + k);
      const V q = row.get(part, k) * part.get(v + k);
      part.put(gradient + k, part.get(p + k) * wz - q * wu);
      if (codes) part.put(codes + k, q * u);
    });
  return std::log(z) - sum(product[0] + product[1]) * u / static_cast<float>(temperature);
}

template <class S>
struct LinearSinkhorn : ChunkedScaling<S> {
  using V = typename S::V;
  using Base = ChunkedScaling<S>;
  using Base::group, Base::chunks, Base::e, Base::v, Base::losses, Base::exponential, Base::split, Base::absorbed;

  // Whether E is written past the caches: it is larger than they are, and its rows are so long that their ends, which
  // no aligned vector covers, cost nothing.
  const bool large = e && group.rows * group.columns >= 1 << 22 && group.columns >= 1024 &&
                     reinterpret_cast<uintptr_t>(e) % sizeof(float) == 0;

  float* chunk_scratch(int64_t chunk, int k) const { return Base::scratch + (3 * chunk + k) * chunks.padded; }

  INLINE const float* scores_of(int64_t i, int64_t chunk) const {
    return group.template row<V>(i, chunk_scratch(chunk, 0));
  }

  // The column maxima of a chunk's scores, over the rows that count.
  void column_tops(int64_t chunk) const {
    Base::maxima_of_columns(chunk, [&](int64_t i) { return scores_of(i, chunk); });
  }

  // Computes E of a chunk's rows, and the chunk's part of the first column sums.
  void exponentials(int64_t chunk) const {
    if (Base::has_failed()) return;
    std::fill_n(Base::sums_of(chunk), chunks.padded, 0.0f);
    V high = V{} - INFINITY;
    int64_t i = chunks.begin(chunk);
    if (!e)
      for (; i < chunks.end(chunk); ++i) {
        const float w[] = {group.weight(i)};
        const float* row = computed_rows<1>(i, chunk, [&](V score) ALWAYS_INLINE { high = S::maximum(score, high); });
        add_rows<1>(row, w, Base::sums_of(chunk));
      }
    else if (large)
      for (; i < chunks.end(chunk); ++i) streamed_exponentials_of(i, chunk, high);
    else if (group.dtype == Dtype::f32)
      for (; i + 4 <= chunks.end(chunk); i += 4) exponentials_of<4>(i, chunk, high);
    for (; i < chunks.end(chunk); ++i) exponentials_of<1>(i, chunk, high);
    Base::fail_unless(S::maximum(high) <= exponential.ceiling);
    if (large) streamed();
  }

  // Computes E of a chunk's rows, absorbed. first: also the chunk's part of the first column sums.
  void absorb(int64_t chunk, bool first) const {
    std::fill_n(Base::sums_of(chunk), chunks.padded, 0.0f);
    int64_t i = chunks.begin(chunk);
    if (group.dtype == Dtype::f32 && !large)
      for (; i + 4 <= chunks.end(chunk); i += 4) absorb_rows<4>(i, chunk, first);
    for (; i < chunks.end(chunk); ++i) absorb_rows<1>(i, chunk, first);
    if (large) streamed();
  }

  template <int R>
  INLINE void absorb_rows(int64_t i, int64_t chunk, bool first) const {
    float w[R];
    for (int r = 0; r < R; ++r) w[r] = first ? group.weight(i + r) : 0;
    float* rows = e ? e + i * group.columns : thread_scratch(R * group.columns);
    absorbed_rows<R>(scores_of(i, chunk), rows, w, Base::sums_of(chunk));
  }

  // Computes R rows of E with their maxima and the columns' shifts moved out, and adds w_i times these to c.
  template <int R>
  INLINE void absorbed_rows(const float* s, float* rows, const float (&w)[R], float* c) const {
    const float* const shifts = Base::shifts;  // copies, because a store might change the originals
    const Split<S> splitter = split;
    const int64_t columns = group.columns;
    V high[R];
    for (int r = 0; r < R; ++r) high[r] = V{} - DEAD;
    for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      const V shift = part.get(shifts + k);
      for (int r = 0; r < R; ++r)
        high[r] = S::maximum(part.get(s + r * columns + k) * splitter.scale + shift, high[r]);
    });
    float top[R], u[R];
    for (int r = 0; r < R; ++r) {
      top[r] = std::nearbyint(S::maximum(high[r]));
      Base::fail_unless(top[r] > -MOST_WHOLE);
      u[r] = w[r] > 0 && top[r] >= LEAST ? w[r] * std::exp2(top[r]) : 0;
    }
    const auto vectors = [&](auto part, int64_t k, const auto& put) ALWAYS_INLINE {
      const V shift = part.get(shifts + k);
      V total{};
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(s + (R + r) * columns + k);
        const V x = shifted_exponential(splitter, part.get(s + r * columns + k), shift - top[r]);
        put(rows + r * columns + k, x);
        total += x * u[r];
      }
      part.put(c + k, part.get(c + k) + part.once(total));
    };
    if (large && R == 1)
      for_each_aligned_vector<V>(rows, columns, [&](auto part, int64_t k) ALWAYS_INLINE {
        vectors(part, k, [&](float* to, V x) ALWAYS_INLINE { part.stream_to(to, x); });
      });
    else
      for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
        vectors(part, k, [&](float* to, V x) ALWAYS_INLINE {
          __builtin_prefetch(to + R * columns, 1);
          part.put(to, x);
        });
      });
  }

  // Of R rows from row i on. R is 1 if their scores need conversion.
  template <int R>
  INLINE void exponentials_of(int64_t i, int64_t chunk, V& highest) const {
    const Exponential<S> exp = exponential;
    const float* s = scores_of(i, chunk);
    float w[R];
    for (int r = 0; r < R; ++r) w[r] = group.weight(i + r);
    const int64_t columns = group.columns;  // a copy, because a store might change the original
    float *rows = e + i * columns, *c = Base::sums_of(chunk);
    V high = highest;
    for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      V total{};
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(s + (R + r) * columns + k);  // the next rows, and where they go
        __builtin_prefetch(rows + (R + r) * columns + k, 1);
        const V score = part.get(s + r * columns + k), x = exp(score);
        high = S::maximum(score, high);
        part.put(rows + r * columns + k, x);
        total += x * w[r];
      }
      part.put(c + k, part.get(c + k) + part.once(total));
    });
    highest = high;
  }

  // Of one row at a time, so that memory is read and written in order.
  INLINE void streamed_exponentials_of(int64_t i, int64_t chunk, V& highest) const {
    const Exponential<S> exp = exponential;
    const float* s = scores_of(i, chunk);
    const float w = group.weight(i);
    const int64_t columns = group.columns;
    float *row = e + i * columns, *c = Base::sums_of(chunk);
    V high = highest;
    for_each_aligned_vector<V>(row, columns, [&](auto part, int64_t k) ALWAYS_INLINE {
      __builtin_prefetch(s + columns + k);
      const V score = part.get(s + k), x = exp(score);
      high = S::maximum(score, high);
      part.stream_to(row + k, x);
      part.put(c + k, part.get(c + k) + part.once(x) * w);
    });
    highest = high;
  }

  // Computes R rows of E from row i on, in memory of this thread. Calls look(scores) for each vector.
  template <int R, class Look>
  INLINE const float* computed_rows(int64_t i, int64_t chunk, const Look& look) const {
    const Exponential<S> exp = exponential;
    const int64_t columns = group.columns;
    float* rows = thread_scratch(R * columns);
    for (int r = 0; r < R; ++r) {
      const float* s = scores_of(i + r, chunk);
      const float none[] = {0};
      if (absorbed) absorbed_rows<1>(s, rows + r * columns, none, Base::sums_of(chunk));
      else for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
        const V score = part.get(s + k);
        look(score);
        part.put(rows + r * columns + k, exp(score));
      });
    }
    return rows;
  }

  template <int R>
  INLINE const float* rows_from(int64_t i, int64_t chunk) const {
    return e ? e + i * group.columns : computed_rows<R>(i, chunk, [](V) ALWAYS_INLINE {});
  }

  // d = E v for R rows of E.
  template <int R>
  INLINE void row_sums(const float* rows, float (&d)[R]) const {
    const int64_t columns = group.columns;
    const float* scales = v;
    V sums[2][R] = {};
    for_each_vector<V>(columns, [&](auto part, int64_t k, auto slot) ALWAYS_INLINE {
      const V vk = part.once(part.get(scales + k));
      for (int r = 0; r < R; ++r) sums[slot][r] += part.get(rows + r * columns + k) * vk;
    });
    for (int r = 0; r < R; ++r) d[r] = sum(sums[0][r] + sums[1][r]);
  }

  // c += u_r E_r of R rows of E.
  template <int R>
  INLINE void add_rows(const float* rows, const float (&u)[R], float* c) const {
    const int64_t columns = group.columns;
    for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      V total{};
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(rows + (R + r) * columns + k);  // the next rows come while these are added
        total += part.get(rows + r * columns + k) * u[r];
      }
      part.put(c + k, part.get(c + k) + part.once(total));
    });
  }

  template <int R>
  INLINE void balance_rows(int64_t i, int64_t chunk, float& least) const {
    const float* rows = rows_from<R>(i, chunk);
    float u[R];
    row_sums<R>(rows, u);
    for (int r = 0; r < R; ++r) {
      least = std::min(least, u[r]);
      u[r] = group.weight(i + r) / u[r];
    }
    add_rows<R>(rows, u, Base::sums_of(chunk));
  }

  // One iteration: the column sums of diag(u) E with u_i = w_i / (E v)_i.
  void balance(int64_t chunk) const {
    if (Base::has_failed()) return;
    std::fill_n(Base::sums_of(chunk), chunks.padded, 0.0f);
    float least = INFINITY;
    int64_t i = chunks.begin(chunk);
    for (; i + 4 <= chunks.end(chunk); i += 4) balance_rows<4>(i, chunk, least);
    for (; i < chunks.end(chunk); ++i) balance_rows<1>(i, chunk, least);
    Base::check_rows(1 / least);
  }

  void write(int64_t chunk) const {
    losses[chunk] = 0;
    int64_t i = chunks.begin(chunk);
    for (; i + 4 <= chunks.end(chunk); i += 4) write_rows<4>(i, chunk);
    for (; i < chunks.end(chunk); ++i) write_rows<1>(i, chunk);
    if (large) streamed();
  }

  template <int R>
  INLINE void write_rows(int64_t i, int64_t chunk) const {
    float* rows = const_cast<float*>(rows_from<R>(i, chunk));  // E is not needed afterwards
    float d[R];
    row_sums<R>(rows, d);
    for (int r = 0; r < R; ++r) losses[chunk] += write_row<R>(i + r, chunk, rows + r * group.columns, 1 / d[r]);
  }

  // Writes codes and gradient of row i, whose E is at `row`. Returns its weighted loss. R rows are written in turn.
  template <int R>
  INLINE double write_row(int64_t i, int64_t chunk, float* row, float u) const {
    float* codes = group.output(group.codes, i, row);
    double weighted_loss = 0;
    if (!group.gradient) {
      write_codes<V, R>(row, group.columns, v, u, codes);
    } else {
      float* gradient = group.output(group.gradient, i, chunk_scratch(chunk, 2));
      const float w = static_cast<float>(group.weight(i) * group.gradient_scale);
      const float* s = scores_of(i, chunk);
      const bool apart = large && group.codes;
      weighted_loss = group.weight(i) * cross_entropy<S>(s, row, group.columns, v, u, w, group.temperature,
                                                      chunk_scratch(chunk, 1), gradient, apart, codes);
      group.finish(gradient, group.gradient, i);
    }
    group.finish(codes, group.codes, i);
    return weighted_loss;
  }
};

}}  // namespace proto_reg
