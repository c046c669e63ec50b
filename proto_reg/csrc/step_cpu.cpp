// The layer's balanced training step on the CPU: calls the kernels for its parts one after the other.
// cpu_ops.cpp calls step_cpu.
#include "step_cpu.h"

#include <cmath>
#include <cstring>

#include "cpu_workspace.h"
#include "mmd_cpu.h"
#include "rows_cpu.h"

namespace proto_reg {
namespace {

struct BalancedStep {
  const StepProblem& problem;
  const ParallelFor parallel_for;
  const Multiply multiply;
  const int64_t latents = problem.rows * problem.dim, anchors = problem.groups * problem.dim,
                matrix = problem.rows * problem.groups;
  const Workspace workspace{latents, latents, latents, anchors, matrix, problem.rows, problem.rows, problem.groups,
                            problem.groups, anchors, PAST_END};
  // left, right: what is scored, either unit rows with 1 / their lengths (of_left, of_right), or the scaled rows
  // themselves.
  float *left = workspace[0], *by_tokens = workspace[1], *by_latents = workspace[2], *right = workspace[3],
        *by_scores = workspace[4], *of_left = workspace[5], *weights = workspace[6], *of_right = workspace[7],
        *potentials = workspace[8], *transposed = workspace[9];
  const bool cosine = problem.kind == Similarity::cosine;

  void follow() const {
    if (problem.last_prototypes)
      follow_cpu(problem.prototypes, problem.sums, problem.weight_sums, problem.last_prototypes, problem.groups, problem.dim,
                 static_cast<float>(problem.follow_rate));
  }

  void product(const Product& wanted) const {
    constexpr int64_t SMALL = 1 << 18;  // multiplications
    if (wanted.rows * wanted.inner * wanted.columns > SMALL) return multiply(wanted);
    const float* b = wanted.b;
    if (wanted.b_transposed) {
      for (int64_t j = 0; j < wanted.columns; ++j)
        for (int64_t d = 0; d < wanted.inner; ++d) transposed[d * wanted.columns + j] = b[j * wanted.inner + d];
      b = transposed;
    }
    product_cpu(wanted.a, wanted.a_transposed, b, wanted.rows, wanted.inner, wanted.columns, wanted.out);
  }

  void score() const {
    if (cosine) {
      unit_rows_cpu(problem.z, problem.rows, problem.dim, left, of_left);
      unit_rows_cpu(problem.prototypes, problem.groups, problem.dim, right, of_right);
    } else {  // copies, because products read past the end
      const float unit = static_cast<float>(1 / problem.std);
      for (int64_t d = 0; d < latents; ++d) left[d] = unit * problem.z[d];
      for (int64_t d = 0; d < anchors; ++d) right[d] = unit * problem.prototypes[d];
    }
    product({left, false, right, true, problem.rows, problem.dim, problem.groups, problem.scores});
    if (problem.kind != Similarity::euclidean) return;
    for (int64_t k = 0; k < problem.groups; ++k) {
      const float half = 0.5f * squares_cpu(right + k * problem.dim, problem.dim);
      for (int64_t i = 0; i < problem.rows; ++i) problem.scores[i * problem.groups + k] -= half;
    }
  }

  // Computes codes, assignments, and the prototype loss with its gradient by the scores.
  void assign() const {
    if (problem.mask)
      for (int64_t i = 0; i < problem.rows; ++i) weights[i] = problem.mask[i];
    SinkhornProblem balance{};
    balance.scores = problem.scores;
    balance.marginals = problem.marginals;
    balance.weights = problem.mask ? weights : nullptr;
    balance.groups = 1, balance.rows = problem.rows, balance.columns = problem.groups;
    balance.dtype = Dtype::f32;
    // To sharpen scores is to lower temperature and epsilon, also for the gradient.
    balance.epsilon = problem.epsilon / problem.sharpness;
    balance.temperature = problem.temperature / problem.sharpness;
    balance.num_iters = problem.num_iters, balance.tol = problem.tol, balance.isolate = problem.isolate;
    balance.codes = problem.codes, balance.potentials = potentials;
    balance.loss = problem.prototype_loss, balance.gradient = by_scores;
    sinkhorn_cpu(balance, parallel_for);
    argmax_cpu(problem.codes, problem.rows, problem.groups, problem.assignments);
  }

