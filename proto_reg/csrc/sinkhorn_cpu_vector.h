// LANES lanes of float32 (8 or 16), in the compiler's vector extension: the same source for every instruction set.
// Included by sinkhorn_cpu_isa.h, inside a namespace and a target; hence no include guard.

using V = float __attribute__((vector_size(4 * LANES)));
using I = int32_t __attribute__((vector_size(4 * LANES)));
using U = uint32_t __attribute__((vector_size(4 * LANES)));
using H = uint16_t __attribute__((vector_size(2 * LANES)));

INLINE V load(const float* from) {
  V x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float* to, V x) { __builtin_memcpy(to, &x, sizeof x); }

// Past the caches, to a multiple of the vector's size: memory is not read before it is written. Call `streamed`
// afterwards. A template, for the branches not taken must not be compiled.
template <class X>
INLINE void stream(float* to, X x) {
#if defined(__clang__)
  __builtin_nontemporal_store(x, reinterpret_cast<X*>(to));
#elif defined(__x86_64__)
#if MACHINE_LANES == 16
  if constexpr (sizeof x == 64) return __builtin_ia32_movntps512(to, x);
#endif
#if MACHINE_LANES >= 8
  if constexpr (sizeof x == 32) return __builtin_ia32_movntps256(to, x);
#endif
  if constexpr (sizeof x == 16) return __builtin_ia32_movntps(to, x);
  store(to, x);
#else
  store(to, x);
#endif
}

// Other threads see what was streamed.
inline void streamed() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// A NaN in b is lost: whoever needs it looks at the sums.
#if defined(__x86_64__) && MACHINE_LANES == 16
// What the others' lines mean; GCC compares into a mask for them, and blends.
INLINE V maximum(V a, V b) {
  asm("vmaxps %1, %0, %0" : "+v"(b) : "vm"(a));
  return b;
}
INLINE V minimum(V a, V b) {
  asm("vminps %1, %0, %0" : "+v"(b) : "vm"(a));
  return b;
}
#else
INLINE V maximum(V a, V b) { return a < b ? b : a; }
INLINE V minimum(V a, V b) { return b < a ? b : a; }
#endif

// 0, 1, 2, ...
INLINE I lane_numbers() {
  I lane{};
  for (int32_t k = 0; k < LANES; ++k) lane[k] = k;
  return lane;
}

// Lane k holds what lane k ^ distance held.
INLINE V swapped(V x, int32_t distance) {
#if defined(__clang__)
  V y;
  for (int32_t k = 0; k < LANES; ++k) y[k] = x[k ^ distance];
  return y;
#else
  return __builtin_shuffle(x, lane_numbers() ^ distance);
#endif
}

INLINE float sum(V x) {
  for (int32_t distance = LANES / 2; distance > 0; distance /= 2) x += swapped(x, distance);
  return x[0];
}

INLINE float maximum(V x) {
  for (int32_t distance = LANES / 2; distance > 0; distance /= 2) x = maximum(x, swapped(x, distance));
  return x[0];
}

INLINE float minimum(V x) { return -maximum(-x); }

// F and N in these: float and uint32_t, or LANES of each.

// 2^f for f in [-1/2, 1/2], to 1.6e-7 of itself: minimax among those with 2^0 = 1.
template <class F>
INLINE F exp2_of_fraction(F f) {
  F p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  return p * f + 1.0f;
}

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: the last bits of a sum with it are the other term, rounded

// 2^(n - less) of n + MAGIC.
template <class F, class N>
INLINE F power_of_two(F shifted, int32_t less = 0) {
  N bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + ((127u - less) << 23);
  __builtin_memcpy(&shifted, &bits, sizeof bits);
  return shifted;
}

// 2^x for x in [-126, 126]; NaN stays NaN.
template <class F = V, class N = U>
INLINE F exp2_in_range(F x) {
  const F shifted = x + MAGIC;
  return exp2_of_fraction(x - (shifted - MAGIC)) * power_of_two<F, N>(shifted);
}

// Natural logarithm of normal numbers, to 1e-7.
INLINE V logarithm(V x) {
  const I exponent = (I)((U)x - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2)]
  const V m = (V)((U)x - ((U)exponent << 23));
  const V s = (m - 1) / (m + 1), q = s * s;
  const V series = (((q * (2.f / 9) + 2.f / 7) * q + 2.f / 5) * q + 2.f / 3) * q + 2;  // of 2 atanh(s) / s
  return __builtin_convertvector(exponent, V) * 0.6931471805599453f + s * series;
}

// Half precision to float32 and back, 16 bits to a lane.
INLINE V from_bf16(U half) { return (V)(half << 16); }

INLINE U to_bf16(V x) {
  const U bits = (U)x;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return ((U)(x == x) & rounded) | ((U)(x != x) & 0x7fc0);
}

