// Makes the table of kernels for one instruction set. Included inside a target by cpu_baseline.cpp, cpu_avx2.cpp and
// cpu_avx512.cpp. All headers below lie in an unnamed namespace: each of those sources has functions of its own.
#pragma once

#include "mmd_cpu_kernel.h"
#include "rows_cpu_kernel.h"
#include "sinkhorn_cpu_reverse.h"

namespace proto_reg { namespace {

// A constant, so that no code of this instruction set runs when the library is loaded.
template <class Isa>
constexpr CpuKernels kernels_for() {
  using V = typename Simd<Isa>::V;
  return {solve_sinkhorn<Isa>, reverse_sinkhorn<Isa>, solve_mmd<Simd<Isa>>, dot<V>, squared_distance<V>, combine<V>,
          finite<V>, product<V>};
}

}}  // namespace proto_reg
