// What the fast paths for small and for large problems do alike, row by row. Included once per instruction set.

// Natural logarithms: cosines at epsilon = .05 span 40. u, v and their products stay within float32's 87, and what
// rounding makes of the exponents within 1e-6 of a code.
constexpr double RANGE = 40.5;

// With fused multiplications S / eps is split into integer and fraction at once; that holds for integers of 22 bits.
#if defined(__aarch64__)
constexpr bool FUSED = true;
#else
constexpr bool FUSED = MACHINE_LANES >= 8;
#endif
constexpr double LARGEST = 1 << 21;

// Lowest and highest of the scores seen. A NaN may be lost here: it shows in the first column sums.
struct Extrema {
  float lowest = INFINITY, highest = -INFINITY;

  INLINE void add(const Extrema& other) {
    lowest = std::min(lowest, other.lowest);
    highest = std::max(highest, other.highest);
  }

  // NaN and infinities fail, too.
  bool safe(double epsilon) const {
    const double difference = static_cast<double>(highest) - lowest;
    const double largest = std::max(std::abs(highest), std::abs(lowest));
    return difference / epsilon < RANGE && difference < std::numeric_limits<float>::max() &&
           (!FUSED || largest / epsilon < LARGEST);
  }
};

// Scores to E = exp((S - origin) / eps), up to a factor that all of E has in common.
struct Exponential {
  double epsilon;
  float scale, from;
  int32_t whole = 0;         // from * scale, rounded
  float step, step_low = 0;  // epsilon * ln 2, in two parts: a small integer times the first is exact

  Exponential(float from_, double epsilon_)
      : epsilon(epsilon_), scale(static_cast<float>(M_LOG2E / epsilon_)), from(from_) {
    if (FUSED && std::abs(from / epsilon) < LARGEST) whole = static_cast<int32_t>(std::lrint(from * scale));
    const float rounded = static_cast<float>(epsilon * M_LN2);
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits &= 0xffffff00;
    std::memcpy(&step, &bits, sizeof bits);
    step_low = static_cast<float>(epsilon * M_LN2 - step);
  }

  // In units of S / eps.
  double origin() const { return from / epsilon - (FUSED ? (static_cast<double>(from) * scale - whole) * M_LN2 : 0); }

  INLINE V operator()(V s) const {
    if constexpr (FUSED) {
      // A product that is not rounded: only its fraction is, which is small.
      const V shifted = s * scale + MAGIC;
      return exp2_of_fraction(s * scale - (shifted - MAGIC)) * power_of_two<V, U>(shifted, whole);
    }
    const V difference = s - from, shifted = difference * scale + MAGIC, n = shifted - MAGIC;
    return exp2_of_fraction((difference - n * step - n * step_low) * scale) * power_of_two<V, U>(shifted);
  }
};

inline Extrema joined(const Extrema* parts, int64_t count) {
  Extrema all;
  for (int64_t part = 0; part < count; ++part) all.add(parts[part]);
  return all;
}

// The row's maximum; `low` becomes the lower of itself and the row, lane by lane.
INLINE float row_maximum(const float* s, int64_t columns, V& low) {
  V high[2] = {V{} - INFINITY, V{} - INFINITY}, lows[2] = {low, low};
  for_each_vector(columns, [&](auto part, int64_t k, auto slot) ALWAYS_INLINE {
    const V x = part.get(s + k);
    lows[slot] = minimum(lows[slot], x);
    high[slot] = maximum(high[slot], x);
  });
  low = minimum(lows[0], lows[1]);
  return maximum(maximum(high[0], high[1]));
}

// Whether no NaN reached these column sums, which are >= 0.
inline bool all_finite(const float* sums, int64_t count) {
  float total = 0;
  for (int64_t k = 0; k < count; ++k) total += sums[k];
  return total < INFINITY;
}

