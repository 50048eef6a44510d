// Every op of csrc/cpu, declared once (ops.inc) and compiled for each instruction set.
#pragma once

#include <cstdint>

#include "common/attention.h"

namespace trilith {

// The ops of one instruction set as a table of functions: bindings.cpp lets Python choose among the tables.
#define TRILITH_CPU_OPS(OP) \
    OP(norm_forward) \
    OP(norm_backward) \
    OP(attention_forward) \
    OP(attention_backward) \
    OP(dropout_forward) \
    OP(dropout_bias_backward) \
    OP(dropout_keep) \
    OP(attention_keep) \
    OP(fill_normal) \
    OP(activation_forward) \
    OP(activation_backward) \
    OP(glu_forward) \
    OP(glu_backward) \
    OP(rotary) \
    OP(logit_max) \
    OP(cross_entropy_terms) \
    OP(cross_entropy_gradient) \
    OP(cross_entropy_fused) \
    OP(adam) \
    OP(lion) \
    OP(sgd) \
    OP(sum_of_squares)

namespace base {
#include "cpu/ops.inc"
}
namespace avx2 {
#include "cpu/ops.inc"
}
namespace avx512 {
#include "cpu/ops.inc"
}

struct CpuKernels {
    const char* name;
#define TRILITH_FIELD(op) decltype(&base::op) op;
    TRILITH_CPU_OPS(TRILITH_FIELD)
#undef TRILITH_FIELD
};

}  // namespace trilith
