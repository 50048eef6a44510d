// The tables of functions, one for each instruction set that was built, and which of them this processor runs.
#include "cpu/tables.h"

namespace trilith {

namespace {

#define TRILITH_ENTRY(op) &TRILITH_SET::op,
const CpuKernels base_kernels = {"base",
#define TRILITH_SET base
                                 TRILITH_CPU_OPS(TRILITH_ENTRY)
#undef TRILITH_SET
};
#if defined(TRILITH_X86)
const CpuKernels avx2_kernels = {"avx2",
#define TRILITH_SET avx2
                                 TRILITH_CPU_OPS(TRILITH_ENTRY)
#undef TRILITH_SET
};
const CpuKernels avx512_kernels = {"avx512",
#define TRILITH_SET avx512
                                   TRILITH_CPU_OPS(TRILITH_ENTRY)
#undef TRILITH_SET
};
#endif

}  // namespace

std::vector<const CpuKernels*> usable_cpu_kernels() {
    std::vector<const CpuKernels*> found;
#if defined(TRILITH_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back(&avx512_kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&avx2_kernels);
#endif
    found.push_back(&base_kernels);
    return found;
}

}  // namespace trilith
