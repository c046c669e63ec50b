// Chooses the instruction set of the CPU kernels, and calls the Sinkhorn and MMD kernels that are compiled for it.
#include "cpu_kernels.h"

#include <cstdlib>
#include <string>

namespace proto_reg {

const CpuKernels& choose_cpu_kernels() {
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

void sinkhorn_cpu(const SinkhornProblem& problem, ParallelFor parallel_for) {
  cpu_kernels().sinkhorn(problem, parallel_for);
}

void sinkhorn_gradient_cpu(const SinkhornGradient& problem, ParallelFor parallel_for) {
  cpu_kernels().sinkhorn_gradient(problem, parallel_for);
}

void mmd_cpu(const MmdProblem& problem, ParallelFor parallel_for) { cpu_kernels().mmd(problem, parallel_for); }

}  // namespace proto_reg
