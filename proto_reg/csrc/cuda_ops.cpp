// Registers the CUDA kernels for the Sinkhorn operators that proto_reg/kernels/sinkhorn.py defines. PyTorch's
// dispatcher calls them.
#include <torch/csrc/stable/accelerator.h>

#include "binding.h"
#include "sinkhorn_cuda.h"

// From libtorch_cuda. Weak, so that the library also loads with a PyTorch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace proto_reg {

struct Cuda {
  static constexpr bool POTENTIALS = true;  // always written

  static void run(const SinkhornProblem& problem, const Tensor& scores) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "proto_reg: this PyTorch is built without CUDA");
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(scores.get_device_index(), &stream));
    // Freeing it on return is safe, because the allocator reuses it in the order of the stream.
    std::optional<Tensor> workspace;
    const auto allocate = [&](const SinkhornPlan& plan) -> float* {
      if (plan.workspace_floats == 0) return nullptr;
      workspace = empty(scores, {plan.workspace_floats}, ScalarType::Float);
      return static_cast<float*>(workspace->mutable_data_ptr());
    };
    const char* const error = run_sinkhorn_cuda(problem, allocate, stream);
    STD_TORCH_CHECK(error == nullptr, "proto_reg: CUDA: ", error);
  }
};

}  // namespace proto_reg

PROTO_REG_IMPL(CUDA, proto_reg::Cuda)
