// What the forms that scale a matrix E (small, linear, narrow) have in common: exponentials of scores, the check
// whether their range allows them, and the update of the scaling vector v.
#pragma once

#include "sinkhorn_cpu_group.h"

namespace proto_reg { namespace {

// The largest exponent, base e: cosines at epsilon = .05 span 40. Then u, v and their products stay within float32's
// 87, and rounding of the exponents changes a code by less than 1e-6.
constexpr double RANGE = 40.5;

// The largest S / eps with fused multiplications, which split it into an integer of 22 bits and a fraction at once.
constexpr double LARGEST = 1 << 21;

// Lowest and highest of the scores. A NaN may be lost here; it shows in the first column sums.
struct Extrema {
  float lowest = INFINITY, highest = -INFINITY;

  INLINE void add(const Extrema& other) {
    lowest = std::min(lowest, other.lowest);
    highest = std::max(highest, other.highest);
  }
};

// From scores to E = exp((S - origin) / eps), except for a factor that is the same for all of E.
template <class S>
struct Exponential {
  using V = typename S::V;
  static constexpr bool FUSED = S::FUSED;

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

  // Whether scores with these extrema keep to RANGE. NaN and infinities do not.
  bool safe(const Extrema& scores) const {
    const double difference = static_cast<double>(scores.highest) - scores.lowest;
    const double largest = std::max(std::abs(scores.highest), std::abs(scores.lowest));
    return difference / epsilon < RANGE && difference < std::numeric_limits<float>::max() &&
           (!FUSED || largest / epsilon < LARGEST);
  }

  INLINE V operator()(V s) const {
    if constexpr (FUSED) {
      // The product is not rounded, only its fraction is, which is small.
      const V shifted = s * scale + MAGIC;
      return exp2_of_fraction(s * scale - (shifted - MAGIC)) * power_of_two(shifted, whole);
    }
    const V difference = s - from, shifted = difference * scale + MAGIC, n = shifted - MAGIC;
    return exp2_of_fraction((difference - n * step - n * step_low) * scale) * power_of_two(shifted);
  }
};

// Whether these column sums, which are >= 0, hold no NaN.
inline bool all_finite(const float* sums, int64_t count) {
  float total = 0;
  for (int64_t k = 0; k < count; ++k) total += sums[k];
  return total < INFINITY;
}

// Sets v_k = W r_k / c_k (first: W = 1). If tol >= 0 and every column was within it, returns false and leaves v.
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

// Writes g = log v, counted from the `origin` of the scores in units of S / eps.
template <class S>
inline void write_logarithms(const float* v, int64_t columns, double origin, float* potentials) {
  const double largest = std::numeric_limits<float>::max();
  const float shift = static_cast<float>(std::clamp(origin, -largest, largest));
  using V = typename S::V;
  for_each_vector<V>(columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
    const V x = part.get(v + k);
    V g = logarithm(x);
    if (S::minimum(x) < std::numeric_limits<float>::min())  // a marginal of 0, or nearly
      for (int lane = 0; lane < S::LANES; ++lane) g[lane] = std::log(x[lane]);
    part.put(potentials + k, g - shift);
  });
}

// What the linear and the narrow form share: a matrix in chunks, each of which has column sums of its own.
template <class S>
struct ChunkedScaling {
  const Group& group;
  const Chunks& chunks;
  float* e;          // E, as each form lays it out
  float* v;          // (padded columns,)
  float* partial;    // (chunks, padded columns): column sums
  Extrema* extrema;  // (chunks,): of the scores
  float* scratch;    // (padded columns,); the linear form has 3 of them for each chunk
  double* losses;    // (chunks,)
  const Exponential<S> exponential{group.first(), group.epsilon};

  // Whether E and the first column sums, which are computed by now, can be used.
  bool safe() const {
    Extrema all;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) all.add(extrema[chunk]);
    return exponential.safe(all) && all_finite(partial, chunks.count * chunks.padded);
  }

  // Sets v from the chunks' column sums. If all columns were within tol before, returns false and leaves v.
  bool update(bool first, double tol) const {
    for (int64_t from = 0; from < chunks.padded; from += 16) {
      double columns[16] = {};
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
        for (int64_t k = 0; k < 16; ++k) columns[k] += partial[chunk * chunks.padded + from + k];
      for (int64_t k = 0; k < 16; ++k) scratch[from + k] = static_cast<float>(columns[k]);
    }
    return update_scaling(group, scratch, first, tol, v);
  }

  void write_potentials(float* potentials) const {
    write_logarithms<S>(v, group.columns, exponential.origin(), potentials);
  }
};

}}  // namespace proto_reg
