// Scratch memory of the CPU kernels: sinkhorn_cpu_solver.h, sinkhorn_cpu_linear.h and step_cpu.cpp take it from here.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace proto_reg { namespace {

constexpr int64_t LINE = 16;  // floats in a cache line

inline float* aligned(float* memory) {
  return memory + (LINE - reinterpret_cast<uintptr_t>(memory) / sizeof(float) % LINE) % LINE;
}

// Arrays of float32 of the given sizes. Each starts at a cache line, and nothing is initialised. Small arrays lie in
// memory that the thread keeps for this source, because a page fault costs more than a small problem.
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
  std::unique_ptr<float[]> owned_;
  float* base_;
  std::array<int64_t, 12> offsets_{};
};

// `count` floats that the calling thread keeps, from the start of a cache line on. Every caller gets the same memory.
inline float* thread_scratch(int64_t count) {
  static thread_local std::vector<float> kept;
  if (kept.size() < static_cast<size_t>(count + LINE)) kept.resize(count + LINE);
  return aligned(kept.data());
}

}}  // namespace proto_reg
