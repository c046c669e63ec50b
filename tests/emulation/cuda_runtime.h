// The part of CUDA that the Sinkhorn kernels use, on one CPU thread. Each CUDA thread is a fibre. Fibres switch at
// barriers and shuffles, in an order that a test chooses. If not every thread reaches a barrier, the launch ends with
// an error. Shared memory is NaN at the start, and a canary stands behind it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "sinkhorn_cuda_plan.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

struct Barrier {
  int expected = 0, arrived = 0, any = 0, last_any = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  float slots[2][32];
};

struct Block {
  dim3 index;
  float* shared;
  size_t floats;
  int running;
  Barrier barrier;
  Barrier *cluster_barrier, *grid_barrier;
  Block* cluster;  // the first block of its cluster
  int rank;
  Warp warps[32];
};

// The running thread.
struct Thread {
  dim3 index;
  Block* block;
  Warp* warp;
  int turn = 0;
};

extern Thread* self;
extern proto_reg::DeviceLimits device;  // the limits of the emulated device
extern int ptx_version;                 // the architecture of the emulated code
extern bool grants_grids;               // whether a cooperative launch that fits is granted

int wait(Barrier& barrier, int value = 0);  // returns the bitwise or of all values
int launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool cooperative,
           const std::function<void()>& kernel);

}  // namespace emulation

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the running thread

inline void __syncthreads() { emulation::wait(emulation::self->block->barrier); }
inline int __syncthreads_or(int value) { return emulation::wait(emulation::self->block->barrier, value); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  emulation::Thread& thread = *emulation::self;
  float* const slots = thread.warp->slots[thread.turn ^= 1];
  const unsigned lane = thread.index.x % 32;
  slots[lane] = value;
  emulation::wait(thread.warp->barrier);
  return slots[lane ^ mask];
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline void atomicMax(int* at, int value) { *at = std::max(*at, value); }
inline float __ldcg(const float* from) { return *from; }
using std::max;
using std::min;

// The calls of the runtime that the launcher makes.
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorCooperativeLaunchTooLarge, cudaErrorUnknown };
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrClusterLaunch,
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetDevice(int* device) {
  *device = 1000;  // beyond the launcher's cache, because the emulated device changes
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= emulation::device.shared_per_block ? cudaSuccess : cudaErrorInvalidConfiguration;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = emulation::ptx_version;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t bytes) {
  *blocks = static_cast<int>(emulation::device.shared_per_multiprocessor / std::max<size_t>(bytes + 1024, 1));
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config->attrs[i].val.cooperative != 0;
  }
  return static_cast<cudaError_t>(emulation::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                                    cluster, cooperative, [=] { kernel(arguments...); }));
}
