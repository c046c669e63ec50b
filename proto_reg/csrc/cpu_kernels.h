// The functions that exist once for each instruction set, as a table of pointers, and the choice of the table.
// cpu_kernels.cpp and rows_cpu.cpp call through it; cpu_kernel_table.h fills it.
#pragma once

#include <cstdint>

#include "mmd_cpu.h"
#include "sinkhorn_cpu.h"

namespace proto_reg {

struct CpuKernels {
  void (*sinkhorn)(const SinkhornProblem& problem, ParallelFor parallel_for);
  void (*sinkhorn_gradient)(const SinkhornGradient& problem, ParallelFor parallel_for);
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
const CpuKernels& choose_cpu_kernels();
inline const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose_cpu_kernels();
  return chosen;
}

}  // namespace proto_reg
