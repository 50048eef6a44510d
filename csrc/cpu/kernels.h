// Every op of csrc/cpu, declared once and compiled for each instruction set.
//
// Addresses point to contiguous memory of the given dtype (codes of common/types.h) unless said otherwise; 0 stands for
// what is absent. "wide" is fp32, or fp64 where dtype is fp64. `threads` is the most that may be used; results do not
// depend on it. Nothing is checked here: kernels/ops does that. Nothing is kept between calls.
#pragma once

#include <cstdint>

namespace trilith {

using Address = std::uintptr_t;

// The ops of one instruction set as a table of functions: bindings.cpp lets Python choose among the tables.
#define TRILITH_CPU_OPS(OP) \
    OP(norm_forward)        \
    OP(norm_backward)

#define TRILITH_DECLARE_CPU_OPS                                                                                        \
    /* --- norm.cpp: LayerNorm, or RMSNorm where mean is 0 ------------------------------------------------------- */  \
    /* y (rows, width) = norm(x + residual) * weight + bias; sum = x + residual if there is a residual; mean and   */  \
    /* rstd (rows) wide are kept for backward.                                                                     */  \
    void norm_forward(int dtype, Address x, Address residual, Address weight, Address bias, Address sum, Address y,    \
                      Address mean, Address rstd, int64_t rows, int64_t width, double eps, int threads);               \
    /* dx = gradient of the normed x (the sum) + dsum; dweight and dbias (width) are overwritten.                   */  \
    void norm_backward(int dtype, Address dy, Address dsum, Address x, Address weight, Address mean, Address rstd,     \
                       Address dx, Address dweight, Address dbias, int64_t rows, int64_t width, int threads);

namespace base {
TRILITH_DECLARE_CPU_OPS
}
namespace avx2 {
TRILITH_DECLARE_CPU_OPS
}
namespace avx512 {
TRILITH_DECLARE_CPU_OPS
}

struct CpuKernels {
    const char* name;
#define TRILITH_FIELD(op) decltype(&base::op) op;
    TRILITH_CPU_OPS(TRILITH_FIELD)
#undef TRILITH_FIELD
};

}  // namespace trilith
