// What cpu_ops.cpp and cuda_ops.cpp share: turns PyTorch's arguments of the Sinkhorn operators into a SinkhornProblem.
// It uses the stable ABI alone, so that one library serves every later PyTorch and Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "sinkhorn_problem.h"

namespace proto_reg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::f32 ? ScalarType::Float : dtype == Dtype::f16 ? ScalarType::Half : ScalarType::BFloat16;
}

inline Dtype problem_dtype(const Tensor& scores) {
  switch (scores.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, "scores: compiled kernels take float32, float16 and bfloat16; use backend='torch'");
  }
}

// A contiguous tensor on the device of `like`. The shim is several times as fast as a call through the dispatcher.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  std::array<int64_t, 3> sizes{}, strides{};
  const int64_t rank = static_cast<int64_t>(shape.size());
  std::copy(shape.begin(), shape.end(), sizes.begin());
  for (int64_t axis = rank - 1, stride = 1; axis >= 0; stride *= sizes[axis--]) strides[axis] = stride;
  AtenTensorHandle handle;
  const int32_t code = dtype == ScalarType::Float  ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Long ? aoti_torch_dtype_int64()
                       : dtype == ScalarType::Half ? aoti_torch_dtype_float16()
                                                   : aoti_torch_dtype_bfloat16();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      rank, sizes.data(), strides.data(), code, like.is_cuda() ? aoti_torch_device_type_cuda()
                                                               : aoti_torch_device_type_cpu(),
      like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

// The arguments that all operators share. It owns the contiguous inputs while kernels run.
struct Call {
  Tensor scores;
  OptionalTensor marginals, weights;
  SinkhornProblem problem{};

  Call(const Tensor& scores_, const OptionalTensor& marginals_, const OptionalTensor& weights_,
       double epsilon, int64_t num_iters, std::optional<double> tol, bool isolate)
      : scores(as_contiguous(scores_)), marginals(as_contiguous(marginals_)), weights(as_contiguous(weights_)) {
    const int64_t rank = scores.dim();
    STD_TORCH_CHECK(rank == 2 || rank == 3, "scores: expected (B, K) or (G, B, K)");
    problem.dtype = problem_dtype(scores);
    problem.scores = scores.const_data_ptr();
    problem.groups = rank == 3 ? scores.size(0) : 1;
    problem.rows = scores.size(rank - 2);
    problem.columns = scores.size(rank - 1);
    STD_TORCH_CHECK(problem.groups > 0 && problem.rows > 0 && problem.columns > 0, "scores: expected a non-empty tensor");
    if (marginals) set_marginals();
    if (weights) set_weights();
    problem.epsilon = epsilon;
    problem.num_iters = num_iters;
    problem.tol = tol.value_or(-1.0);
    problem.isolate = isolate;
  }

  Tensor potentials() {
    Tensor result = scores.dim() == 3 ? empty(scores, {problem.groups, problem.columns}, ScalarType::Float)
                                      : empty(scores, {problem.columns}, ScalarType::Float);
    problem.potentials = static_cast<float*>(result.mutable_data_ptr());
    return result;
  }

  // A matrix of the shape and dtype of the scores.
  Tensor like_scores() const {
    const ScalarType dtype = scalar_type(problem.dtype);
    return scores.dim() == 3 ? empty(scores, {problem.groups, problem.rows, problem.columns}, dtype)
                             : empty(scores, {problem.rows, problem.columns}, dtype);
  }

 private:
  void set_marginals() {
    const bool shared = marginals->dim() == 1;
    STD_TORCH_CHECK(marginals->scalar_type() == ScalarType::Float &&
        marginals->numel() == (shared ? 1 : problem.groups) * problem.columns,
        "marginals: expected float32 (K,) or (G, K)");
    problem.marginals = static_cast<const float*>(marginals->const_data_ptr());
    problem.marginals_stride = shared ? 0 : problem.columns;
  }

  void set_weights() {
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float && weights->numel() == problem.groups * problem.rows,
        "weights: expected float32 (B,) or (G, B)");
    problem.weights = static_cast<const float*>(weights->const_data_ptr());
  }
};

