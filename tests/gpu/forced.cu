// The planner and the launcher of the CUDA library, with the interface of the emulation (tests/emulation/driver.cpp).
// So the emulation's tests run on a GPU without changes, and force every regime on every shape.
#include "sinkhorn_cuda.cu"

extern "C" {

const char* forced_plan(const proto_reg::SinkhornProblem* problem, const proto_reg::DeviceLimits* limits, int allow,
                        int fuse, proto_reg::SinkhornPlan* plan) {
  *plan = proto_reg::plan_sinkhorn(*problem, *limits, static_cast<proto_reg::Regime>(allow));
  if (plan->regime != proto_reg::Regime::streamed) return nullptr;
  if (!fuse) plan_streamed(*problem, *limits, false, plan);
  if (fuse < 2) plan->narrow_blocks = 0;
  return nullptr;
}

const char* chosen_launch(const proto_reg::SinkhornProblem* problem, const proto_reg::DeviceLimits*,
                          proto_reg::SinkhornPlan* plan, int64_t stream) {
  const cudaStream_t queue = reinterpret_cast<cudaStream_t>(stream);
  void* workspace = nullptr;
  const auto allocate = [&](const proto_reg::SinkhornPlan& chosen) {
    *plan = chosen;
    cudaFreeAsync(workspace, queue);
    cudaMallocAsync(&workspace, 4 * static_cast<size_t>(chosen.workspace_floats) + 4, queue);
    return static_cast<float*>(workspace);
  };
  const char* const error = proto_reg::run_sinkhorn_cuda(*problem, allocate, queue);
  cudaFreeAsync(workspace, queue);
  return error;
}

const char* forced_launch(const proto_reg::SinkhornProblem* problem, const proto_reg::SinkhornPlan* plan,
                          float* workspace, int64_t stream) {
  return proto_reg::launch_sinkhorn_cuda(*problem, *plan, workspace, reinterpret_cast<void*>(stream));
}
}
