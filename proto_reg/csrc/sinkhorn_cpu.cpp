// Balanced assignment on the CPU: chooses the instruction set at run time and cuts the rows into chunks.
#include "sinkhorn_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu_targets.h"
#include "cpu_workspace.h"

namespace proto_reg {
namespace {

// How the rows are cut into chunks: by the shape alone, so that results do not depend on the number of threads. Column
// sums are kept per chunk: few enough rows for float32, few enough chunks for their sums to cost nothing.
struct Chunks {
  int64_t rows, size, count, padded;  // padded: columns, up to whole vectors

  Chunks(int64_t rows_, int64_t columns) : rows(rows_), padded((columns + 15) / 16 * 16) {
    constexpr int64_t SMALL = 1 << 15, FEWEST = 32, MOST = 256;
    size = rows * columns <= SMALL && rows <= MOST ? rows : std::clamp((rows + 255) / 256 * 4, FEWEST, MOST);
    count = (rows + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * size); }
};

#define ISA_SOURCE "sinkhorn_cpu_isa.h"
#include "cpu_isas.h"

}  // namespace

void sinkhorn_cpu(const SinkhornProblem& problem, ParallelFor parallel_for) {
  static const auto solve = fastest(baseline::solve, avx2::solve, avx512::solve);
  const Chunks chunks(problem.rows, problem.columns);
  for (int64_t group = 0; group < problem.groups; ++group) solve(problem, group, chunks, parallel_for);
}

}  // namespace proto_reg
