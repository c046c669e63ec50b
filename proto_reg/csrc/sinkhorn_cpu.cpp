// Balanced assignment on the CPU: chooses the instruction set at run time and cuts the rows into chunks.
#include "sinkhorn_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu_targets.h"

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

// Arrays of float32 of the given sizes, in one piece, each from the start of a cache line on. Small ones come from memory that the thread keeps: a page fault
// costs more than a small problem.
class Workspace {
 public:
  template <class... Sizes>
  explicit Workspace(Sizes... sizes) {
    constexpr int64_t KEPT = 1 << 17;
    static thread_local std::vector<float> kept;
    int64_t offset = 0, slot = 0;
    for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
      offsets_[slot++] = offset;
      offset += (size + LINE - 1) / LINE * LINE;
    }
    if (offset <= KEPT) {
      if (kept.size() < static_cast<size_t>(offset + LINE)) kept.resize(offset + LINE);
      base_ = aligned(kept.data());
    } else {
      owned_.reset(new float[offset + LINE]);  // not initialised: every element is written before it is read
      base_ = aligned(owned_.get());
    }
  }
  float* operator[](int64_t slot) const { return base_ + offsets_[slot]; }

 private:
  static constexpr int64_t LINE = 16;
  static float* aligned(float* memory) {
    return memory + (LINE - reinterpret_cast<uintptr_t>(memory) / sizeof(float) % LINE) % LINE;
  }

  std::unique_ptr<float[]> owned_;
  float* base_;
  std::array<int64_t, 8> offsets_{};
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
