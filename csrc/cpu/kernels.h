// Every op of csrc/cpu, declared once and compiled for each instruction set.
//
// Addresses point to contiguous memory of the given dtype (codes of common/types.h) unless said otherwise; 0 stands for
// what is absent. "wide" is fp32, or fp64 where dtype is fp64. `threads` is the most that may be used; results do not
// depend on it. Nothing is checked here: kernels/ops does that. Nothing is kept between calls.
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
    OP(norm_forward)        \
    OP(norm_backward)       \
    OP(attention_forward)   \
    OP(attention_backward)

#define TRILITH_DECLARE_CPU_OPS                                                                                        \
    /* --- norm.cpp: LayerNorm, or RMSNorm where mean is 0 ------------------------------------------------------- */  \
    /* y (rows, width) = norm(x + residual) * weight + bias; sum = x + residual if there is a residual; mean and   */  \
    /* rstd (rows) wide are kept for backward.                                                                     */  \
    void norm_forward(int dtype, Address x, Address residual, Address weight, Address bias, Address sum, Address y,    \
                      Address mean, Address rstd, int64_t rows, int64_t width, double eps, int threads);               \
    /* dx = gradient of the normed x (the sum) + dsum; dweight and dbias (width) are overwritten.                   */  \
    void norm_backward(int dtype, Address dy, Address dsum, Address x, Address weight, Address mean, Address rstd,     \
                       Address dx, Address dweight, Address dbias, int64_t rows, int64_t width, int threads);           \
    /* --- attention.cpp, attention_backward.cpp ------------------------------------------------------------------ */  \
    /* out (batch, query, head, feature); lse (batch, head, query) wide, kept for backward; kv_index int64 (head).   */  \
    void attention_forward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k,     \
                           Address v, Address kv_index, Address out, Address lse, int threads);                         \
    /* dq, dk and dv lie as the strides of gradient_sizes say.                                                       */  \
    void attention_backward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k,    \
                            Address v, Address kv_index, Address out, Address lse, Address dout, Address dq, Address dk, \
                            Address dv, const AttentionSizes& gradient_sizes, int threads);

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
