// The CUDA launcher, without types of torch or CUDA; cuda_ops.cpp calls it. Both functions return null, or what went
// wrong. They do not allocate device memory or wait. The caller makes the device of the pointers the current one.
#pragma once

#include "sinkhorn_problem.h"
#include "sinkhorn_cuda_plan.h"

namespace proto_reg {

// Decides how the current device computes the problem. The caller allocates plan->workspace_floats floats.
const char* plan_sinkhorn_cuda(const SinkhornProblem& problem, SinkhornPlan* plan);

// Enqueues the kernels. `workspace`: plan.workspace_floats floats of device memory, 16-byte aligned, with any content.
// `stream`: a cudaStream_t.
const char* launch_sinkhorn_cuda(const SinkhornProblem& problem, const SinkhornPlan& plan, float* workspace,
                                 void* stream);

}  // namespace proto_reg
