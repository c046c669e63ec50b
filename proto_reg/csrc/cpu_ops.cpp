// Registers the CPU kernels for the operators that the modules of proto_reg/kernels define: checks the arguments, and
// turns tensors into the plain pointers that the kernels take. PyTorch's dispatcher calls these functions.
#include <array>
#include <cstring>
#include <string>

#include "binding.h"
#include "mmd_cpu.h"
#include "rows_cpu.h"
#include "sinkhorn_cpu.h"
#include "step_cpu.h"

namespace proto_reg {

// Uses ATen's own threads, so that torch.set_num_threads applies.
void aten_parallel_for(int64_t count, Task task, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) task(context, index);
  });
}

struct Cpu {
  static constexpr bool POTENTIALS = false;
  static void run(const SinkhornProblem& problem, const Tensor&) { sinkhorn_cpu(problem, aten_parallel_for); }
};

std::tuple<Tensor, Tensor> anchored_mmd_loss(const Tensor& z_, const Tensor& anchors_, const Tensor& assignments_,
    const OptionalTensor& mask_, std::vector<double> scales, bool unbiased, bool by_mass) {
  const Tensor z = as_contiguous(z_), anchors = as_contiguous(anchors_), assignments = as_contiguous(assignments_);
  const OptionalTensor mask = as_contiguous(mask_);
  STD_TORCH_CHECK(z.dim() == 2 && anchors.dim() == 2 && z.size(1) == anchors.size(1) && z.size(1) > 0 &&
      z.scalar_type() == ScalarType::Float && anchors.scalar_type() == ScalarType::Float,
      "z, anchors: expected float32 (N, D) and (K, D)");
  STD_TORCH_CHECK(assignments.numel() == z.size(0) && assignments.scalar_type() == ScalarType::Long,
      "assignments: expected int64 (N,)");
  STD_TORCH_CHECK(!mask || (mask->numel() == z.size(0) && mask->scalar_type() == ScalarType::Bool),
      "mask: expected bool (N,)");
  Tensor loss = empty(z, {}, ScalarType::Float), gradient = empty(z, {z.size(0), z.size(1)}, ScalarType::Float);
  const MmdProblem problem{static_cast<const float*>(z.const_data_ptr()),
                           static_cast<const float*>(anchors.const_data_ptr()),
                           static_cast<const int64_t*>(assignments.const_data_ptr()),
                           mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
                           z.size(0), anchors.size(0), z.size(1), 1.0, std::move(scales), unbiased, by_mass,
                           static_cast<float*>(loss.mutable_data_ptr()),
                           static_cast<float*>(gradient.mutable_data_ptr())};
  mmd_cpu(problem, aten_parallel_for);
  return {loss, gradient};
}

// A contiguous float32 matrix, for the row by row steps.
struct Matrix {
  Tensor tensor;
  int64_t rows, dim;

  explicit Matrix(const Tensor& given) : tensor(as_contiguous(given)) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Float, "expected a float32 matrix");
    rows = tensor.size(0), dim = tensor.size(1);
  }
  const float* data() const { return static_cast<const float*>(tensor.const_data_ptr()); }
  Tensor like() const { return empty(tensor, {rows, dim}, ScalarType::Float); }
};

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> unit_rows(const Tensor& x_) {
  const Matrix x(x_);
  Tensor unit = x.like(), inverse_norms = empty(x_, {x.rows, 1}, ScalarType::Float);
  unit_rows_cpu(x.data(), x.rows, x.dim, data(unit), data(inverse_norms));
  return {unit, inverse_norms};
}

Tensor unit_rows_pull_back(const Tensor& gradient_, const Tensor& unit_, const Tensor& inverse_norms_) {
  const Matrix gradient(gradient_), unit(unit_), inverse_norms(inverse_norms_);
  STD_TORCH_CHECK(unit.rows == gradient.rows && unit.dim == gradient.dim &&
      inverse_norms.rows * inverse_norms.dim == unit.rows, "expected matrices of one shape and a norm for each row");
  Tensor by_x = gradient.like();
  unit_rows_pull_back_cpu(gradient.data(), unit.data(), inverse_norms.data(), unit.rows, unit.dim, data(by_x));
  return by_x;
}

