// The entry points of the CPU's Sinkhorn kernels, and how a kernel gets threads. cpu_ops.cpp and step_cpu.cpp call it;
// cpu_kernels.cpp defines it.
#pragma once

#include <cstdint>

#include "sinkhorn_problem.h"

namespace proto_reg {

// Runs task(context, i) for i in [0, count), in any order, on any number of threads.
using Task = void (*)(void* context, int64_t index);
using ParallelFor = void (*)(int64_t count, Task task, void* context);

// The result does not depend on `parallel_for`, because the shape alone decides how rows are cut into chunks.
void sinkhorn_cpu(const SinkhornProblem& problem, ParallelFor parallel_for);
void sinkhorn_gradient_cpu(const SinkhornGradient& problem, ParallelFor parallel_for);

}  // namespace proto_reg
