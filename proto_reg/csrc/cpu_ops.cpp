// Registers the CPU kernel behind the ops that proto_reg/kernels/sinkhorn.py defines.
#include "binding.h"
#include "sinkhorn_cpu.h"

namespace proto_reg {

// ATen's own threads: torch.set_num_threads holds.
void aten_parallel_for(int64_t count, Task task, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) task(context, index);
  });
}

struct Cpu {
  static void run(const SinkhornProblem& problem, const Tensor&) { sinkhorn_cpu(problem, aten_parallel_for); }
};

}  // namespace proto_reg

PROTO_REG_IMPL(CPU, proto_reg::Cpu)
