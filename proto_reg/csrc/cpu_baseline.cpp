// The CPU kernels for every machine: what cpu_kernels() returns where there is no AVX2.
#include "cpu_plain.h"

#include "cpu_kernel_table.h"

namespace proto_reg {
constexpr CpuKernels baseline_kernels = kernels_for<Baseline>();
}  // namespace proto_reg