std::tuple<Tensor, Tensor> balance(const Tensor& a_, const Tensor& b_, double weight_a, double weight_b) {
  const Matrix a(a_), b(b_);
  STD_TORCH_CHECK(a.rows == b.rows && a.dim == b.dim, "expected two matrices of one shape");
  Tensor direction = a.like(), scale = empty(a_, {}, ScalarType::Float);
  const double weights[] = {weight_a, weight_b};
  balance_cpu(a.data(), b.data(), a.rows, a.dim, weights, data(direction), data(scale));
  return {direction, scale};
}

// Which rows count: one bool for each row, or one for all.
struct Flags {
  OptionalTensor tensor;

  Flags(const OptionalTensor& given, int64_t rows) : tensor(as_contiguous(given)) {
    STD_TORCH_CHECK(!tensor || (tensor->scalar_type() == ScalarType::Bool &&
        (tensor->dim() == 0 || tensor->numel() == rows)), "counted: expected bool for each row or for all");
  }
  Counted counted() const {
    if (!tensor) return {};
    return {static_cast<const bool*>(tensor->const_data_ptr()), tensor->dim() > 0 ? 1 : 0};
  }
};

Tensor typical_sums(const Tensor& x_, const Tensor& index_, const OptionalTensor& counted_, const Tensor& prototypes_,
    double std) {
  const Matrix x(x_), prototypes(prototypes_);
  const Tensor index = as_contiguous(index_);
  const Flags flags(counted_, x.rows);
  STD_TORCH_CHECK(index.numel() == x.rows && index.scalar_type() == ScalarType::Long,
      "index: expected int64 for each row");
  STD_TORCH_CHECK(prototypes.dim == x.dim, "expected (N, D) rows and (K, D) prototypes");
  const int64_t groups = prototypes.rows, stride = x.dim + 1;
  Tensor sums = empty(x_, {groups, stride}, ScalarType::Float);
  std::memset(data(sums), 0, sizeof(float) * groups * stride);
  add_typical_cpu(x.data(), static_cast<const int64_t*>(index.const_data_ptr()), flags.counted(), prototypes.data(),
                  x.rows, x.dim, groups, std, data(sums), stride, data(sums) + x.dim, stride);
  return sums;
}

// State of `numel` entries that an operator adds to; null: not kept.
float* state(const OptionalTensor& tensor, int64_t numel) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Float && tensor->numel() == numel,
      "expected contiguous float32 state of the prototypes' sizes");
  return data(*tensor);
}

// Codes, potentials, and the number of iterations of each group.
std::tuple<Tensor, Tensor, Tensor> sinkhorn_counted(const Tensor& scores, const OptionalTensor& marginals,
    const OptionalTensor& weights, double epsilon, int64_t num_iters, std::optional<double> tol, bool isolate) {
  Call call(scores, marginals, weights, epsilon, num_iters, tol, isolate);
  Tensor codes = call.like_scores(), potentials = call.potentials(),
         iterations = scores.dim() == 3 ? empty(scores, {call.problem.groups}, ScalarType::Long)
                                        : empty(scores, {}, ScalarType::Long);
  call.problem.codes = codes.mutable_data_ptr();
  call.problem.iterations = static_cast<int64_t*>(iterations.mutable_data_ptr());
  Cpu::run(call.problem, call.scores);
  return {codes, potentials, iterations};
}

// The gradients by float32 scores, marginals and weights; empty where there are no marginals or weights.
std::tuple<Tensor, Tensor, Tensor> sinkhorn_gradient(const Tensor& scores, const OptionalTensor& marginals,
    const OptionalTensor& weights, double epsilon, int64_t num_iters, std::optional<double> tol,
    const Tensor& by_codes_, const OptionalTensor& by_potentials_) {
  Call call(scores, marginals, weights, epsilon, num_iters, tol, false);
  const Tensor by_codes = as_contiguous(by_codes_);
  const OptionalTensor by_potentials = as_contiguous(by_potentials_);
  const SinkhornProblem& problem = call.problem;
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && by_codes.scalar_type() == ScalarType::Float &&
      by_codes.numel() == scores.numel(), "scores, by_codes: expected float32 tensors of one shape");
  const auto like = [&](const OptionalTensor& given, int64_t last) {
    return !given             ? empty(scores, {0}, ScalarType::Float)
           : scores.dim() > 2 ? empty(scores, {problem.groups, last}, ScalarType::Float)
                              : empty(scores, {last}, ScalarType::Float);
  };
  Tensor by_scores = call.like_scores(), by_marginals = like(marginals, problem.columns),
         by_weights = like(weights, problem.rows);
  sinkhorn_gradient_cpu({problem, data(by_codes), state(by_potentials, problem.groups * problem.columns),
                         data(by_scores), marginals ? data(by_marginals) : nullptr,
                         weights ? data(by_weights) : nullptr}, aten_parallel_for);
  return {by_scores, by_marginals, by_weights};
}

