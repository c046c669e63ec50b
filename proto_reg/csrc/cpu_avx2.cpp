// The CPU kernels for machines with AVX2: one of the tables that cpu_kernels() chooses from.
#include "cpu_plain.h"

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma")
#include "cpu_kernel_table.h"

namespace proto_reg {
constexpr CpuKernels avx2_kernels = kernels_for<Avx2>();
}  // namespace proto_reg
END_TARGET
#endif
