// Half precision to float32 and back. The Sinkhorn kernels read and write matrices of float16 and bfloat16 through it.
#pragma once

#include "cpu_vector.h"

namespace proto_reg { namespace {

// U holds 16 bits in each lane, V float32.
template <class V, class U = UnsignedOf<V>>
INLINE V from_bf16(U half) { return (V)(half << 16); }

template <class V, class U = UnsignedOf<V>>
INLINE U to_bf16(V x) {
  const U bits = (U)x;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return ((U)(x == x) & rounded) | ((U)(x != x) & 0x7fc0);
}

template <class V, class U = UnsignedOf<V>>
INLINE V from_f16(U half) {
  const U magnitude = (half & 0x7fff) << 13;
  // A multiplication by 2^112 moves the exponent's bias and turns subnormals into normals.
  U bits = (U)((V)magnitude * 0x1p112f);
  bits |= (U)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (V)(bits | (half & 0x8000) << 16);
}

template <class V, class U = UnsignedOf<V>>
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

// Calls convert(k, present) for every vector of `count` values.
template <class V, class Convert>
INLINE void for_each_half_vector(int64_t count, const Convert& convert) {
  const int64_t whole = count - count % LANES_OF<V>;
  for (int64_t k = 0; k < whole; k += LANES_OF<V>) convert(k, LANES_OF<V>);
  if (whole < count) convert(whole, count - whole);
}

// Converts `count` values of a half precision at `from` to float32.
template <class V>
inline void widen(Dtype dtype, const void* from, int64_t count, float* to) {
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  for_each_half_vector<V>(count, [&](int64_t k, int64_t present) ALWAYS_INLINE {
    typename Types<V>::H half{};
    __builtin_memcpy(&half, halves + k, sizeof(uint16_t) * present);
    const UnsignedOf<V> bits = __builtin_convertvector(half, UnsignedOf<V>);
    const V x = dtype == Dtype::bf16 ? from_bf16<V>(bits) : from_f16<V>(bits);
    __builtin_memcpy(to + k, &x, sizeof(float) * present);
  });
}

// Converts `count` values of float32 at `from` to a half precision.
template <class V>
inline void narrow(Dtype dtype, const float* from, int64_t count, void* to) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  for_each_half_vector<V>(count, [&](int64_t k, int64_t present) ALWAYS_INLINE {
    V x{};
    __builtin_memcpy(&x, from + k, sizeof(float) * present);
    using H = typename Types<V>::H;
    const H half = __builtin_convertvector(dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x), H);
    __builtin_memcpy(halves + k, &half, sizeof(uint16_t) * present);
  });
}

}}  // namespace proto_reg
