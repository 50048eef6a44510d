// Every op of csrc/cpu, declared once (ops.inc) and compiled for each instruction set.
#pragma once

#include <cstdint>

namespace trilith {

using Address = std::uintptr_t;

// How attention's tensors (batch, sequence, head, feature) lie, in elements; features are contiguous.
struct HeadStrides {
    int64_t batch, row, head;
};
struct AttentionSizes {
    int64_t batch, num_queries, num_keys, num_heads, num_kv_heads, features;
    double scale;  // of the scores, before softmax
    HeadStrides q, k, v;
};
// Which keys a query sees and what is dropped. Positions int64 (sequence) or (batch, sequence), 0: counted from 0; prefix int64
// (batch): keys before it are seen by all; window 0: none; slopes fp64 (head): ALiBi, times (key - query); a threshold of 0 drops
// nothing; sample_ids int64 (batch).
struct AttentionRule {
    bool causal;
    int64_t window;
    Address prefix, slopes, query_positions, key_positions;
    int64_t query_position_stride, key_position_stride;
    Address sample_ids;
    int64_t first_head;
    uint32_t key_first, key_second, dropout_threshold;
};

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
