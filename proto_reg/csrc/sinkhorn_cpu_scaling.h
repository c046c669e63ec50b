// What the forms that scale a matrix E (lanes, small, linear) have in common: exponentials of scores, and the update of
// the scaling vector v. Powers of two, which change no digit, are moved out of E where its range asks for it: one for
// each column and each row, so that no row and no column of E vanishes.
#pragma once

#include "sinkhorn_cpu_group.h"

namespace proto_reg { namespace {

// Maxima of rows and columns keep to MOST_WHOLE, in units of eps ln 2. DEAD shifts a column that gets nothing out of
// every row.
constexpr float MOST_WHOLE = 1 << 20, DEAD = 1 << 22;

// An entry of E below 2^LEAST is 0: products with denormal numbers take a hundred times as long. The most that v may
// span, and 1 / (E v) times v. So the codes that are lost in E are below 2^-46.
constexpr int32_t LEAST = -86;
constexpr float MOST_SPAN = 0x1p40f;

// Scores in units of eps ln 2: a whole number and a fraction, which has an error of 2^-25 whatever the score's size.
template <class S>
struct Split {
  using V = typename S::V;
  double exact;
  float scale, scale_low;

  explicit Split(double epsilon)
      : exact(M_LOG2E / epsilon), scale(static_cast<float>(exact)), scale_low(static_cast<float>(exact - scale)) {}

  INLINE V whole(V s) const { return (s * scale + MAGIC) - MAGIC; }
  INLINE V fraction(V s, V whole) const {
    if constexpr (S::FUSED) {  // the product is not rounded
      return s * scale_low + (s * scale - whole);
    } else {
      using D = DoublesOf<V>;
      return __builtin_convertvector(__builtin_convertvector(s, D) * exact - __builtin_convertvector(whole, D), V);
    }
  }
};

// 2^n of a whole n <= 127, or 0 below 2^LEAST.
template <class V>
INLINE V power_or_zero(V n) { return n < static_cast<float>(LEAST) ? V{} : power_of_two(n + MAGIC); }

// exp(S / eps) 2^shift, or 0 below 2^LEAST. NaN and +inf give NaN.
template <class S, class V = typename S::V>
INLINE V shifted_exponential(const Split<S>& split, V s, V shift) {
  const V n = split.whole(s), x = exp2_of_fraction(split.fraction(s, n)) * power_of_two(n + shift + MAGIC);
  return n + shift < static_cast<float>(LEAST) ? V{} : x;
}

// E = exp(S / eps) 2^-whole, with one power of two for the whole matrix. Scores below `floor` give 0.
template <class S>
struct Exponential {
  using V = typename S::V;
  Split<S> split;
  int32_t whole = 0;
  float floor = -INFINITY, ceiling = -INFINITY;  // scores above the ceiling are not safe

  // top: about the largest score.
  Exponential(const Split<S>& split_, float top) : split(split_) {
    if (!(std::abs(top * split.scale) < MOST_WHOLE)) return;
    whole = static_cast<int32_t>(std::lrint(top * split.scale));
    floor = static_cast<float>((whole + LEAST) / split.exact);
    ceiling = static_cast<float>((whole + 40) / split.exact);
  }

  INLINE V operator()(V s) const {
    const V shifted = s * split.scale + MAGIC;
    const V x = exp2_of_fraction(split.fraction(s, shifted - MAGIC)) * power_of_two(shifted, whole);
    return s < floor ? V{} : x;
  }
};

// Sets v_k = W r_k / c_k (first: W = 1), or 0 where c_k is 0. If tol >= 0 and every column was within it, returns false
// and leaves v. What columns of nothing but -inf leave is shared by the others.
inline bool update_scaling(const Group& group, const float* c, bool first, double tol, float* v) {
  const double total = first ? 1 : group.total_weight;
  if (tol >= 0 && !first) {
    double worst = 0, present = 0;
    for (int64_t k = 0; k < group.columns; ++k) present += c[k] > 0 ? group.marginal(k) : 0;
    for (int64_t k = 0; k < group.columns; ++k)
      if (c[k] > 0 && group.marginal(k) > 0)
        worst = std::max(worst, std::abs(v[k] * c[k] / (total * group.marginal(k)) * present - 1));
    if (worst <= tol) return false;
  }
  if (group.marginals)
    for (int64_t k = 0; k < group.columns; ++k) {
      const float target = static_cast<float>(total * group.marginal(k));
      v[k] = target > 0 ? (c[k] > 0 ? target / c[k] : 0) : 0;
    }
  else
    for (int64_t k = 0; k < group.columns; ++k) {
      const float x = static_cast<float>(total / group.columns) / c[k];
      v[k] = x < INFINITY ? x : 0;
    }
  return true;
}

// A matrix in chunks, each of which has column sums of its own: what the small and the linear form share.
template <class S>
struct ChunkedScaling {
  using V = typename S::V;
  static constexpr int64_t LANES = S::LANES;

  const Group& group;
  const Chunks& chunks;
  float* e;        // E, as each form lays it out
  float* v;        // (padded columns,)
  float* shifts;   // (padded columns,): powers of two that E holds for each column
  float* partial;  // (chunks, padded columns): column sums
  float* scratch;  // (padded columns,); the linear form has 3 of them for each chunk
  double* losses;  // (chunks,)
  const Split<S> split{group.epsilon};
  const Exponential<S> exponential{split, first_top()};
  bool absorbed = false;  // E has a power of two for each row and each column
  float widest = 0;       // the largest entry of v
  mutable std::atomic<bool> failed{false};  // a chunk found what E cannot hold