INLINE V from_f16(U half) {
  const U magnitude = (half & 0x7fff) << 13;
  // A multiplication by 2^112 moves the exponent's bias and turns subnormals into normals.
  U bits = (U)((V)magnitude * 0x1p112f);
  bits |= (U)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (V)(bits | (half & 0x8000) << 16);
}

INLINE U to_f16(V x) {
  const U sign = (U)x & 0x80000000u;
  const U bits = (U)x ^ sign;
  const U normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const U subnormal = (U)((V)bits + 0.5f) - 0x3f000000u;
  const U overflow = bits > 0x7f800000u ? bits * 0 + 0x7e00 : bits * 0 + 0x7c00;
  U result = bits < (113u << 23) ? subnormal : normal;
  result = bits >= (143u << 23) ? overflow : result;
  return result | sign >> 16;
}

// Converts `count` values of a half precision at `from` to float32.
inline void widen(Dtype dtype, const void* from, int64_t count, float* to) {
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  const auto convert = [&](int64_t k, int64_t present) ALWAYS_INLINE {
    H half{};
    __builtin_memcpy(&half, halves + k, sizeof(uint16_t) * present);
    const U bits = __builtin_convertvector(half, U);
    const V x = dtype == Dtype::bf16 ? from_bf16(bits) : from_f16(bits);
    __builtin_memcpy(to + k, &x, sizeof(float) * present);
  };
  const int64_t whole = count - count % LANES;
  for (int64_t k = 0; k < whole; k += LANES) convert(k, LANES);
  if (whole < count) convert(whole, count - whole);
}

inline void narrow(Dtype dtype, const float* from, int64_t count, void* to) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  const auto convert = [&](int64_t k, int64_t present) ALWAYS_INLINE {
    V x{};
    __builtin_memcpy(&x, from + k, sizeof(float) * present);
    const H half = __builtin_convertvector(dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x), H);
    __builtin_memcpy(halves + k, &half, sizeof(uint16_t) * present);
  };
  const int64_t whole = count - count % LANES;
  for (int64_t k = 0; k < whole; k += LANES) convert(k, LANES);
  if (whole < count) convert(whole, count - whole);
}

// The vectors of a row: whole ones, and where the columns are no multiple of LANES a last one that ends with the row and
// so repeats columns of the one before it. Rows of less than LANES columns are a single short one.
struct Full {
  INLINE V get(const float* from) const { return load(from); }
  INLINE void put(float* to, V x) const { store(to, x); }
  INLINE void stream_to(float* to, V x) const { stream(to, x); }
  INLINE V once(V x) const { return x; }
};

struct Last : Full {
  int32_t repeated;
  explicit INLINE Last(int64_t columns) : repeated(static_cast<int32_t>(-columns & (LANES - 1))) {}
  // x, and 0 in the lanes that another vector holds already: what enters a sum.
  INLINE V once(V x) const {
    return lane_numbers() >= repeated ? x : V{};
  }
};

struct Short {
  int64_t count;
  // Where there are fewer, a value that is there: nothing else changes maxima.
  INLINE V get(const float* from) const {
    V x = V{} + *from;
    __builtin_memcpy(&x, from, sizeof(float) * count);
    return x;
  }
  INLINE void put(float* to, V x) const { __builtin_memcpy(to, &x, sizeof(float) * count); }
  INLINE void stream_to(float* to, V x) const { put(to, x); }
  INLINE V once(V x) const {
    return lane_numbers() < (int32_t)count ? x : V{};
  }
};

// body(part, column, slot) for every vector of a row; slot, the constant 0 or 1, changes from one vector to the next, so
// that sums over a row can run side by side.
template <class Body>
INLINE void for_each_vector(int64_t columns, const Body& body) {
  constexpr std::integral_constant<int, 0> first;
  if (columns < LANES) return body(Short{columns}, 0, first);
  int64_t k = 0;
  for (; k + 2 * LANES <= columns; k += 2 * LANES) {
    body(Full{}, k, first);
    body(Full{}, k + LANES, std::integral_constant<int, 1>{});
  }
  if (k + LANES <= columns) body(Full{}, k, first);
  if (columns % LANES) body(Last(columns), columns - LANES, first);
}

// body(part, column) for every vector of a row that is to be streamed to `to`, a multiple of 4 bytes: aligned there,
// short at both ends.
template <class Body>
INLINE void for_each_aligned_vector(const float* to, int64_t columns, const Body& body) {
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / sizeof(float)) % LANES;
  int64_t k = std::min(columns, (LANES - past) % LANES);
  if (k) body(Short{k}, 0);
  for (; k + LANES <= columns; k += LANES) body(Full{}, k);
  if (k < columns) body(Short{columns - k}, k);
}
