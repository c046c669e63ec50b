// The CPU's Sinkhorn kernel for one instruction set: chooses the form for each group, and runs it over the chunks.
// cpu_kernel_table.h puts solve_sinkhorn into the table of the instruction set.
#pragma once

#include "sinkhorn_cpu_lanes.h"
#include "sinkhorn_cpu_linear.h"
#include "sinkhorn_cpu_log.h"
#include "sinkhorn_cpu_small.h"

namespace proto_reg { namespace {

// Runs body(i) for i in [0, count), on any number of threads.
template <class Body>
inline void share(int64_t count, ParallelFor parallel_for, const Body& body) {
  const auto task = [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); };
  if (count == 1) body(0);
  else parallel_for(count, task, const_cast<Body*>(&body));
}

// Solves one group: from scores to codes, gradient and loss.
template <class Isa>
struct SinkhornGroupSolver {
  const SinkhornProblem& problem;
  const Chunks chunks;
  const ParallelFor parallel_for;
  Group group;
  float* potentials;  // null: not wanted
  double* losses;     // (chunks,), each the sum over the chunk's rows
  double* history;    // (num_iters, columns): the potentials after each iteration; null: not wanted
  mutable int64_t steps = 0;  // iterations so far

  template <class Body>
  void each_chunk(const Body& body) const {
    share(chunks.count, parallel_for, body);
  }

  // The fast forms. Each returns false if it does not take these scores; then nothing that it wrote counts.
  template <class Small>
  bool run_small() const {
    const bool wide = group.dtype == Dtype::f32;
    const int64_t count = group.rows * group.columns, converted_count = wide ? 0 : count;
    Workspace workspace(chunks.count * Small::chunk_floats(chunks, group.columns), chunks.padded, chunks.padded,
                        chunks.count * chunks.padded, chunks.padded, converted_count, converted_count, converted_count);
    float *codes = workspace[6], *gradient = workspace[7];
    if (!wide) widen<V8>(group.dtype, group.scores, count, workspace[5]);
    Small small{{group, chunks, workspace[0], workspace[1], workspace[2], workspace[3], workspace[4], losses},
                wide ? static_cast<const float*>(group.scores) : workspace[5], group.output(group.codes, 0, codes),
                group.output(group.gradient, 0, gradient)};
    if (!iterate(small)) return false;
    if (!wide && group.codes) narrow<V8>(group.dtype, codes, count, group.codes);
    if (!wide && group.gradient) narrow<V8>(group.dtype, gradient, count, group.gradient);
    return true;
  }

  template <class Linear>
  bool run_linear() const {
    // E lies where a float32 output will be, so that it needs no memory of its own. With half precision it does. Above
    // 32 MiB, which C libraries give back after every call, that takes longer than to compute E again in a few passes.
    const int64_t count = group.rows * group.columns;
    const bool wide = group.dtype == Dtype::f32, kept = count <= 1 << 23 || problem.num_iters > 8;
    Workspace workspace(!wide && kept ? count : 0, chunks.padded, chunks.padded, chunks.count * chunks.padded,
                        3 * chunks.count * chunks.padded);
    float* e = wide ? static_cast<float*>(group.codes ? group.codes : group.gradient) : kept ? workspace[0] : nullptr;
    Linear linear{{group, chunks, e, workspace[1], workspace[2], workspace[3], workspace[4], losses}};
    return iterate(linear);
  }

  template <class Form>
  bool iterate(Form& form) const {
    form.start_common();
    if (!start(form)) return false;
    steps = 0;
    keep(form);
    for (int64_t iteration = 1; iteration < problem.num_iters; ++iteration) {
      each_chunk([&](int64_t chunk) { form.balance(chunk); });
      if (form.has_failed()) {
        if (!absorb(form)) return false;
        each_chunk([&](int64_t chunk) { form.balance(chunk); });
      }
      if (!form.update(problem.tol)) break;
      if (!form.takes_scaling() && !absorb(form)) return false;
      keep(form);
    }
    if (potentials) form.write_potentials(potentials);
    each_chunk([&](int64_t chunk) { form.write(chunk); });
    return true;
  }

  template <class Form>
  void keep(const Form& form) const {
    if (history) form.keep_potentials(history + steps * group.columns);
    ++steps;
  }