// v_k = W r_k / c_k (first: W = 1); false, leaving v, where tol >= 0 and every column was within it before.
inline bool update_scaling(const Group& group, const float* c, bool first, double tol, float* v) {
  const double total = first ? 1 : group.total_weight;
  if (tol >= 0 && !first) {
    double worst = 0;
    for (int64_t k = 0; k < group.columns; ++k)
      if (group.marginal(k) > 0) worst = std::max(worst, std::abs(v[k] * c[k] / (total * group.marginal(k)) - 1));
    if (worst <= tol) return false;
  }
  if (group.marginals)
    for (int64_t k = 0; k < group.columns; ++k) v[k] = static_cast<float>(total * group.marginal(k)) / c[k];
  else
    for (int64_t k = 0; k < group.columns; ++k) v[k] = static_cast<float>(total / group.columns) / c[k];
  return true;
}

// g = log v, counted from the `origin` of the scores in units of S / eps.
inline void write_logarithms(const float* v, int64_t columns, double origin, float* potentials) {
  const double largest = std::numeric_limits<float>::max();
  const float shift = static_cast<float>(std::clamp(origin, -largest, largest));
  for_each_vector(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
    const V x = part.get(v + k);
    V g = logarithm(x);
    if (minimum(x) < std::numeric_limits<float>::min())  // a marginal of 0, or nearly
      for (int lane = 0; lane < LANES; ++lane) g[lane] = std::log(x[lane]);
    part.put(potentials + k, g - shift);
  });
}

// A row of E that codes or gradient may overwrite: the last vector, part of which the one before it overwrites, is read
// beforehand.
struct Row {
  const float* e;
  V last;
  INLINE Row(const float* e_, int64_t columns) : e(e_), last(columns < LANES ? V{} : load(e_ + columns - LANES)) {}
  INLINE V get(Full, int64_t k) const { return load(e + k); }
  INLINE V get(Last, int64_t) const { return last; }
  INLINE V get(Short part, int64_t k) const { return part.get(e + k); }
};

// Codes q = u E_i diag(v) of the row of E at `e`; the row AHEAD rows after it is wanted soon.
template <int AHEAD>
INLINE void write_codes(const float* e, int64_t columns, const float* v, float u, float* codes) {
  const Row row(e, columns);
  for_each_vector(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
    __builtin_prefetch(e + AHEAD * columns + k);
    part.put(codes + k, row.get(part, k) * part.get(v + k) * u);
  });
}

// Gradient, and codes unless null, of the row with scores s, weight w / (tau W); returns its loss. p: scratch for
// exp((S - maximum) / tau). apart: E lies under the codes, not under the gradient, which is streamed.
INLINE double cross_entropy(const float* s, const float* e, int64_t columns, const float* v, float u, float w,
                            double temperature, float* p, float* gradient, bool apart, float* codes) {
  const float scale = static_cast<float>(M_LOG2E / temperature);
  V high[2] = {V{} - INFINITY, V{} - INFINITY}, normaliser[2] = {}, product[2] = {};
  for_each_vector(columns, [&](auto part, int64_t k, auto slot) ALWAYS_INLINE {
    high[slot] = maximum(high[slot], part.get(s + k));
  });
  const float top = maximum(maximum(high[0], high[1]));
  const Row row(e, columns);
  for_each_vector(columns, [&](auto part, int64_t k, auto slot) ALWAYS_INLINE {
    const V x = part.get(s + k) - top;
    const V pk = exp2_in_range(maximum(x * scale, V{} - 126.f));
    part.put(p + k, pk);
    normaliser[slot] += part.once(pk);
    product[slot] += part.once(row.get(part, k) * part.get(v + k) * x);
  });
  const float z = sum(normaliser[0] + normaliser[1]), wz = w / z, wu = w * u;
  if (apart)
    for_each_aligned_vector(gradient, columns, [&](auto part, int64_t k) ALWAYS_INLINE {
      __builtin_prefetch(s + columns + k);
      const V q = part.get(e + k) * part.get(v + k);
      part.stream_to(gradient + k, part.get(p + k) * wz - q * wu);
      part.put(codes + k, q * u);
    });
  else
    for_each_vector(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      __builtin_prefetch(s + columns + k);
      const V q = row.get(part, k) * part.get(v + k);
      part.put(gradient + k, part.get(p + k) * wz - q * wu);
      if (codes) part.put(codes + k, q * u);
    });
  return std::log(z) - sum(product[0] + product[1]) * u / static_cast<float>(temperature);
}
