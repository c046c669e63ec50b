// The planner and the launcher of the CUDA library, with the interface of the emulation (tests/emulation/driver.cpp).
// So the emulation's tests run on a GPU without changes, and force every regime on every shape.
#include "sinkhorn_cuda.cu"

extern "C" {

const char* forced_plan(const proto_reg::SinkhornProblem* problem, const proto_reg::DeviceLimits* limits, int allow,
                        int fuse, proto_reg::SinkhornPlan* plan) {
  if (allow < 0) return proto_reg::plan_sinkhorn_cuda(*problem, plan);
  *plan = proto_reg::plan_sinkhorn(*problem, *limits, static_cast<proto_reg::Regime>(allow));
  if (plan->regime != proto_reg::Regime::streamed) return nullptr;
  if (!fuse) plan_streamed(*problem, *limits, false, plan);
  if (fuse < 2) plan->narrow_blocks = 0;
  return nullptr;
}

const char* forced_launch(const proto_reg::SinkhornProblem* problem, const proto_reg::SinkhornPlan* plan,
                          float* workspace, int64_t stream) {
  return proto_reg::launch_sinkhorn_cuda(*problem, *plan, workspace, reinterpret_cast<void*>(stream));
}
}
