// The fast path: E = exp((S - row maximum) / eps) once, then only the scaling vectors u (rows) and v (columns) change, one
// pass over E per iteration. Right while (max S - min S) / eps stays below RANGE; `safe` says so, having looked.
// Included once per instruction set by sinkhorn_cpu_isa.h.

struct Linear {
  using Range = Extrema;

  const Group& group;
  const Chunks& chunks;
  float* e;          // (rows, columns); float32 codes, or gradient, may lie over it
  float* v;          // (padded columns,)
  float* partial;    // (chunks, padded columns): column sums
  Extrema* extrema;  // (chunks,)
  float* scratch;    // (chunks, 3, padded columns)
  double* losses;    // (chunks,)

  float* chunk_scratch(int64_t chunk, int64_t which) const { return scratch + (3 * chunk + which) * chunks.padded; }

  // The first row's maximum, from where potentials are counted.
  float origin() const {
    Extrema first;
    first.add(group.row(0, chunk_scratch(0, 0)), group.columns);
    return first.highest;
  }

  // E of a chunk's rows with their maxima as references, and its share of the first column sums: there the rows weigh
  // u_i = exp((maximum_i - origin) / eps), so that every row has the same reference after all.
  void exponentials(int64_t chunk, float from) const {
    const float scale = static_cast<float>(M_LOG2E / group.epsilon);
    float* c = partial + chunk * chunks.padded;
    std::fill_n(c, chunks.padded, 0.0f);
    Extrema all;
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const float* s = group.row(i, chunk_scratch(chunk, 0));
      Extrema of_row;
      of_row.add(s, group.columns);
      all.add(of_row);
      const float top = of_row.highest, shift = std::min(std::max((top - from) * scale, -126.f), 126.f);
      const float u = group.weight(i) * exp2_in_range<float, int32_t>(shift);
      float* row = e + i * group.columns;
      for_each_vector(group.columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
        const V x = exp2_in_range((part.get(s + k) - top) * scale);
        part.put(row + k, x);
        part.put(c + k, part.get(c + k) + part.once(x) * u);
      });
    }
    extrema[chunk] = all;
  }

  // Whether what `exponentials` saw stays within RANGE and holds no NaN and no infinity.
  bool safe() const {
    Extrema all;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) all.add(extrema[chunk]);
    return all.safe(group.epsilon) && all_finite(partial, chunks.count * chunks.padded);
  }

  // Row sums of E diag(v), R rows from i on.
  template <int R>
  INLINE void row_sums(int64_t i, float (&d)[R]) const {
    V sums[2][R] = {};
    for_each_vector(group.columns, [&](auto part, int64_t k, auto slot) ALWAYS_INLINE {
      const V vk = part.once(part.get(v + k));
      for (int r = 0; r < R; ++r) sums[slot][r] += part.get(e + (i + r) * group.columns + k) * vk;
    });
    for (int r = 0; r < R; ++r) d[r] = sum(sums[0][r] + sums[1][r]);
  }

  template <int R>
  INLINE void balance_rows(int64_t i, float* c) const {
    float u[R];
    row_sums<R>(i, u);
    for (int r = 0; r < R; ++r) u[r] = group.weight(i + r) / u[r];
    for_each_vector(group.columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      V total{};
      for (int r = 0; r < R; ++r) total += part.get(e + (i + r) * group.columns + k) * u[r];
      part.put(c + k, part.get(c + k) + part.once(total));
    });
  }

  // One iteration's column sums of diag(u) E, u_i = w_i / (E v)_i.
  void balance(int64_t chunk) const {
    float* c = partial + chunk * chunks.padded;
    std::fill_n(c, chunks.padded, 0.0f);
    int64_t i = chunks.begin(chunk);
    for (; i + 4 <= chunks.end(chunk); i += 4) balance_rows<4>(i, c);
    for (; i < chunks.end(chunk); ++i) balance_rows<1>(i, c);
  }

  // v from the chunks' column sums; false, leaving v, where all columns were within tol before.
  bool update(bool first, double tol) const {
    for (int64_t k = 0; k < group.columns; ++k) {
      double column = 0;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) column += partial[chunk * chunks.padded + k];
      scratch[k] = static_cast<float>(column);
    }
    return update_scaling(group, scratch, first, tol, v);
  }

  void write_potentials(float* potentials, float from) const {
    write_logarithms(v, group.columns, from / group.epsilon, potentials);
  }

  void write(int64_t chunk) const {
    losses[chunk] = 0;
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      float d[1];
      row_sums<1>(i, d);
      const AnyRow each{group.columns};
      float* row = e + i * group.columns;
      float* codes = group.output(group.codes, i, row);  // E is not needed any more
      if (!group.gradient) {
        write_codes(row, v, 1 / d[0], codes, each);
      } else {
        float* gradient = group.output(group.gradient, i, chunk_scratch(chunk, 2));
        const float w = static_cast<float>(group.weight(i) * group.gradient_scale);
        const RowLoss loss = cross_entropy(group.row(i, chunk_scratch(chunk, 0)), row, v, 1 / d[0], w,
                                           group.temperature, chunk_scratch(chunk, 1), gradient, codes, each);
        losses[chunk] += group.weight(i) * (std::log(loss.z) - loss.product);
        group.finish(gradient, group.gradient, i);
      }
      group.finish(codes, group.codes, i);
    }
  }
};
