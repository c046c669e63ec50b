// Vectors of float32, the same for every instruction set and number of lanes. All CPU kernels use this file.
// V is a vector of the compiler, or float where it says so. S is a Simd, which names a vector and its machine.
#pragma once

#include "cpu_plain.h"

namespace proto_reg { namespace {

// The instruction sets: lanes of their vectors, and whether they multiply and add in one instruction, rounding once.
template <int64_t N, bool FUSES>
struct InstructionSet {
  static constexpr int64_t LANES = N;
  static constexpr bool FUSED = FUSES;
};
#if defined(__aarch64__)
struct Baseline : InstructionSet<4, true> {};
#else
struct Baseline : InstructionSet<4, false> {};
#endif
struct Avx2 : InstructionSet<8, true> {};
struct Avx512 : InstructionSet<16, true> {};

// N lanes of float32. Apart from Simd, for inside a template GCC takes such a type for a float.
template <int64_t N>
struct Floats {
  using V [[gnu::vector_size(4 * N)]] = float;
};

// The types that go with V: as many integers, halves of 16 bits, and doubles.
template <class V>
struct Types {
  using I [[gnu::vector_size(sizeof(V))]] = int32_t;
  using U [[gnu::vector_size(sizeof(V))]] = uint32_t;
  using H [[gnu::vector_size(sizeof(V) / 2)]] = uint16_t;
  using D [[gnu::vector_size(sizeof(V) * 2)]] = double;
};
template <>
struct Types<float> {
  using U = uint32_t;
};
template <class V>
using IntsOf = typename Types<V>::I;
template <class V>
using UnsignedOf = typename Types<V>::U;
template <class V>
using DoublesOf = typename Types<V>::D;
template <class V>
constexpr int64_t LANES_OF = sizeof(V) / sizeof(float);

template <class V>
INLINE V load(const float* from) {
  V x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
INLINE void store(float* to, V x) { __builtin_memcpy(to, &x, sizeof x); }

// Load and store where a row ends: only the first `present` lanes, at least one, are in memory. The others are 0.
template <class V>
INLINE V load_first(const float* from, int64_t present) {
  if (present >= LANES_OF<V>) return load<V>(from);
  V x{};
  __builtin_memcpy(&x, from, sizeof(float) * present);
  return x;
}

template <class V>
INLINE void store_first(float* to, V x, int64_t present) {
  if (present >= LANES_OF<V>) store(to, x);
  else __builtin_memcpy(to, &x, sizeof(float) * present);
}

// Stores past the caches, to a multiple of the vector's size: the memory is not read first. Call `streamed` afterwards.
template <class V>
INLINE void stream(float* to, V x) {
#if defined(__clang__)
  __builtin_nontemporal_store(x, reinterpret_cast<V*>(to));
#elif defined(__x86_64__)
  if constexpr (sizeof x == 64) __builtin_ia32_movntps512(to, x);
  else if constexpr (sizeof x == 32) __builtin_ia32_movntps256(to, x);
  else __builtin_ia32_movntps(to, x);
#else
  store(to, x);
#endif
}

// From here on other threads see what was streamed.
inline void streamed() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// 0, 1, 2, ...
template <class V>
INLINE IntsOf<V> lane_numbers() {
  IntsOf<V> lane{};
  for (int32_t k = 0; k < LANES_OF<V>; ++k) lane[k] = k;
  return lane;
}

// Lane k holds what lane k ^ distance held.
template <class V>
INLINE V swapped(V x, int32_t distance) {
#if defined(__clang__)
  V y;
  for (int32_t k = 0; k < LANES_OF<V>; ++k) y[k] = x[k ^ distance];
  return y;
#else
  return __builtin_shuffle(x, lane_numbers<V>() ^ distance);
#endif
}

template <class V>
INLINE float sum(V x) {
  for (int32_t distance = LANES_OF<V> / 2; distance > 0; distance /= 2) x += swapped(x, distance);
  return x[0];
}

// A vector of N lanes on the machine Isa, with the functions that depend on both.
template <class Isa, int64_t N = Isa::LANES>
struct Simd {
  static constexpr int64_t LANES = N;
  static constexpr bool FUSED = Isa::FUSED;
  using V = typename Floats<N>::V;

  // A NaN in b is lost: whoever needs it looks at sums.
  static INLINE V maximum(V a, V b) {
    if constexpr (std::is_same_v<Isa, Avx512>) {  // the line below, for which GCC compares into a mask and blends
      asm("vmaxps %1, %0, %0" : "+v"(b) : "vm"(a));
      return b;
    } else {
      return a < b ? b : a;
    }
  }
  static INLINE V minimum(V a, V b) {
    if constexpr (std::is_same_v<Isa, Avx512>) {
      asm("vminps %1, %0, %0" : "+v"(b) : "vm"(a));
      return b;
    } else {
      return b < a ? b : a;
    }
  }

  // Over the lanes.
  static INLINE float maximum(V x) {
    for (int32_t distance = LANES / 2; distance > 0; distance /= 2) x = maximum(x, swapped(x, distance));
    return x[0];
  }
  static INLINE float minimum(V x) { return -maximum(-x); }
};

// 2^f for f in [-1/2, 1/2], with a relative error of 1.6e-7: the minimax polynomial among those with 2^0 = 1. V: also
// float.
template <class V>
INLINE V exp2_of_fraction(V f) {
  V p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  return p * f + 1.0f;
}

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: the last bits of x + MAGIC are x, rounded to an integer

// 2^(n - less), given n + MAGIC. V: also float.
template <class V>
INLINE V power_of_two(V shifted, int32_t less = 0) {
  UnsignedOf<V> bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + ((127u - less) << 23);
  __builtin_memcpy(&shifted, &bits, sizeof bits);
  return shifted;
}

// 2^x for x in [-126, 126]; NaN stays NaN. V: also float.
template <class V>
INLINE V exp2_in_range(V x) {
  const V shifted = x + MAGIC;
  return exp2_of_fraction(x - (shifted - MAGIC)) * power_of_two(shifted);
}

// Natural logarithm of normal numbers, with an error of 1e-7.
template <class V>
INLINE V logarithm(V x) {
  using I = IntsOf<V>;
  using U = UnsignedOf<V>;
  const I exponent = (I)((U)x - 0x3f3504f3) >> 23;  // then the mantissa lies in [sqrt(1/2), sqrt(2)]
  const V m = (V)((U)x - ((U)exponent << 23));
  const V s = (m - 1) / (m + 1), q = s * s;
  const V series = (((q * (2.f / 9) + 2.f / 7) * q + 2.f / 5) * q + 2.f / 3) * q + 2;  // of 2 atanh(s) / s
  return __builtin_convertvector(exponent, V) * 0.6931471805599453f + s * series;
}

// The parts of a row, each a vector. A row consists of whole vectors (Full). Where the columns are no multiple of the
// lanes, a Last one ends with the row, so that it repeats columns of the one before it. A row of fewer columns than
// lanes is a single Short one. get and put read and write a part; once(x) is x, but 0 in lanes that repeat or are
// unused.
template <class V>
struct Full {
  INLINE V get(const float* from) const { return load<V>(from); }
  INLINE void put(float* to, V x) const { store(to, x); }
  INLINE void stream_to(float* to, V x) const { stream(to, x); }
  INLINE V once(V x) const { return x; }
};

template <class V>
struct Last : Full<V> {
  int32_t repeated;
  explicit INLINE Last(int64_t columns) : repeated(static_cast<int32_t>(-columns & (LANES_OF<V> - 1))) {}
  INLINE V once(V x) const { return lane_numbers<V>() >= repeated ? x : V{}; }
};

template <class V>
struct Short {
  int64_t count;
  // Unused lanes repeat the first value, which changes no maximum.
  INLINE V get(const float* from) const {
    V x = V{} + *from;
    __builtin_memcpy(&x, from, sizeof(float) * count);
    return x;
  }
  INLINE void put(float* to, V x) const { __builtin_memcpy(to, &x, sizeof(float) * count); }
  INLINE void stream_to(float* to, V x) const { put(to, x); }
  INLINE V once(V x) const { return lane_numbers<V>() < (int32_t)count ? x : V{}; }
};

// Calls body(part, column, slot) for every part of a row. `slot` is the constant 0 or 1 and changes from one part to
// the next, so that a body can keep two sums that do not wait for each other.
template <class V, class Body>
INLINE void for_each_vector(int64_t columns, const Body& body) {
  constexpr int64_t LANES = LANES_OF<V>;
  constexpr std::integral_constant<int, 0> first;
  if (columns < LANES) return body(Short<V>{columns}, 0, first);
  int64_t k = 0;
  for (; k + 2 * LANES <= columns; k += 2 * LANES) {
    body(Full<V>{}, k, first);
    body(Full<V>{}, k + LANES, std::integral_constant<int, 1>{});
  }
  if (k + LANES <= columns) body(Full<V>{}, k, first);
  if (columns % LANES) body(Last<V>(columns), columns - LANES, first);
}

// Calls body(part, column) for every part of a row that is to be streamed to `to`, a multiple of 4 bytes: whole vectors
// are aligned there, and a short one stands at each end.
template <class V, class Body>
INLINE void for_each_aligned_vector(const float* to, int64_t columns, const Body& body) {
  constexpr int64_t LANES = LANES_OF<V>;
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / sizeof(float)) % LANES;
  int64_t k = std::min(columns, (LANES - past) % LANES);
  if (k) body(Short<V>{k}, 0);
  for (; k + LANES <= columns; k += LANES) body(Full<V>{}, k);
  if (k < columns) body(Short<V>{columns - k}, k);
}

}}  // namespace proto_reg