  // The gradient of the prototype loss by latents and prototypes. Its units do not matter, because add_up sets its
  // size.
  void pull_back() const {
    product({by_scores, false, right, false, problem.rows, problem.groups, problem.dim, by_tokens});
    product({by_scores, true, left, false, problem.groups, problem.rows, problem.dim, problem.step});
    if (cosine) {
      unit_rows_pull_back_cpu(by_tokens, left, of_left, problem.rows, problem.dim, by_tokens);
      unit_rows_pull_back_cpu(problem.step, right, of_right, problem.groups, problem.dim, problem.step);
    }
    if (problem.kind != Similarity::euclidean) return;
    for (int64_t k = 0; k < problem.groups; ++k) {
      float total = 0;
      for (int64_t i = 0; i < problem.rows; ++i) total += by_scores[i * problem.groups + k];
      for (int64_t d = k * problem.dim; d < (k + 1) * problem.dim; ++d) problem.step[d] -= total * right[d];
    }
  }

  void match() const {
    mmd_cpu({problem.z, problem.prototypes, problem.assignments, problem.mask, problem.rows, problem.groups, problem.dim,
             problem.std, problem.scales, problem.unbiased, problem.by_mass, problem.mmd_loss, by_latents},
            parallel_for);
  }

  // Adds both gradients at their weights.
  void add_up() const {
    const double sizes[] = {problem.shares[0] * problem.prototype_weight, problem.shares[1] * problem.mmd_weight};
    double loss = 0;
    // A loss with share 0 contributes nothing, not even its NaN.
    if (problem.shares[0] > 0) {
      loss += sizes[0] * *problem.prototype_loss;
    } else {
      std::memset(by_tokens, 0, sizeof(float) * latents);
      std::memset(problem.step, 0, sizeof(float) * anchors);
    }
    if (problem.shares[1] > 0) {
      loss += sizes[1] * *problem.mmd_loss;
    } else {
      std::memset(by_latents, 0, sizeof(float) * latents);
    }
    float scale;
    balance_cpu(by_tokens, by_latents, problem.rows, problem.dim, sizes, problem.direction, &scale);
    for (int64_t d = 0; d < anchors; ++d) problem.step[d] *= scale;
    *problem.loss = static_cast<float>(loss);
  }

  void track() const {
    const Counted counted{problem.mask, 1};
    // NaN codes do not say to which prototype a latent belongs.
    if (problem.sums && problem.shares[0] > 0 && std::isfinite(*problem.prototype_loss))
      add_typical_cpu(problem.z, problem.assignments, counted, problem.prototypes, problem.rows, problem.dim,
                      problem.groups, problem.std, problem.sums, problem.dim, problem.weight_sums, 1);
    if (problem.usage)
      tally_cpu(problem.z, problem.scores, problem.prototypes, counted, problem.rows, problem.dim, problem.groups,
                *problem.prototype_loss, *problem.mmd_loss, problem.usage, problem.totals);
    if (problem.steps) *problem.steps += 1;
    if (problem.ring)
      remember_cpu(problem.z, counted, problem.rows, problem.dim, problem.ring, problem.slots, problem.at_once,
                   problem.written);
  }
};

}  // namespace

void step_cpu(const StepProblem& problem, ParallelFor parallel_for, Multiply multiply) {
  const BalancedStep step{problem, parallel_for, multiply};
  step.follow();
  step.score();
  step.assign();
  step.pull_back();
  step.match();
  step.add_up();
  step.track();
}

}  // namespace proto_reg
