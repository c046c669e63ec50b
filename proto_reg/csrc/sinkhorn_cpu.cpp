// Balanced assignment on the CPU: chooses the instruction set at run time and cuts the rows into chunks.
#include "sinkhorn_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

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

// Vectors never cross a function that is not inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace baseline {
#define MACHINE_LANES 4
#include "sinkhorn_cpu_isa.h"
#undef MACHINE_LANES
}  // namespace baseline

// The same source again for what only some machines have.
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma")
namespace avx2 {
#define MACHINE_LANES 8
#include "sinkhorn_cpu_isa.h"
#undef MACHINE_LANES
}  // namespace avx2
END_TARGET

BEGIN_TARGET("avx512f,avx512vl,avx512dq,fma")
namespace avx512 {
#define MACHINE_LANES 16
#include "sinkhorn_cpu_isa.h"
#undef MACHINE_LANES
}  // namespace avx512
END_TARGET
#endif

using Solve = void (*)(const SinkhornProblem&, int64_t, const Chunks&, ParallelFor);

// The fastest that runs here; PROTO_REG_CPU_ISA=baseline or avx2 asks for less.
Solve fastest() {
  const char* given = std::getenv("PROTO_REG_CPU_ISA");
  const std::string most = given ? given : "avx512";
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  if (has_avx512 && most == "avx512") return avx512::solve;
  if (has_avx2 && most != "baseline") return avx2::solve;
#endif
  return baseline::solve;
}

}  // namespace

void sinkhorn_cpu(const SinkhornProblem& problem, ParallelFor parallel_for) {
  static const Solve solve = fastest();
  const Chunks chunks(problem.rows, problem.columns);
  for (int64_t group = 0; group < problem.groups; ++group) solve(problem, group, chunks, parallel_for);
}

}  // namespace proto_reg