int64_t* integers(const OptionalTensor& tensor, int64_t numel) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Long && tensor->numel() == numel,
      "expected contiguous int64 state of the prototypes' sizes");
  return static_cast<int64_t*>(tensor->mutable_data_ptr());
}

float scalar(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float, "expected a float32 scalar");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

void tally(Tensor counts, Tensor totals, const Tensor& x_, const Tensor& scores_, const Tensor& prototypes_,
           const OptionalTensor& counted_, const Tensor& prototype_loss, const Tensor& mmd_loss) {
  const Matrix x(x_), scores(scores_), prototypes(prototypes_);
  const Flags flags(counted_, x.rows);
  STD_TORCH_CHECK(scores.rows == x.rows && scores.dim == prototypes.rows && prototypes.dim == x.dim,
      "expected (N, D) latents, (N, K) scores and (K, D) prototypes");
  tally_cpu(x.data(), scores.data(), prototypes.data(), flags.counted(), x.rows, x.dim, prototypes.rows,
            scalar(prototype_loss), scalar(mmd_loss), integers(counts, prototypes.rows), state(totals, 4));
}

void follow(Tensor prototypes, Tensor sums, Tensor weight_sums, Tensor last_prototypes, double rate) {
  STD_TORCH_CHECK(prototypes.dim() == 2, "expected (K, D) prototypes");
  const int64_t rows = prototypes.size(0), dim = prototypes.size(1);
  follow_cpu(state(prototypes, rows * dim), state(sums, rows * dim), state(weight_sums, rows),
             state(last_prototypes, rows * dim), rows,
             dim, static_cast<float>(rate));
}

std::tuple<Tensor, Tensor> attach(const Tensor& gradient_, const Tensor& direction_, const Tensor& step_) {
  const Tensor gradient = as_contiguous(gradient_), direction = as_contiguous(direction_);
  const Matrix step(step_);
  STD_TORCH_CHECK(gradient.scalar_type() == ScalarType::Float && direction.scalar_type() == ScalarType::Float &&
      gradient.numel() == direction.numel(), "expected two float32 tensors of one shape");
  Tensor by_z = torch::stable::empty_like(gradient), by_parameter = step.like();
  const int64_t dim = gradient.dim() > 0 ? gradient.size(gradient.dim() - 1) : 1;
  attach_cpu(static_cast<const float*>(gradient.const_data_ptr()), static_cast<const float*>(direction.const_data_ptr()),
             dim > 0 ? gradient.numel() / dim : 0, dim, step.data(), step.rows * step.dim, data(by_z),
             data(by_parameter));
  return {by_z, by_parameter};
}

// ATen's own product, with its threads and libraries. Autocast does not change mm.out.
void aten_multiply(const Product& product) {
  const auto wrap = [](const float* memory, bool transposed, int64_t rows, int64_t columns) {
    const int64_t sizes[] = {rows, columns}, strides[] = {transposed ? 1 : columns, transposed ? rows : 1};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<float*>(memory), 2, sizes, strides, 0, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
        &handle));
    return Tensor(handle);
  };
  const Tensor a = wrap(product.a, product.a_transposed, product.rows, product.inner);
  const Tensor b = wrap(product.b, product.b_transposed, product.inner, product.columns);
  const Tensor out = wrap(product.out, false, product.rows, product.columns);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// The shares of prototype loss and MMD: two numbers, or one for both.
std::array<double, 2> shares_of(const OptionalTensor& given) {
  const OptionalTensor shares = as_contiguous(given);
  if (!shares) return {1.0, 1.0};
  if (shares->numel() == 1) return {scalar(*shares), scalar(*shares)};
  const bool pair = shares->numel() == 2 && shares->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(pair, "shares: expected float32 () or (2,)");
  const float* values = static_cast<const float*>(shares->const_data_ptr());
  return {values[0], values[1]};
}

