// The CPU kernel's launcher.
#pragma once

#include <cstdint>

#include "sinkhorn_problem.h"

namespace proto_reg {

// Runs task(context, i) for i in [0, count), in any order, on any number of threads.
using Task = void (*)(void* context, int64_t index);
using ParallelFor = void (*)(int64_t count, Task task, void* context);

// Bits do not depend on `parallel_for`: how rows are cut into chunks is a function of the shape alone.
void sinkhorn_cpu(const SinkhornProblem& problem, ParallelFor parallel_for);

}  // namespace proto_reg
