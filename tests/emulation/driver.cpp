// The emulation's scheduler, and the functions that the tests call. These use the library's own planner, launcher and
// kernels.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "sinkhorn_cuda.cu"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Thread* self;
proto_reg::DeviceLimits device;
int ptx_version = 90;
bool grants_grids = true;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kCanary = 16;
constexpr uint32_t kPoison = 0x7fc0dead;

struct Fibre {
  Thread thread;
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  bool started, done;
  const Barrier* waits;
  uint64_t generation;
};

std::vector<std::unique_ptr<Fibre>> pool;
Fibre* running;
jmp_buf scheduler;
ucontext_t unused;
const std::function<void()>* body;
const char* failure;
int order;
std::mt19937 randomness;

void start_fibre() {
  (*body)();
  running->done = true;
  _longjmp(scheduler, 1);
}

void prepare(Fibre& fibre) {
  if (!fibre.stack) fibre.stack.reset(new char[kStack]);
  fibre.started = fibre.done = false;
  fibre.waits = nullptr;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = &unused;
  makecontext(&fibre.context, start_fibre, 0);
}

void resume(Fibre& fibre) {
  running = &fibre;
  self = &fibre.thread;
  threadIdx = self->index;
  blockIdx = self->block->index;
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.jump, 1);
  fibre.started = true;
  setcontext(&fibre.context);
}

// The last thread of a block destroys the block's shared memory.
void leave(Block& block) {
  if (--block.running == 0) std::fill_n(block.shared, block.floats, __int_as_float(kPoison));
}

bool ready(const Fibre& fibre) {
  return !fibre.done && !(fibre.waits && fibre.waits->generation == fibre.generation);
}

// The order of the fibres' turns: warp by warp.
std::vector<size_t> first_turns(size_t count) {
  std::vector<size_t> warps(count / 32), turns;
  std::iota(warps.begin(), warps.end(), 0);
  if (order > 5) std::shuffle(warps.begin(), warps.end(), randomness);
  for (const size_t warp : warps) {
    for (size_t lane = 0; lane < 32; ++lane) turns.push_back(32 * warp + lane);
  }
  if (order % 4 == 1) std::reverse(turns.begin(), turns.end());
  return turns;
}

// Runs the first `count` fibres to their end. Returns false if some of them wait for ever. In rounds, every thread
// takes one step: in order, in reverse or shuffled. In greedy orders, the first thread that can go on always goes on.
// Some warps are then as far ahead of others as the barriers allow.
bool run(size_t count) {
  const bool greedy = order % 2 == 1 && order > 1;
  std::vector<size_t> turns = first_turns(count);
  for (size_t done = 0; done < count;) {
    bool moved = false;
    if (order > 1 && !greedy) std::shuffle(turns.begin(), turns.end(), randomness);
    for (const size_t turn : turns) {
      Fibre& fibre = *pool[turn];
      if (!ready(fibre)) continue;
      fibre.waits = nullptr;
      resume(fibre);
      moved = true;
      if (fibre.done) {
        ++done;
        leave(*fibre.thread.block);
      }
      if (greedy) break;
    }
    if (!moved) return false;
  }
  return true;
}

// Runs the blocks that live at the same time: all blocks of a cooperative grid, the blocks of a cluster, or one block.
bool run_blocks(unsigned first, unsigned count, unsigned cluster, size_t floats) {
  const unsigned threads = blockDim.x;
  std::vector<Block> blocks(count);
  std::vector<Barrier> clusters(count / cluster);
  std::vector<float> memory(count * (floats + kCanary), __int_as_float(kPoison));
  Barrier grid;
  grid.expected = count * threads;
  while (pool.size() < count * threads) pool.emplace_back(new Fibre);
  for (unsigned b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.index = dim3((first + b) % gridDim.x, (first + b) / gridDim.x);
    block.shared = memory.data() + b * (floats + kCanary);
    block.floats = floats;
    block.running = block.barrier.expected = threads;
    block.grid_barrier = &grid;
    block.cluster_barrier = &clusters[b / cluster];
    block.cluster_barrier->expected = cluster * threads;
    block.cluster = &blocks[b / cluster * cluster];
    block.rank = b % cluster;
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& fibre = *pool[b * threads + t];
      block.warps[t / 32].barrier.expected = 32;
      fibre.thread = {dim3(t, 0, 0), &block, &block.warps[t / 32]};
      prepare(fibre);
    }
  }
  if (!run(count * threads)) {
    failure = "emulation: threads wait for a barrier that others never reach";
    return false;
  }
  for (unsigned b = 0; b < count; ++b) {
    for (int i = 0; i < kCanary; ++i) {
      uint32_t bits;
      std::memcpy(&bits, blocks[b].shared + floats + i, 4);
      if (bits != kPoison) failure = "emulation: a write past the end of shared memory";
    }
  }
  return failure == nullptr;
}

}  // namespace