Similarity similarity_of(const std::string& name) {
  STD_TORCH_CHECK(name == "cosine" || name == "dot" || name == "euclidean", "similarity: expected cosine, dot or euclidean");
  return name == "cosine" ? Similarity::cosine : name == "dot" ? Similarity::dot : Similarity::euclidean;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> balanced_step(const Tensor& z_,
    const OptionalTensor& mask_, Tensor prototypes_, const OptionalTensor& marginals_, const OptionalTensor& shares_,
    const OptionalTensor& sharpness, std::string similarity, double std, double epsilon, int64_t num_iters,
    std::optional<double> tol, bool isolate, double temperature, std::vector<double> scales, bool unbiased,
    bool by_mass, double prototype_weight, double mmd_weight, OptionalTensor sums, OptionalTensor weight_sums,
    OptionalTensor last_prototypes, double follow_rate, OptionalTensor usage, OptionalTensor totals,
    OptionalTensor steps, OptionalTensor ring, OptionalTensor written, int64_t at_once) {
  const Matrix z(z_), prototypes(prototypes_);
  const Flags flags(mask_, z.rows);
  const OptionalTensor marginals = as_contiguous(marginals_);
  const int64_t rows = z.rows, dim = z.dim, groups = prototypes.rows;
  STD_TORCH_CHECK(rows > 0 && groups > 0 && dim > 0 && prototypes.dim == dim, "expected (N, D) latents, (K, D) prototypes");
  STD_TORCH_CHECK(!last_prototypes || (sums && prototypes_.is_contiguous()),
      "expected contiguous prototypes and their sums");
  const std::array<double, 2> shares = shares_of(shares_);
  const int64_t slots = ring && dim > 0 ? ring->numel() / dim : 0;
  STD_TORCH_CHECK(!sums == !weight_sums && !usage == !totals && !usage == !steps && !ring == !written,
      "expected a state's tensors together");
  Tensor direction = z.like(), step = prototypes.like(), codes = empty(z_, {rows, groups}, ScalarType::Float),
         found = empty(z_, {rows, groups}, ScalarType::Float), assignments = empty(z_, {rows}, ScalarType::Long),
         loss = empty(z_, {}, ScalarType::Float), prototype_loss = empty(z_, {}, ScalarType::Float),
         mmd_loss = empty(z_, {}, ScalarType::Float);
  const StepProblem problem{
      z.data(), flags.counted().flags, static_cast<float*>(prototypes.tensor.mutable_data_ptr()), state(marginals, groups),
      rows, groups, dim, similarity_of(similarity), std, sharpness ? scalar(*sharpness) : 1.0, epsilon, num_iters,
      tol.value_or(-1.0), isolate, temperature, std::move(scales), unbiased, by_mass, prototype_weight, mmd_weight,
      follow_rate, {shares[0], shares[1]}, state(sums, groups * dim), state(weight_sums, groups),
      state(last_prototypes, groups * dim), integers(usage, groups), integers(steps, 1), state(totals, 4),
      state(ring, slots * dim), integers(written, 1), slots, at_once, data(direction),
      data(step), data(loss), data(prototype_loss), data(mmd_loss), data(found), data(codes),
      integers(assignments, rows)};
  step_cpu(problem, aten_parallel_for, aten_multiply);
  return {direction, step, loss, prototype_loss, mmd_loss, found, codes, assignments};
}

}  // namespace proto_reg

PROTO_REG_IMPL(CPU, proto_reg::Cpu)

STABLE_TORCH_LIBRARY_IMPL(proto_reg, CPU, library) {
  library.impl("sinkhorn_counted", TORCH_BOX(&proto_reg::sinkhorn_counted));
  library.impl("sinkhorn_gradient", TORCH_BOX(&proto_reg::sinkhorn_gradient));
  library.impl("anchored_mmd_loss", TORCH_BOX(&proto_reg::anchored_mmd_loss));
  library.impl("unit_rows", TORCH_BOX(&proto_reg::unit_rows));
  library.impl("unit_rows_pull_back", TORCH_BOX(&proto_reg::unit_rows_pull_back));
  library.impl("balance", TORCH_BOX(&proto_reg::balance));
  library.impl("typical_sums", TORCH_BOX(&proto_reg::typical_sums));
  library.impl("tally_float32", TORCH_BOX(&proto_reg::tally));
  library.impl("follow_float32", TORCH_BOX(&proto_reg::follow));
  library.impl("attach", TORCH_BOX(&proto_reg::attach));
  library.impl("balanced_step", TORCH_BOX(&proto_reg::balanced_step));
}
