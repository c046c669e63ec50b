// The fast path for a matrix that stays in the nearest caches: one reference for all of it, E in rows of whole vectors, and
// one pass over E per iteration, as many rows at a time as a vector has lanes. Included once per instruction set.

// Lane l of the result: all lanes of x[l], put together by `join`, such as their sum.
template <int32_t DISTANCE = LANES / 2, class Join>
INLINE V joined_lanes(V (&x)[LANES], const Join& join) {
  const I upper = (lane_numbers() & DISTANCE) != 0;
#pragma GCC unroll 8
  for (int32_t i = 0; i < DISTANCE; ++i) {
    const V a = x[i], b = x[i + DISTANCE];
    x[i] = join(upper ? b : a, swapped(upper ? a : b, DISTANCE));
  }
  if constexpr (DISTANCE > 1) return joined_lanes<DISTANCE / 2>(x, join);
  return x[0];
}

INLINE V sums(V (&x)[LANES]) {
  return joined_lanes(x, [](V a, V b) ALWAYS_INLINE { return a + b; });
}

INLINE V maxima(V (&x)[LANES]) {
  return joined_lanes(x, [](V a, V b) ALWAYS_INLINE { return maximum(a, b); });
}

struct Small {
  static constexpr int64_t MOST_VECTORS = 8, MOST_COLUMNS = MOST_VECTORS * LANES;

  const Group& group;
  const float* s;   // (rows, columns) scores
  float* e;         // (rows, columns) exp((S - origin) / eps), both rounded up to whole vectors
  float* v;         // (columns rounded up,)
  float* c;         // (columns rounded up,) column sums
  float* codes;     // (rows, columns), or null; may lie over e
  float* gradient;  // (rows, columns), or null
  const Exponential exponential{group.first(), group.epsilon};

  static int64_t rounded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

  // E and the first v; false where the scores' range is not safe or they hold a NaN or an infinity.
  bool exponentials() const {
    std::fill_n(v, rounded(group.columns), 0.0f);
    Extrema range;
    with_vectors([&](auto vectors) ALWAYS_INLINE { range = exponentials_of<vectors()>(); });
    return range.safe(group.epsilon) && all_finite(c, group.columns) && update_scaling(group, c, true, -1, v);
  }

  // One iteration; false, leaving v, where all columns were within tol.
  bool balance(double tol) const {
    with_vectors([&](auto vectors) ALWAYS_INLINE { balance_rows<vectors()>(); });
    return update_scaling(group, c, false, tol, v);
  }

  void write_potentials(float* potentials) const {
    write_logarithms(v, group.columns, exponential.origin(), potentials);
  }

  // Codes, gradient; returns the sum of the rows' losses.
  double write() const {
    double loss = 0;
    with_vectors([&](auto vectors) ALWAYS_INLINE {
      if (gradient) loss = write_gradient<vectors()>();
      else write_codes<vectors()>();
    });
    return loss;
  }

 private:
  // body with the number of vectors of a row as a constant.
  template <class Body>
  INLINE void with_vectors(const Body& body) const {
    switch ((group.columns + LANES - 1) / LANES) {
      case 1: return body(std::integral_constant<int, 1>{});
      case 2: return body(std::integral_constant<int, 2>{});
      case 3: return body(std::integral_constant<int, 3>{});
      case 4: return body(std::integral_constant<int, 4>{});
      case 5: return body(std::integral_constant<int, 5>{});
      case 6: return body(std::integral_constant<int, 6>{});
      case 7: return body(std::integral_constant<int, 7>{});
      default: return body(std::integral_constant<int, 8>{});
    }
  }

  // Rows of a matrix without padding. A row's last vector reaches into the next row, but not past the end of them all.
  template <int VECTORS>
  struct Rows {
    int64_t columns, count;
    explicit INLINE Rows(const Group& group) : columns(group.columns), count(group.rows * group.columns) {}