int wait(Barrier& barrier, int value) {
  barrier.any |= value;
  if (++barrier.arrived == barrier.expected) {
    barrier.last_any = barrier.any;
    barrier.arrived = barrier.any = 0;
    ++barrier.generation;
  } else {
    Fibre& fibre = *running;
    fibre.waits = &barrier;
    fibre.generation = barrier.generation;
    if (!_setjmp(fibre.jump)) _longjmp(scheduler, 1);
  }
  return barrier.last_any;
}

int launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool cooperative,
           const std::function<void()>& kernel) {
  const unsigned count = grid.x * grid.y, together = cooperative ? count : cluster;
  if (block.x % 32 || block.x > static_cast<unsigned>(device.threads_per_block) || grid.x % cluster ||
      shared_bytes > static_cast<size_t>(device.shared_per_block) || (cluster > 1 && !device.clusters)) {
    return cudaErrorInvalidConfiguration;
  }
  const int64_t resident = device.shared_per_multiprocessor / (shared_bytes + 1024) * device.multiprocessors;
  if (cooperative && (count > resident || !grants_grids)) return cudaErrorCooperativeLaunchTooLarge;
  blockDim = block;
  gridDim = grid;
  body = &kernel;
  failure = nullptr;
  for (unsigned first = 0; first < count; first += together) {
    if (!run_blocks(first, together, cluster, shared_bytes / 4)) return cudaErrorUnknown;
  }
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "emulation: invalid configuration";
  if (error == cudaErrorCooperativeLaunchTooLarge) return "emulation: cooperative launch too large";
  return emulation::failure ? emulation::failure : "emulation: unknown error";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const proto_reg::DeviceLimits& d = emulation::device;
  const int64_t values[] = {d.multiprocessors, d.threads_per_block, d.shared_per_block, d.shared_per_multiprocessor,
                            d.capability / 10, d.capability % 10, d.cooperative, d.clusters};
  *value = static_cast<int>(values[attribute]);
  return cudaSuccess;
}

float* proto_reg::shared_floats() { return emulation::self->block->shared; }

extern "C" {

void pretend_ptx(int version) { emulation::ptx_version = version; }

// Whether a cooperative launch of which occupancy says that it fits is granted.
void grant_grids(bool grants) { emulation::grants_grids = grants; }

// Plans the problem. The plan uses no regime before `allow`.
// `fuse` says how a pass streams. 0: in two kernels. 1: in one kernel. 2: in one kernel that asks for a narrow range.
const char* forced_plan(const proto_reg::SinkhornProblem* problem, const proto_reg::DeviceLimits* limits, int allow,
                          int fuse, proto_reg::SinkhornPlan* plan) {
  emulation::device = *limits;
  *plan = proto_reg::plan_sinkhorn(*problem, *limits, static_cast<proto_reg::Regime>(allow));
  if (plan->regime != proto_reg::Regime::streamed) return nullptr;
  if (!fuse) plan_streamed(*problem, *limits, false, plan);
  if (fuse < 2) plan->narrow_blocks = 0;
  return nullptr;
}

// Launches as for a user. Writes the plan that ran.
const char* chosen_launch(const proto_reg::SinkhornProblem* problem, const proto_reg::DeviceLimits* limits,
                          proto_reg::SinkhornPlan* plan, int64_t) {
  emulation::device = *limits;
  std::vector<float> workspace;
  const auto allocate = [&](const proto_reg::SinkhornPlan& chosen) {
    *plan = chosen;
    workspace.assign(static_cast<size_t>(chosen.workspace_floats) + emulation::kCanary,
                     __int_as_float(emulation::kPoison));
    return workspace.data();
  };
  const char* const error = proto_reg::run_sinkhorn_cuda(*problem, allocate, nullptr);
  for (auto at = workspace.end() - emulation::kCanary; !error && at != workspace.end(); ++at) {
    uint32_t bits;
    std::memcpy(&bits, &*at, 4);
    if (bits != emulation::kPoison) return "emulation: a write past the end of the workspace";
  }
  return error;
}

// `order` is the order of run(). From 2 on it is also the seed: even numbers give rounds, odd ones the greedy order.
const char* forced_launch(const proto_reg::SinkhornProblem* problem, const proto_reg::SinkhornPlan* plan,
                            float* workspace, int64_t order) {
  emulation::order = static_cast<int>(order);
  emulation::randomness.seed(emulation::order);
  return proto_reg::launch_sinkhorn_cuda(*problem, *plan, workspace, nullptr);
}
}
