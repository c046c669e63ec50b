// One source for several instruction sets: BEGIN_TARGET(features) ... END_TARGET around what only some machines have,
// and which of them runs here.
#pragma once

#include <cstdlib>
#include <string>

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

// Vectors never cross a function that is not inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#define AVX2_FEATURES "avx2,fma"
#define AVX512_FEATURES "avx512f,avx512vl,avx512dq,fma"

namespace proto_reg {

// The widest of these that runs here; PROTO_REG_CPU_ISA=baseline or avx2 asks for less.
template <class Function>
Function fastest(Function baseline, [[maybe_unused]] Function avx2, [[maybe_unused]] Function avx512) {
#if defined(__x86_64__)
  const char* given = std::getenv("PROTO_REG_CPU_ISA");
  const std::string most = given ? given : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  if (has_avx512 && most == "avx512") return avx512;
  if (has_avx2 && most != "baseline") return avx2;
#endif
  return baseline;
}

}  // namespace proto_reg
