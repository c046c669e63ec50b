// Scores of any span: powers of two, which change no digit, are moved out of E = exp(S / eps) for each row and each
// column, so that no row and no column of E vanishes.
#pragma once

#include "sinkhorn_cpu_scaling.h"

namespace proto_reg { namespace {

// Maxima of rows and columns keep to MOST_WHOLE, in units of eps ln 2. A score below twice that counts as -inf: no
// potential can make up for it. DEAD shifts a column that gets nothing out of every row.
constexpr float MOST_WHOLE = 1 << 20, DEAD = 1 << 22;

// The most that v may span. With row maxima of 1 a code that has vanished from E is then below 2^-126 MOST_SPAN.
constexpr float MOST_SPAN = 0x1p64f;

// A score in units of eps ln 2: a whole number and a fraction, which has an error of 2^-25 whatever the score's size.
template <class S>
struct Split {
  using V = typename S::V;
  float scale, scale_low, lowest;

  explicit Split(double epsilon)
      : scale(static_cast<float>(M_LOG2E / epsilon)), scale_low(static_cast<float>(M_LOG2E / epsilon - scale)),
        lowest(-2 * MOST_WHOLE / scale) {}

  INLINE V whole(V s) const { return (S::maximum(s, V{} + lowest) * scale + MAGIC) - MAGIC; }
  INLINE V fraction(V s, V whole) const {
    const V x = S::maximum(s, V{} + lowest);
    return x * scale_low + (x * scale - whole);
  }
};

// 2^n, or 0 if that is no normal number; n <= 127 is whole.
template <class V>
INLINE V power_or_zero(V n) {
  return n < -126.f ? V{} : power_of_two(n + MAGIC);
}

}}  // namespace proto_reg
