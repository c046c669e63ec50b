// The fast path for a matrix of eight columns or more that stays in the first-level cache: one reference for all of it,
// eight rows at a time, the column sums in registers. Included once per instruction set.

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// The sums of eight vectors, as one vector.
INLINE V sums(const V (&x)[8]) {
  V pair[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const V &a = x[2 * i], &b = x[2 * i + 1];
    pair[i] = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const V &a = pair[2 * i], &b = pair[2 * i + 1];
    four[i] = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  const V &a = four[0], &b = four[1];
  return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
#undef SHUFFLE

struct Small {
  static constexpr int64_t MOST_COLUMNS = 8 * LANES;

  const Group& group;
  const float* s;   // (rows, columns) scores
  float* e;         // (rows, columns) exp((S - highest) / eps)
  float* u;         // (rows + 8,)
  float* z;         // (rows + 8,) normalisers of the cross-entropy
  float* v;         // (padded columns,)
  float* c;         // (padded columns,) column sums
  float* scratch;   // (padded columns,)
  float* codes;     // (rows, columns), or null
  float* gradient;  // (rows, columns), or null
  machine::Extrema extrema{};

  // E and the first v; false where the scores' range is not safe or they hold a NaN or an infinity.
  bool exponentials() {
    const int64_t count = group.rows * group.columns;
    extrema.add(s, count);
    if (!extrema.safe(group.epsilon)) return false;
    const float scale = static_cast<float>(M_LOG2E / group.epsilon), top = extrema.highest;
    machine::exponentials(s, count, top, scale, e);
    for (int64_t i = 0; i < group.rows; ++i) u[i] = group.weight(i);
    column_sums();
    return all_finite(c, group.columns) && update_scaling(group, c, true, -1, v);
  }

  // One iteration; false, leaving v, where all columns were within tol.
  bool balance(double tol) const {
    row_scales();
    if (group.weights)
      for (int64_t i = 0; i < group.rows; ++i) u[i] *= group.weights[i];
    column_sums();
    return update_scaling(group, c, false, tol, v);
  }

  void write_potentials(float* potentials) const {
    write_logarithms(v, group.columns, extrema.highest / group.epsilon, potentials);
  }

  // Codes, gradient; returns the sum of the rows' losses.
  double write() const {
    row_scales();
    double loss = 0;
    with_vectors([&](auto vectors) ALWAYS_INLINE { loss = write_rows(ShortRow<vectors()>{group.columns}); });
    if (!gradient) return 0;
    for (int64_t i = 0; i < group.rows; i += LANES) {
      const V logs = logarithm(load(z + i));
      for (int64_t lane = 0; lane < std::min(LANES, group.rows - i); ++lane) loss += group.weight(i + lane) * logs[lane];
    }
    return loss;
  }

 private:
  // u_i = 1 / (E v)_i.
  void row_scales() const {
    with_vectors([&](auto vectors) ALWAYS_INLINE {
      const ShortRow<vectors()> each{group.columns};
      for (int64_t i = 0; i + 8 <= group.rows; i += 8) scale_eight_rows(i, each);
      if (group.rows >= 8 && group.rows % 8) scale_eight_rows(group.rows - 8, each);
      for (int64_t i = 0; group.rows < 8 && i < group.rows; ++i) {
        V d{};
        each([&](auto part, int64_t k, auto) ALWAYS_INLINE {
          d += part.once(part.get(v + k) * part.get(e + i * group.columns + k));
        });
        u[i] = 1 / sum(d);
      }
    });
  }

  // c_k = sum_i u_i E_ik.
  void column_sums() const {
    with_vectors([&](auto vectors) ALWAYS_INLINE { add_rows<vectors()>(); });
  }

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

  // As AnyRow, unrolled: body(part, column, vector) for each vector of a row of VECTORS.
  template <int VECTORS>
  struct ShortRow {
    int64_t columns;
    template <class Body>
    INLINE void operator()(const Body& body) const {
      constexpr std::integral_constant<int, VECTORS - 1> last;
      run(body, std::make_integer_sequence<int, VECTORS - 1>{});
      body(Last(columns), columns - LANES, last);
    }
    template <class Body, int... VECTOR>
    static INLINE void run(const Body& body, std::integer_sequence<int, VECTOR...>) {
      (body(Full{}, VECTOR * LANES, std::integral_constant<int, VECTOR>{}), ...);
    }
  };

  // What remains of the losses is the logarithm of z.
  template <class Each>
  double write_rows(const Each& each) const {
    double loss = 0;
    for (int64_t i = 0, at = 0; i < group.rows; ++i, at += group.columns) {
      if (!gradient) {
        write_codes(e + at, v, u[i], codes + at, each);
        continue;
      }
      const float w = static_cast<float>(group.weight(i) * group.gradient_scale);
      const RowLoss row = cross_entropy(s + at, e + at, v, u[i], w, group.temperature, scratch, gradient + at,
                                        codes ? codes + at : nullptr, each);
      z[i] = row.z;
      loss -= group.weight(i) * row.product;
    }
    return loss;
  }

  template <class Each>
  INLINE void scale_eight_rows(int64_t i, const Each& each) const {
    const int64_t columns = group.columns;  // a copy: the compiler cannot know that no store changes the original
    const float *rows = e + i * columns, *scales = v;
    V d[8] = {};
    each([&](auto part, int64_t k, auto) ALWAYS_INLINE {
      const V vk = part.once(part.get(scales + k));
      for (int r = 0; r < 8; ++r) d[r] += part.get(rows + r * columns + k) * vk;
    });
    store(u + i, 1 / sums(d));
  }

  template <int VECTORS>
  void add_rows() const {
    // As many rows side by side as registers allow: a sum's next addition waits for its last.
    constexpr int ROWS = VECTORS <= 2 ? 4 : 2;
    const ShortRow<VECTORS> each{group.columns};
    const int64_t rows = group.rows, columns = group.columns;
    const float *row = e, *scales = u;
    V total[ROWS][VECTORS] = {};
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS, row += ROWS * columns) {
      for (int r = 0; r < ROWS; ++r) {
        each([&](auto part, int64_t k, auto j) ALWAYS_INLINE {
          total[r][j] += part.get(row + r * columns + k) * scales[i + r];
        });
      }
    }
    for (; i < rows; ++i, row += columns) {
      each([&](auto part, int64_t k, auto j) ALWAYS_INLINE { total[0][j] += part.get(row + k) * scales[i]; });
    }
    each([&](auto part, int64_t k, auto j) ALWAYS_INLINE {
      for (int r = 1; r < ROWS; ++r) total[0][j] += total[r][j];
      part.put(c + k, total[0][j]);  // columns that the last vector repeats come out the same
    });
  }
};
