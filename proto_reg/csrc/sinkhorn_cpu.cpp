// Balanced assignment on the CPU: calls the kernel of this machine's instruction set.
#include "sinkhorn_cpu.h"

#include "cpu_kernels.h"

namespace proto_reg {

void sinkhorn_cpu(const SinkhornProblem& problem, ParallelFor parallel_for) {
  cpu_kernels().sinkhorn(problem, parallel_for);
}

}  // namespace proto_reg