  float first_top() const {
    const float* s = group.template row<V>(0, scratch);
    V top = V{} - INFINITY;
    for_each_vector<V>(group.columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      top = S::maximum(part.get(s + k), top);
    });
    return S::maximum(top);
  }

  float* sums_of(int64_t chunk) const { return partial + chunk * chunks.padded; }
  void fail_unless(bool sound) const {
    if (!sound) failed.store(true, std::memory_order_relaxed);
  }
  bool has_failed() const { return failed.load(std::memory_order_relaxed); }

  // Row scales, 1 / (E v), of at most `largest` lose no code. The rows of an absorbed E have a 1.
  void check_rows(float largest) const { fail_unless(absorbed || largest * widest < MOST_SPAN); }

  void start_common() {
    std::fill_n(v, chunks.padded, 0.f);
    std::fill_n(shifts, chunks.padded, static_cast<float>(-exponential.whole));
  }

  template <class RowOf>
  void maxima_of_columns(int64_t chunk, const RowOf& row_of) const {
    float* tops = sums_of(chunk);
    std::fill_n(tops, chunks.padded, -INFINITY);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      if (!(group.weight(i) > 0)) continue;
      const float* s = row_of(i);
      for_each_vector<V>(group.columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
        part.put(tops + k, S::maximum(part.get(s + k), part.get(tops + k)));
      });
    }
  }

  // Sets the shifts from the chunks' column maxima. Returns false if one is not finite or too large.
  bool shift_columns() {
    absorbed = true;
    failed = false;
    for (int64_t k = 0; k < chunks.padded; k += LANES) {
      V top = V{} - INFINITY;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) top = S::maximum(load<V>(sums_of(chunk) + k), top);
      store(shifts + k, top);
    }
    for (int64_t k = 0; k < chunks.padded; ++k) {
      const bool alive = k < group.columns && shifts[k] != -INFINITY && (!group.marginals || group.marginals[k] > 0);
      const float whole = alive ? std::nearbyint(shifts[k] * split.scale) : DEAD;
      if (alive && !(std::abs(whole) < MOST_WHOLE)) return false;
      shifts[k] = -whole;
    }
    return true;
  }

  // Moves the powers of two in v to the shifts. E is to be computed again. Returns false if a shift is too large.
  bool absorb_scaling() {
    absorbed = true;
    failed = false;
    widest = 1;
    for (int64_t k = 0; k < chunks.padded; ++k) {
      int power = 0;
      v[k] = std::frexp(v[k], &power);
      shifts[k] = v[k] > 0 ? shifts[k] + power : -DEAD;
      if (v[k] > 0 && !(std::abs(shifts[k]) < 2 * MOST_WHOLE)) return false;
    }
    return true;
  }

  // The column sums of all chunks.
  const float* joined_sums() const {
    if (chunks.count == 1) return partial;
    for (int64_t from = 0; from < chunks.padded; from += 16) {
      double columns[16] = {};
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
        for (int64_t k = 0; k < 16; ++k) columns[k] += sums_of(chunk)[from + k];
      for (int64_t k = 0; k < 16; ++k) scratch[from + k] = static_cast<float>(columns[k]);
    }
    return scratch;
  }

  // Sets v from the first column sums. Returns false if one of them is NaN, or, before E is absorbed, vanishes.
  bool first_update() {
    const float* sums = joined_sums();
    float total = 0;
    bool vanished = false;
    for (int64_t k = 0; k < group.columns; ++k) total += sums[k], vanished |= sums[k] < 1 / MOST_SPAN;
    if (!(total < INFINITY) || (vanished && !absorbed)) return false;
    update_scaling(group, sums, true, -1, v);
    return true;
  }

  // Sets v from the column sums. If all columns were within tol before, returns false and leaves v.
  bool update(double tol) const { return update_scaling(group, joined_sums(), false, tol, v); }

  // Whether E can take v.
  bool takes_scaling() {
    V low = V{} + INFINITY, high{};
    for (int64_t k = 0; k < chunks.padded; k += LANES) {
      const V x = load<V>(v + k);
      low = S::minimum(x > 0 ? x : low, low);
      high = S::maximum(x, high);
    }
    widest = S::maximum(high);
    return widest < MOST_SPAN * S::minimum(low) && widest < MOST_SPAN && widest > 1 / MOST_SPAN;
  }

  // The potentials with all digits, however large they are.
  void keep_potentials(double* potentials) const {
    for (int64_t k = 0; k < chunks.padded; k += LANES) store(scratch + k, logarithm(load<V>(v + k)));
    for (int64_t k = 0; k < group.columns; ++k)
      potentials[k] = v[k] > 0 ? scratch[k] + shifts[k] * M_LN2 : -INFINITY;
  }

  void write_potentials(float* potentials) const {
    for_each_vector<V>(group.columns, [&](auto part, int64_t k, auto) ALWAYS_INLINE {
      const V x = part.get(v + k);
      part.put(potentials + k, x > 0 ? logarithm(x) + part.get(shifts + k) * 0.6931471805599453f : V{} - INFINITY);
    });
  }
};

}}  // namespace proto_reg
