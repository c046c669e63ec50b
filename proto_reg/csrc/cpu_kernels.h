// The functions that exist once for each instruction set, as a table of pointers, and the choice of the table.
// rows_cpu.cpp, mmd_cpu.cpp and sinkhorn_cpu.cpp call through it; cpu_kernel_table.h fills it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

#include "mmd_cpu.h"
#include "sinkhorn_cpu.h"

namespace proto_reg {

struct CpuKernels {
  void (*sinkhorn)(const SinkhornProblem& problem, ParallelFor parallel_for);
  void (*mmd)(const MmdProblem& problem, ParallelFor parallel_for);

  // Of single rows, for rows_cpu.cpp; what they compute stands in rows_cpu_kernel.h.
  float (*dot)(const float* x, const float* y, int64_t dim);
  float (*squared_distance)(const float* x, const float* y, int64_t dim);
  void (*combine)(float a, const float* x, float b, const float* y, int64_t dim, float* out);
  bool (*finite)(const float* x, int64_t dim);
  void (*product)(const float* a, int64_t row, int64_t inner_step, const float* b, int64_t rows, int64_t inner,
                  int64_t columns, float* out);
};

extern const CpuKernels baseline_kernels, avx2_kernels, avx512_kernels;  // the last two on x86-64 alone

// The table for the widest vectors that this machine has; PROTO_REG_CPU_ISA=baseline or avx2 asks for less.
inline const CpuKernels& choose_cpu_kernels() {
#if defined(__x86_64__)
  const char* given = std::getenv("PROTO_REG_CPU_ISA");
  const std::string most = given ? given : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  if (has_avx512 && most == "avx512") return avx512_kernels;
  if (has_avx2 && most != "baseline") return avx2_kernels;
#endif
  return baseline_kernels;
}

inline const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose_cpu_kernels();
  return chosen;
}

}  // namespace proto_reg
