#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                    : std::ldexp(static_cast<float>(mantissa), -24);
  return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // A step is a unit in the last place. Below the smallest normal number it is 2^-24. nearbyint rounds to even.
  const int exponent = size < std::ldexp(1.0f, -14) ? -14 : std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + steps))};
}
