// The CUDA launcher, free of torch and of CUDA types. Both functions return null, or what went wrong; neither allocates
// device memory nor waits for the device. The caller makes the device of the pointers the current one.
#pragma once

#include "sinkhorn_problem.h"
#include "sinkhorn_cuda_plan.h"

namespace proto_reg {

// How the current device will compute the problem: how much workspace to allocate is `plan->workspace_floats`.
const char* plan_sinkhorn_cuda(const SinkhornProblem& problem, SinkhornPlan* plan);

// Enqueues the kernels. `workspace`: plan.workspace_floats floats of device memory, 16-byte aligned; nothing is read
// before it is written. `stream`: a cudaStream_t.
const char* launch_sinkhorn_cuda(const SinkhornProblem& problem, const SinkhornPlan& plan, float* workspace,
                                 void* stream);

}  // namespace proto_reg
