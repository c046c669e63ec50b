// Registers the CPU kernels behind the ops that proto_reg/kernels/sinkhorn.py and mmd.py define.
#include "binding.h"
#include "mmd_cpu.h"
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

std::tuple<Tensor, Tensor> anchored_mmd_loss(
    const Tensor& z_, const Tensor& anchors_, const Tensor& assignments_, const std::optional<Tensor>& mask_,
    std::vector<double> scales, bool unbiased, bool by_mass) {
  const Tensor z = as_contiguous(z_), anchors = as_contiguous(anchors_), assignments = as_contiguous(assignments_);
  const std::optional<Tensor> mask = as_contiguous(mask_);
  STD_TORCH_CHECK(
      z.dim() == 2 && anchors.dim() == 2 && z.size(1) == anchors.size(1) && z.size(1) > 0 &&
          z.scalar_type() == ScalarType::Float && anchors.scalar_type() == ScalarType::Float,
      "z, anchors: expected float32 (N, D) and (K, D)");
  STD_TORCH_CHECK(
      assignments.numel() == z.size(0) && assignments.scalar_type() == ScalarType::Long,
      "assignments: expected int64 (N,)");
  STD_TORCH_CHECK(
      !mask || (mask->numel() == z.size(0) && mask->scalar_type() == ScalarType::Bool), "mask: expected bool (N,)");
  Tensor loss = empty(z, {}, ScalarType::Float), gradient = empty(z, {z.size(0), z.size(1)}, ScalarType::Float);
  const MmdProblem problem{static_cast<const float*>(z.const_data_ptr()),
                           static_cast<const float*>(anchors.const_data_ptr()),
                           static_cast<const int64_t*>(assignments.const_data_ptr()),
                           mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
                           z.size(0), anchors.size(0), z.size(1), std::move(scales), unbiased, by_mass,
                           static_cast<float*>(loss.mutable_data_ptr()),
                           static_cast<float*>(gradient.mutable_data_ptr())};
  mmd_cpu(problem, aten_parallel_for);
  return {loss, gradient};
}

}  // namespace proto_reg

PROTO_REG_IMPL(CPU, proto_reg::Cpu)

STABLE_TORCH_LIBRARY_IMPL(proto_reg, CPU, library) {
  library.impl("anchored_mmd_loss", TORCH_BOX(&proto_reg::anchored_mmd_loss));
}