  // The first v.
  template <class Form>
  bool start(Form& form) const {
    each_chunk([&](int64_t chunk) { form.exponentials(chunk); });
    if (form.has_failed() || !form.first_update()) {
      each_chunk([&](int64_t chunk) { form.column_tops(chunk); });
      if (!form.shift_columns()) return false;
      each_chunk([&](int64_t chunk) { form.absorb(chunk, true); });
      if (form.has_failed() || !form.first_update()) return false;
    }
    const bool sound = form.takes_scaling();
    // A balance tells of rows that vanish.
    if (sound && problem.num_iters == 1) each_chunk([&](int64_t chunk) { form.balance(chunk); });
    return (sound && !form.has_failed()) || absorb(form);
  }

  // Moves v into E.
  template <class Form>
  bool absorb(Form& form) const {
    if (!form.absorb_scaling()) return false;
    each_chunk([&](int64_t chunk) { form.absorb(chunk, false); });
    return !form.has_failed();
  }

  void run_logarithmic() {
    std::vector<double> doubles((1 + 2 * chunks.count) * group.columns);
    std::vector<float> floats(chunks.count * (group.columns + 3 * chunks.padded));
    const LogSinkhorn method{group, chunks, doubles.data(), doubles.data() + group.columns, floats.data(), losses,
                             doubles.data() + (1 + chunks.count) * group.columns,
                             floats.data() + chunks.count * group.columns};
    set_total_weight([&](int64_t i) { return method.counts(i, 0); });
    if (group.total_weight > 0) {
      each_chunk([&](int64_t chunk) { method.column_tops(chunk); });
      method.join_tops();
      each_chunk([&](int64_t chunk) { method.first_sums(chunk); });
      method.first_update();
      steps = 0;
      keep(method);
      for (int64_t iteration = 1; iteration < problem.num_iters; ++iteration) {
        each_chunk([&](int64_t chunk) { method.balance(chunk); });
        if (!method.update(problem.tol)) break;
        keep(method);
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

  // The mean of the rows' losses.
  float loss() const {
    const double total = std::accumulate(losses, losses + chunks.count, 0.0);
    return static_cast<float>(group.total_weight > 0 ? total / group.total_weight : 0);
  }
};

// Returns the group and how many iterations there were; see SinkhornGroupSolver.
template <class Isa>
inline std::pair<Group, int64_t> solve_group(const SinkhornProblem& problem, int64_t index, const Chunks& chunks,
                                             ParallelFor parallel_for, double* history = nullptr) {
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
  SinkhornGroupSolver<Isa> solver{problem, chunks, parallel_for, group, potentials, losses.data(), history};
  solver.set_total_weight([](int64_t) { return true; });
  // Sixteen lanes only pay on long rows.
  using Eight = Simd<Isa, std::min<int64_t>(Isa::LANES, 8)>;
  using Small = SmallSinkhorn<Simd<Isa>>;
  // The codes of a single column are exactly 1, and it has no gradient. Only the logarithmic form divides them by
  // themselves.
  bool done = solver.group.total_weight > 0 && problem.columns > 1;
  const bool small = problem.columns <= Small::MOST_COLUMNS && chunks.count == 1;
  if (done && problem.columns < 8) done = solver.template run_small<SmallSinkhorn<Eight>>();
  else if (done && small) done = solver.template run_small<Small>();
  else if (done && problem.columns >= 64) done = solver.template run_linear<LinearSinkhorn<Simd<Isa>>>();
  else if (done) done = solver.template run_linear<LinearSinkhorn<Eight>>();
  if (!done) solver.run_logarithmic();
  if (problem.loss) problem.loss[index] = solver.loss();
  if (problem.iterations) problem.iterations[index] = std::max<int64_t>(1, solver.steps);  // 0: no row counts
  return {solver.group, solver.steps};
}

// Threads share the groups, in blocks where `lanes` takes them, or each group's chunks. one(group) does what
// lanes.solve(block, one) does for a block.
template <class Lanes, class One>
inline void each_group(const Lanes& lanes, const Chunks& chunks, ParallelFor parallel_for, const One& one) {
  const SinkhornProblem& problem = lanes.problem;
  if (Lanes::takes(problem))
    share(Lanes::blocks(problem), parallel_for, [&](int64_t block) { lanes.solve(block, one); });
  else if (chunks.count == 1) share(problem.groups, parallel_for, one);
  else
    for (int64_t group = 0; group < problem.groups; ++group) one(group);
}

template <class Isa>
void solve_sinkhorn(const SinkhornProblem& problem, ParallelFor parallel_for) {
  const Chunks chunks(problem.rows, problem.columns);
  each_group(LanesSinkhorn<Simd<Isa>>{problem}, chunks, parallel_for,
             [&](int64_t group) { solve_group<Isa>(problem, group, chunks, parallel_for); });
}

}}  // namespace proto_reg