    INLINE V get(const float* from, int64_t i, int j) const {
      const int64_t at = i * columns + j * LANES;
      if (j < VECTORS - 1 || at + LANES <= count) return load(from + at);
      return Short{count - at}.get(from + at);
    }
    // What reaches too far is overwritten by the row after this one: rows are put in their order.
    INLINE void put(float* to, int64_t i, int j, V x) const {
      const int64_t at = i * columns + j * LANES;
      if (j < VECTORS - 1 || at + LANES <= count) return store(to + at, x);
      Short{count - at}.put(to + at, x);
    }
    // x, and `other` where vector j is past the end of a row.
    INLINE V within(int j, V x, V other = V{}) const {
      return j < VECTORS - 1 || lane_numbers() < static_cast<int32_t>(columns - j * LANES) ? x : other;
    }
  };

  // E, and its column sums by the rows' weights; what range the scores have.
  template <int VECTORS>
  Extrema exponentials_of() const {
    return group.weights ? exponentials_of<VECTORS, true>() : exponentials_of<VECTORS, false>();
  }

  template <int VECTORS, bool WEIGHTED>
  Extrema exponentials_of() const {
    // Copies: the compiler cannot know that no store changes the originals.
    const Rows<VECTORS> rows(group);
    const Exponential exp = exponential;
    const float *const scores = s, *const weights = group.weights;
    const int64_t count = group.rows;
    V total[VECTORS] = {}, low = V{} + group.first(), high = low;
    float* to = e;
    for (int64_t i = 0; i < count; ++i, to += VECTORS * LANES) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) {
        const V score = rows.get(scores, i, j), x = rows.within(j, exp(score));
        low = minimum(low, score);
        high = maximum(high, score);
        store(to + j * LANES, x);
        total[j] += WEIGHTED ? x * weights[i] : x;
      }
    }
    std::fill_n(to, (rounded(count) - count) * VECTORS * LANES, 0.0f);
    for (int j = 0; j < VECTORS; ++j) store(c + j * LANES, total[j]);
    return {minimum(low), maximum(high)};
  }

  // u_i = 1 / (E v)_i of LANES rows, the first of them at `row`.
  template <int VECTORS>
  INLINE V row_scales(const float* row) const {
    V d[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) {
      d[r] = load(row + r * VECTORS * LANES) * load(v);
#pragma GCC unroll 8
      for (int j = 1; j < VECTORS; ++j) d[r] += load(row + (r * VECTORS + j) * LANES) * load(v + j * LANES);
    }
    return 1 / sums(d);
  }

  // Weights of LANES rows from row i on, 0 past the last.
  INLINE V row_weights(int64_t i) const {
    const int64_t present = std::min(LANES, group.rows - i);
    V w = V{} + 1.f;
    if (group.weights) __builtin_memcpy(&w, group.weights + i, sizeof(float) * present);
    return lane_numbers() < static_cast<int32_t>(present) ? w : V{};
  }

  // c_k = sum_i w_i u_i E_ik.
  template <int VECTORS>
  void balance_rows() const {
    // Some rows side by side: a sum's next addition waits for its last.
    constexpr int ROWS = VECTORS <= 1 ? 4 : VECTORS <= 3 ? 2 : 1;
    V total[ROWS][VECTORS] = {};
    const float* row = e;
    for (int64_t i = 0; i < group.rows; i += LANES) {
      const V scales = row_scales<VECTORS>(row), w = row_weights(i);
      alignas(V) float u[LANES];
      store(u, w > 0 ? scales * w : V{});
      asm("" : "+r"(row));  // or the compiler carries the rows over from row_scales, by way of the stack
      for (int r = 0; r < LANES; ++r, row += VECTORS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) total[r % ROWS][j] += load(row + j * LANES) * u[r];
    }
    for (int j = 0; j < VECTORS; ++j) {
      for (int r = 1; r < ROWS; ++r) total[0][j] += total[r][j];
      store(c + j * LANES, total[0][j]);
    }
  }

  template <int VECTORS>
  void write_codes() const {
    const Rows<VECTORS> rows(group);
    float* const to = codes;
    const int64_t count = group.rows;
    V by_column[VECTORS];
    for (int j = 0; j < VECTORS; ++j) by_column[j] = load(v + j * LANES);
    const float* row = e;
    for (int64_t i = 0; i < count;) {
      alignas(V) float u[LANES];
      store(u, row_scales<VECTORS>(row));
      asm("" : "+r"(row));
      for (int r = 0; r < LANES && i < count; ++r, ++i, row += VECTORS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) rows.put(to, i, j, load(row + j * LANES) * by_column[j] * u[r]);
    }
  }

  // Gradient, and codes unless null; returns the sum of the rows' losses: log z - q . (S - row maximum) / tau.
  template <int VECTORS>
  double write_gradient() const {
    V losses{};
    int64_t i = 0;
    for (; i + LANES < group.rows; i += LANES) losses += write_gradients<VECTORS, LANES>(i, LANES);
    losses += write_gradients<VECTORS, 0>(i, group.rows - i);
    double loss = 0;
    for (int64_t r = 0; r < LANES; ++r) loss += losses[r];
    return loss;
  }

  // Of LANES rows from row i on, or where WHOLE is 0 of the last ones, `present` of them. Returns their losses.
  template <int VECTORS, int64_t WHOLE>
  INLINE V write_gradients(int64_t i, int64_t present) const {
    if (WHOLE) present = WHOLE;
    const Rows<VECTORS> rows(group);
    // Copies: the compiler cannot know that no store changes the originals.
    const float *const scores = s, *const row = e + i * VECTORS * LANES;
    float *const by_scores = gradient, *const q = codes;
    const float by_temperature = static_cast<float>(M_LOG2E / group.temperature);
    const V w = row_weights(i), share = w * static_cast<float>(group.gradient_scale);
    const auto score = [&](int64_t r, int j) ALWAYS_INLINE {
      // Beyond the last row that row again, with a weight of 0.
      return WHOLE ? load(scores + (i + r) * rows.columns + j * LANES)
                   : rows.get(scores, i + std::min(r, present - 1), j);
    };
    const auto put = [&](float* to, int64_t r, int j, V x) ALWAYS_INLINE {
      if (WHOLE) store(to + (i + r) * rows.columns + j * LANES, x);
      else rows.put(to, i + r, j, x);
    };
    alignas(V) float top[LANES], by_p[LANES], by_q[LANES], u[LANES];
    alignas(V) float p[LANES * VECTORS * LANES];  // exp((S - row maximum) / tau)
    V high[LANES], normaliser[LANES], product[LANES];
#pragma GCC unroll 16
    for (int64_t r = 0; r < LANES; ++r) {
      high[r] = rows.within(0, score(r, 0), V{} - INFINITY);
#pragma GCC unroll 8
      for (int j = 1; j < VECTORS; ++j) high[r] = maximum(high[r], rows.within(j, score(r, j), V{} - INFINITY));
    }
    store(top, maxima(high));
#pragma GCC unroll 4
    for (int64_t r = 0; r < LANES; ++r) {
      V z{}, qx{};
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) {
        const V x = score(r, j) - top[r], pj = exp2_in_range(maximum(x * by_temperature, V{} - 126.f));
        const V qj = load(row + (r * VECTORS + j) * LANES) * load(v + j * LANES);  // beyond a row's end 0
        store(p + (r * VECTORS + j) * LANES, pj);
        z += rows.within(j, pj);
        qx += qj * x;
      }
      normaliser[r] = z, product[r] = qx;
    }
    const V z = sums(normaliser), all = row_scales<VECTORS>(row);
    const V scales = lane_numbers() < static_cast<int32_t>(present) ? all : V{};
    store(by_p, share / z);
    store(by_q, share * scales);
    store(u, scales);
#pragma GCC unroll 4
    for (int64_t r = 0; r < present; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) {
        const V qj = load(row + (r * VECTORS + j) * LANES) * load(v + j * LANES);
        put(by_scores, r, j, load(p + (r * VECTORS + j) * LANES) * by_p[r] - qj * by_q[r]);
        if (q) put(q, r, j, qj * u[r]);
      }
    }
    return w * (logarithm(z) - sums(product) * scales * static_cast<float>(1 / group.temperature));
  }
};
