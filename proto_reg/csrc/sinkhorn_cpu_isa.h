// Everything that is compiled once per instruction set. Included by sinkhorn_cpu.cpp inside a namespace and target of
// its own; hence no include guard.

namespace lanes8 {
#define LANES int64_t{8}
#include "sinkhorn_cpu_vector.h"
}  // namespace lanes8

// One of the problem's independent matrices. Half precision is converted row by row: inside, all is float32.
struct Group {
  const void* scores;
  Dtype dtype;
  const float* marginals;  // null: uniform
  const float* weights;    // null: 1
  int64_t rows, columns;
  double marginals_total, epsilon, temperature, total_weight, gradient_scale;
  bool isolate;
  void* codes;     // null: not wanted
  void* gradient;  // null: not wanted

  float weight(int64_t i) const { return weights ? weights[i] : 1.f; }
  double marginal(int64_t k) const { return marginals ? marginals[k] / marginals_total : 1.0 / columns; }

  float first() const {
    float score;
    if (dtype == Dtype::f32) return *static_cast<const float*>(scores);
    lanes8::widen(dtype, scores, 1, &score);
    return score;
  }

  // Row i of the scores; of another dtype than float32, converted into `buffer` by vectors of this or that width.
  INLINE const float* row(int64_t i, float* buffer, decltype(&lanes8::widen) widen = lanes8::widen) const {
    if (dtype == Dtype::f32) return static_cast<const float*>(scores) + i * columns;
    widen(dtype, static_cast<const uint16_t*>(scores) + i * columns, columns, buffer);
    return buffer;
  }

  // Where row i of an output is to be written: in place, or into `buffer` for `finish` to convert. null stays null.
  float* output(void* matrix, int64_t i, float* buffer) const {
    if (!matrix) return nullptr;
    return dtype == Dtype::f32 ? static_cast<float*>(matrix) + i * columns : buffer;
  }
  void finish(const float* row, void* matrix, int64_t i) const {
    if (row && dtype != Dtype::f32) lanes8::narrow(dtype, row, columns, static_cast<uint16_t*>(matrix) + i * columns);
  }
};

namespace lanes8 {
#include "sinkhorn_cpu_rows.h"
#include "sinkhorn_cpu_linear.h"
#undef LANES
}  // namespace lanes8

// Vectors of the machine's own width, where that is another one: sixteen lanes pay on long rows, four lanes everywhere.
#if MACHINE_LANES == 8
namespace machine = lanes8;
#else
namespace machine {
#define LANES int64_t{MACHINE_LANES}
#include "sinkhorn_cpu_vector.h"
#include "sinkhorn_cpu_rows.h"
#include "sinkhorn_cpu_linear.h"
#undef LANES
}  // namespace machine
#endif

namespace lanes8 {
#define LANES int64_t{8}
#include "sinkhorn_cpu_narrow.h"
#include "sinkhorn_cpu_log.h"
#undef LANES
}  // namespace lanes8

namespace short_rows {
using namespace machine;
#define LANES int64_t{MACHINE_LANES}
#include "sinkhorn_cpu_small.h"
#undef LANES
}  // namespace short_rows

// One group from scores to codes, gradient and loss.
struct Solver {
  const SinkhornProblem& problem;
  const Chunks chunks;
  const ParallelFor parallel_for;
  Group group;
  float* potentials;  // null: not wanted
  double* losses;  // (chunks,), each a sum over the chunk's rows

