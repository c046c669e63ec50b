// Registers the CPU kernels behind the ops that proto_reg/kernels/sinkhorn.py and mmd.py define.
#include "binding.h"
#include "mmd_cpu.h"
#include "rows_cpu.h"
#include "sinkhorn_cpu.h"

namespace proto_reg {

// ATen's own threads: torch.set_num_threads holds.
void aten_parallel_for(int64_t count, Task task, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) task(context, index);
  });
}

struct Cpu {
  static constexpr bool POTENTIALS = false;
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

// A contiguous float32 matrix of the layer's row by row steps.
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
  STD_TORCH_CHECK(
      unit.rows == gradient.rows && unit.dim == gradient.dim && inverse_norms.rows * inverse_norms.dim == unit.rows,
      "expected matrices of one shape and a norm for each row");
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

// Which rows count: bool for each, or one for all.
struct Counted {
  std::optional<Tensor> tensor;

  Counted(const std::optional<Tensor>& given, int64_t rows) : tensor(as_contiguous(given)) {
    STD_TORCH_CHECK(
        !tensor || (tensor->scalar_type() == ScalarType::Bool && (tensor->dim() == 0 || tensor->numel() == rows)),
        "counted: expected bool for each row or for all");
  }
  const bool* data() const { return tensor ? static_cast<const bool*>(tensor->const_data_ptr()) : nullptr; }
  int64_t stride() const { return tensor && tensor->dim() > 0 ? 1 : 0; }
};

Tensor sums_by_group(const Tensor& x_, const Tensor& index_, const std::optional<Tensor>& counted_, int64_t groups) {
  const Matrix x(x_);
  const Tensor index = as_contiguous(index_);
  const Counted counted(counted_, x.rows);
  STD_TORCH_CHECK(index.numel() == x.rows && index.scalar_type() == ScalarType::Long,
                  "index: expected int64 for each row");
  Tensor sums = empty(x_, {groups, x.dim + 1}, ScalarType::Float);
  sums_by_group_cpu(x.data(), static_cast<const int64_t*>(index.const_data_ptr()), counted.data(), counted.stride(),
                    x.rows, x.dim, groups, data(sums));
  return sums;
}

void tally(Tensor counts, Tensor totals, const Tensor& x_, const Tensor& scores_, const Tensor& prototypes_,
           const std::optional<Tensor>& counted_, const Tensor& prototype_loss, const Tensor& mmd_loss) {
  const Matrix x(x_), scores(scores_), prototypes(prototypes_);
  const Counted counted(counted_, x.rows);
  STD_TORCH_CHECK(
      counts.is_contiguous() && counts.scalar_type() == ScalarType::Long && counts.numel() == prototypes.rows &&
          totals.is_contiguous() && totals.scalar_type() == ScalarType::Float && totals.numel() == 4,
      "expected (K,) int64 counts and (4,) float32 totals");
  STD_TORCH_CHECK(scores.rows == x.rows && scores.dim == prototypes.rows && prototypes.dim == x.dim,
                  "expected (N, D) latents, (N, K) scores and (K, D) prototypes");
  STD_TORCH_CHECK(
      prototype_loss.numel() == 1 && mmd_loss.numel() == 1 && prototype_loss.scalar_type() == ScalarType::Float &&
          mmd_loss.scalar_type() == ScalarType::Float,
      "expected two losses, float32 scalars");
  float* sums = data(totals);
  sums[0] += *static_cast<const float*>(prototype_loss.const_data_ptr());
  sums[1] += *static_cast<const float*>(mmd_loss.const_data_ptr());
  sums[2] += 1;
  sums[3] += tally_cpu(x.data(), scores.data(), prototypes.data(), counted.data(), counted.stride(), x.rows, x.dim,
                       prototypes.rows, static_cast<int64_t*>(counts.mutable_data_ptr()));
}

void follow(Tensor prototypes, Tensor sums, Tensor counts, Tensor seen, double rate) {
  for (const Tensor& tensor : {prototypes, sums, counts, seen})
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float, "expected contiguous float32");
  const int64_t rows = prototypes.size(0), dim = prototypes.size(1);
  STD_TORCH_CHECK(
      sums.numel() == rows * dim && seen.numel() == rows * dim && counts.numel() == rows,
      "expected (K, D) prototypes, sums and seen, and (K,) counts");
  follow_cpu(data(prototypes), data(sums), data(counts), data(seen), rows, dim, static_cast<float>(rate));
}

}  // namespace proto_reg

PROTO_REG_IMPL(CPU, proto_reg::Cpu)

STABLE_TORCH_LIBRARY_IMPL(proto_reg, CPU, library) {
  library.impl("anchored_mmd_loss", TORCH_BOX(&proto_reg::anchored_mmd_loss));
  library.impl("unit_rows", TORCH_BOX(&proto_reg::unit_rows));
  library.impl("unit_rows_pull_back", TORCH_BOX(&proto_reg::unit_rows_pull_back));
  library.impl("balance", TORCH_BOX(&proto_reg::balance));
  library.impl("sums_by_group", TORCH_BOX(&proto_reg::sums_by_group));
  library.impl("tally_float32", TORCH_BOX(&proto_reg::tally));
  library.impl("follow_float32", TORCH_BOX(&proto_reg::follow));
}
