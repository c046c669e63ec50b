// The CUDA launcher, without types of torch or CUDA; cuda_ops.cpp calls it. The functions return null, or what went
// wrong. They do not allocate device memory or wait. The caller makes the device of the pointers the current one.
#pragma once

#include "sinkhorn_problem.h"
#include "sinkhorn_cuda_plan.h"

namespace proto_reg {

// Decides how the current device computes the problem. The caller allocates plan->workspace_floats floats. `grids`:
// whether blocks may wait for their whole grid.
const char* plan_sinkhorn_cuda(const SinkhornProblem& problem, SinkhornPlan* plan, bool grids = true);

// Enqueues the kernels. `workspace`: plan.workspace_floats floats of device memory, 16-byte aligned, with any content.
// `stream`: a cudaStream_t. `refused`: set, and no error, if the device refuses a grid that waits, for example because
// other processes hold a part of it.
const char* launch_sinkhorn_cuda(const SinkhornProblem& problem, const SinkhornPlan& plan, float* workspace,
                                 void* stream, bool* refused = nullptr);

// Plans, asks allocate(plan) for the workspace, and enqueues. Plans again without grids that wait, if one is refused.
template <class Allocate>
const char* run_sinkhorn_cuda(const SinkhornProblem& problem, Allocate allocate, void* stream) {
  bool refused = false;
  SinkhornPlan plan;
  const char* error = plan_sinkhorn_cuda(problem, &plan);
  if (!error) error = launch_sinkhorn_cuda(problem, plan, allocate(plan), stream, &refused);
  if (error || !refused) return error;
  error = plan_sinkhorn_cuda(problem, &plan, false);
  return error ? error : launch_sinkhorn_cuda(problem, plan, allocate(plan), stream);
}

}  // namespace proto_reg