  template <class Body>
  void each_chunk(const Body& body) const {
    const auto task = [](void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); };
    if (chunks.count == 1) body(0);
    else parallel_for(chunks.count, task, const_cast<Body*>(&body));
  }

  // The fast paths; false, with nothing of worth written, where they are not safe.
  bool run_small() const {
    using short_rows::Small;
    const bool wide = group.dtype == Dtype::f32;
    const int64_t count = group.rows * group.columns, converted_count = wide ? 0 : count;
    const int64_t rows = Small::rounded(group.rows), columns = Small::rounded(group.columns);
    Workspace workspace(rows * columns, columns, columns, converted_count, converted_count, converted_count);
    float *e = workspace[0], *converted = workspace[3], *codes = workspace[4], *gradient = workspace[5];
    if (!wide) lanes8::widen(group.dtype, group.scores, count, converted);
    const Small small{group, wide ? static_cast<const float*>(group.scores) : converted, e, workspace[1],
                      workspace[2], group.output(group.codes, 0, codes), group.output(group.gradient, 0, gradient)};
    if (!small.exponentials()) return false;
    for (int64_t iteration = 1; iteration < problem.num_iters; ++iteration)
      if (!small.balance(problem.tol)) break;
    if (potentials) small.write_potentials(potentials);
    losses[0] = small.write();
    if (!wide && group.codes) lanes8::narrow(group.dtype, codes, count, group.codes);
    if (!wide && group.gradient) lanes8::narrow(group.dtype, gradient, count, group.gradient);
    return true;
  }

  template <class Linear>
  bool run_linear() const {
    // E takes the place of a float32 output, so that it costs no memory of its own. Beside half precision it would;
    // above 32 MiB, which C libraries hand back after every call, that takes longer than to compute E in each of a few
    // passes.
    const int64_t count = group.rows * group.columns;
    const bool wide = group.dtype == Dtype::f32, kept = count <= 1 << 23 || problem.num_iters > 8;
    Workspace workspace(!wide && kept ? count : 0, chunks.padded, chunks.count * chunks.padded,
                        3 * chunks.count * chunks.padded);
    std::vector<typename Linear::Range> extrema(chunks.count);
    float* e = wide ? static_cast<float*>(group.codes ? group.codes : group.gradient) : kept ? workspace[0] : nullptr;
    return iterate(Linear{group, chunks, e, workspace[1], workspace[2], extrema.data(), workspace[3], losses});
  }

  bool run_narrow() const {
    Workspace workspace(chunks.count * lanes8::Narrow::chunk_floats(chunks, group.columns), chunks.padded,
                        chunks.count * chunks.padded);
    std::vector<lanes8::Extrema> extrema(chunks.count);
    return iterate(
        lanes8::Narrow{group, chunks, workspace[0], workspace[1], workspace[2], extrema.data(), losses});
  }

  template <class Method>
  bool iterate(const Method& method) const {
    each_chunk([&](int64_t chunk) { method.exponentials(chunk); });
    if (!method.safe()) return false;
    method.update(true, -1);
    for (int64_t iteration = 1; iteration < problem.num_iters; ++iteration) {
      each_chunk([&](int64_t chunk) { method.balance(chunk); });
      if (!method.update(false, problem.tol)) break;
    }
    if (potentials) method.write_potentials(potentials);
    each_chunk([&](int64_t chunk) { method.write(chunk); });
    return true;
  }

  void run_logarithmic() {
    std::vector<double> doubles((1 + 2 * chunks.count) * group.columns);
    std::vector<float> floats(chunks.count * (group.columns + 3 * chunks.padded));
    const lanes8::Logarithmic method{group, chunks, doubles.data(), doubles.data() + group.columns, floats.data(), losses,
                             doubles.data() + (1 + chunks.count) * group.columns,
                             floats.data() + chunks.count * group.columns};
    set_total_weight([&](int64_t i) { return method.counts(i, 0); });
    if (group.total_weight > 0) {
      each_chunk([&](int64_t chunk) { method.column_tops(chunk); });
      method.join_tops();
      each_chunk([&](int64_t chunk) { method.first_sums(chunk); });
      method.first_update();
      for (int64_t iteration = 1; iteration < problem.num_iters; ++iteration) {
        each_chunk([&](int64_t chunk) { method.balance(chunk); });
        if (!method.update(problem.tol)) break;
      }
    }
    if (potentials) method.write_potentials(potentials);
    each_chunk([&](int64_t chunk) { method.write(chunk); });
  }

  template <class Counts>
  void set_total_weight(const Counts& counts) {
    group.total_weight = 0;
    if (!group.weights && !group.isolate) group.total_weight = static_cast<double>(group.rows);
    else
      for (int64_t i = 0; i < group.rows; ++i) group.total_weight += counts(i) ? group.weight(i) : 0.f;
    group.gradient_scale = group.total_weight > 0 ? 1 / (problem.temperature * group.total_weight) : 0;
  }

  // Row sums to the mean.
  float loss() const {
    const double total = std::accumulate(losses, losses + chunks.count, 0.0);
    return static_cast<float>(group.total_weight > 0 ? total / group.total_weight : 0);
  }
};

inline void solve(const SinkhornProblem& problem, int64_t index, const Chunks& chunks, ParallelFor parallel_for) {
  const int64_t size = problem.dtype == Dtype::f32 ? 4 : 2, offset = index * problem.rows * problem.columns * size;
  const auto at = [&](const void* base) { return base ? static_cast<const char*>(base) + offset : nullptr; };
  const float* marginals = problem.marginals ? problem.marginals + index * problem.marginals_stride : nullptr;
  const float* weights = problem.weights ? problem.weights + index * problem.rows : nullptr;
  const double total = marginals ? std::accumulate(marginals, marginals + problem.columns, 0.0) : 1;
  Group group{at(problem.scores), problem.dtype, marginals, weights, problem.rows, problem.columns, total,
              problem.epsilon, problem.temperature, 0, 0, problem.isolate, const_cast<char*>(at(problem.codes)),
              problem.loss ? const_cast<char*>(at(problem.gradient)) : nullptr};
  float* potentials = problem.potentials ? problem.potentials + index * problem.columns : nullptr;
  std::vector<double> losses(chunks.count);
  Solver solver{problem, chunks, parallel_for, group, potentials, losses.data()};
  solver.set_total_weight([](int64_t) { return true; });
  const bool small = chunks.count == 1 && problem.columns <= short_rows::Small::MOST_COLUMNS;
  // A single column has codes of exactly 1 and no gradient at all: divided by themselves, which scaling does not do.
  bool done = solver.group.total_weight > 0 && problem.columns > 1;
  if (done && problem.columns <= lanes8::Narrow::MOST_COLUMNS) done = solver.run_narrow();
  else if (done && small) done = solver.run_small();
  else if (done && (MACHINE_LANES < 8 || problem.columns >= 64)) done = solver.run_linear<machine::Linear>();
  else if (done) done = solver.run_linear<lanes8::Linear>();
  if (!done) solver.run_logarithmic();
  if (problem.loss) problem.loss[index] = solver.loss();
}
