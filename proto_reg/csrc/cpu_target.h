// BEGIN_TARGET(features) ... END_TARGET: compiles what stands between for an instruction set. cpu_avx2.cpp and
// cpu_avx512.cpp use them. Everything that these compile uses INLINE.
#pragma once

// A function with vectors as arguments must be inlined: its caller is compiled for the same instruction set.
#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about vectors as arguments of functions that are not inlined
#endif

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