// The operators for a Device, which has a static run(problem, scores). POTENTIALS: run always writes potentials.
template <class Device>
struct Ops {
  // Only codes: the other outputs cost as much time as a small problem.
  static Tensor sinkhorn_codes(const Tensor& scores, double epsilon, int64_t num_iters, const OptionalTensor& marginals,
      const OptionalTensor& weights, std::optional<double> tol, bool isolate) {
    Call call(scores, marginals, weights, epsilon, num_iters, tol, isolate);
    Tensor codes = call.like_scores();
    const OptionalTensor unasked = Device::POTENTIALS ? OptionalTensor(call.potentials()) : std::nullopt;
    call.problem.codes = codes.mutable_data_ptr();
    Device::run(call.problem, call.scores);
    return codes;
  }

  static std::tuple<Tensor, Tensor> sinkhorn(const Tensor& scores, const OptionalTensor& marginals,
      const OptionalTensor& weights, double epsilon, int64_t num_iters, std::optional<double> tol, bool isolate) {
    Call call(scores, marginals, weights, epsilon, num_iters, tol, isolate);
    Tensor codes = call.like_scores();
    Tensor potentials = call.potentials();
    call.problem.codes = codes.mutable_data_ptr();
    Device::run(call.problem, call.scores);
    return {codes, potentials};
  }

  static Tensor sinkhorn_out(const Tensor& scores, const OptionalTensor& marginals, const OptionalTensor& weights,
      double epsilon, int64_t num_iters, std::optional<double> tol, bool isolate, Tensor codes) {
    Call call(scores, marginals, weights, epsilon, num_iters, tol, isolate);
    STD_TORCH_CHECK(codes.is_contiguous() && codes.numel() == call.scores.numel() &&
        codes.scalar_type() == scores.scalar_type(),
        "codes: expected a contiguous tensor of the shape and dtype of scores");
    STD_TORCH_CHECK(codes.const_data_ptr() != call.problem.scores, "codes: expected memory of its own, not the scores'");
    Tensor potentials = call.potentials();
    call.problem.codes = codes.mutable_data_ptr();
    Device::run(call.problem, call.scores);
    return potentials;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_cross_entropy(const Tensor& scores,
      const OptionalTensor& marginals, const OptionalTensor& weights, double epsilon, int64_t num_iters,
      std::optional<double> tol, bool isolate, double temperature, bool with_codes) {
    Call call(scores, marginals, weights, epsilon, num_iters, tol, isolate);
    STD_TORCH_CHECK(scores.dim() == 2, "scores: expected (B, K)");
    Tensor loss = empty(scores, {}, ScalarType::Float);
    Tensor gradient = call.like_scores();
    Tensor potentials = call.potentials();
    Tensor codes = with_codes ? call.like_scores() : empty(scores, {0, call.problem.columns}, scores.scalar_type());
    call.problem.temperature = temperature;
    call.problem.loss = static_cast<float*>(loss.mutable_data_ptr());
    call.problem.gradient = gradient.mutable_data_ptr();
    call.problem.codes = with_codes ? codes.mutable_data_ptr() : nullptr;
    Device::run(call.problem, call.scores);
    return {loss, gradient, potentials, codes};
  }
};

}  // namespace proto_reg

// Registers the operators of Ops<DEVICE> under a dispatch key. Python defines their schemas and everything else.
#define PROTO_REG_IMPL(KEY, DEVICE)                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(proto_reg, KEY, library) {                                                  \
    library.impl("sinkhorn", TORCH_BOX(&proto_reg::Ops<DEVICE>::sinkhorn));                             \
    library.impl("sinkhorn_codes", TORCH_BOX(&proto_reg::Ops<DEVICE>::sinkhorn_codes));                 \
    library.impl("sinkhorn_out", TORCH_BOX(&proto_reg::Ops<DEVICE>::sinkhorn_out));                     \
    library.impl("sinkhorn_cross_entropy", TORCH_BOX(&proto_reg::Ops<DEVICE>::sinkhorn_cross_entropy)); \
  }
