// The CPU kernels for machines with AVX-512: one of the tables that cpu_kernels() chooses from.
#include "cpu_plain.h"

#if defined(__x86_64__)
BEGIN_TARGET("avx512f,avx512vl,avx512dq,fma")
#include "cpu_kernel_table.h"

namespace proto_reg {
constexpr CpuKernels avx512_kernels = kernels_for<Avx512>();
}  // namespace proto_reg
END_TARGET
#endif
