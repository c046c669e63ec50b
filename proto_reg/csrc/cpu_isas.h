// ISA_SOURCE once for every instruction set, in a namespace and target of its own, with MACHINE_LANES lanes of float32 in
// its vectors. Included inside an anonymous namespace of each source that defines ISA_SOURCE; hence no include guard.

namespace baseline {
#define MACHINE_LANES 4
#include ISA_SOURCE
#undef MACHINE_LANES
}  // namespace baseline

#if defined(__x86_64__)
BEGIN_TARGET(AVX2_FEATURES)
namespace avx2 {
#define MACHINE_LANES 8
#include ISA_SOURCE
#undef MACHINE_LANES
}  // namespace avx2
END_TARGET

BEGIN_TARGET(AVX512_FEATURES)
namespace avx512 {
#define MACHINE_LANES 16
#include ISA_SOURCE
#undef MACHINE_LANES
}  // namespace avx512
END_TARGET
#else
namespace avx2 = baseline;
namespace avx512 = baseline;
#endif
