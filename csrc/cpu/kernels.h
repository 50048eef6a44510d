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
    OP(norm_backward)       \
    OP(dropout_forward)     \
    OP(dropout_bias_backward)\
    OP(dropout_keep)        \
    OP(attention_keep)      \
    OP(fill_normal)         \
    OP(activation_forward)  \
    OP(activation_backward) \
    OP(glu_forward)         \
    OP(glu_backward)        \
    OP(rotary)

#define TRILITH_DECLARE_CPU_OPS                                                                                        \
    /* --- norm.cpp: LayerNorm, or RMSNorm where mean is 0 ------------------------------------------------------- */  \
    /* y (rows, width) = norm(x + residual) * weight + bias; sum = x + residual if there is a residual; mean and   */  \
    /* rstd (rows) wide are kept for backward.                                                                     */  \
    void norm_forward(int dtype, Address x, Address residual, Address weight, Address bias, Address sum, Address y,    \
                      Address mean, Address rstd, int64_t rows, int64_t width, double eps, int threads);               \
    /* dx = gradient of the normed x (the sum) + dsum; dweight and dbias (width) are overwritten.                   */  \
    void norm_backward(int dtype, Address dy, Address dsum, Address x, Address weight, Address mean, Address rstd,     \
                       Address dx, Address dweight, Address dbias, int64_t rows, int64_t width, int threads);                       \
    /* --- dropout.cpp: decisions of the stream of kernels/stream.py; threshold = round(65536 p) ----------------- */  \
    /* y (batch, length, width) = residual + dropout(x + bias (width)), without the residual or the bias where 0;  */  \
    /* sample_ids (batch) int64; positions int64 (length) with position_stride 0, or (batch, length) with length.  */  \
    /* Of the gradient dy it makes dx. y may be x or residual.                                                      */  \
    void dropout_forward(int dtype, Address x, Address bias, Address residual, Address y, Address sample_ids,          \
                         Address positions, int64_t position_stride, int64_t batch, int64_t length, int64_t width,     \
                         int64_t first_feature, uint32_t key_first, uint32_t key_second, uint32_t threshold,           \
                         int threads);                                                                                 \
    /* dx as above, and dbias (width) = its sum over rows. dx may be dy.                                            */  \
    void dropout_bias_backward(int dtype, Address dy, Address dx, Address dbias, Address sample_ids,                   \
                               Address positions, int64_t position_stride, int64_t batch, int64_t length,              \
                               int64_t width, int64_t first_feature, uint32_t key_first, uint32_t key_second,          \
                               uint32_t threshold, int threads);                                                       \
    /* keep (batch, length, width) bytes: 1 where kept.                                                             */  \
    void dropout_keep(Address keep, Address sample_ids, Address positions, int64_t position_stride, int64_t batch,     \
                      int64_t length, int64_t width, int64_t first_feature, uint32_t key_first, uint32_t key_second,   \
                      uint32_t threshold, int threads);                                                                \
    /* keep (batch, heads, num_queries, num_keys) bytes; queries (num_queries) int64, keys from first_key on.       */  \
    void attention_keep(Address keep, Address sample_ids, Address queries, int64_t batch, int64_t heads,               \
                        int64_t num_queries, int64_t num_keys, int64_t first_head, int64_t first_key,                  \
                        uint32_t key_first, uint32_t key_second, uint32_t threshold, int threads);                     \
    /* --- random.cpp -------------------------------------------------------------------------------------------- */  \
    /* out (runs, run): normal numbers times deviation. Run i begins at the canonical element first + sum of its    */  \
    /* coordinates in extents (dims) int64 times strides (dims) int64.                                              */  \
    void fill_normal(int dtype, Address out, int64_t runs, int64_t run, int64_t first, Address extents,                \
                     Address strides, int64_t dims, uint32_t key_first, uint32_t key_second, double deviation,         \
                     int threads);                                                                                     \
    /* --- activation.cpp: kind 0 is GELU, 1 its tanh form, 2 SiLU (x sigmoid(x)) --------------------------------- */  \
    /* y (rows, width) = f(x + bias (width)), without the bias where 0. y may be x.                                 */  \
    void activation_forward(int dtype, int kind, Address x, Address bias, Address y, int64_t rows, int64_t width,      \
                            int threads);                                                                              \
    /* dx = dy f'(x + bias); with a bias dbias (width) is its sum over rows. dx may be dy.                          */  \
    void activation_backward(int dtype, int kind, Address dy, Address x, Address bias, Address dx, Address dbias,      \
                             int64_t rows, int64_t width, int threads);                                                \
    /* y (rows, width) = f(gate) up. Rows of gate and up are gate_stride and up_stride elements apart.              */  \
    void glu_forward(int dtype, int kind, Address gate, Address up, Address y, int64_t rows, int64_t width,            \
                     int64_t gate_stride, int64_t up_stride, int threads);                                             \
    /* Gradients of both, in rows gradient_stride elements apart.                                                   */  \
    void glu_backward(int dtype, int kind, Address dy, Address gate, Address up, Address dgate, Address dup,           \
                      int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int64_t gradient_stride,    \
                      int threads);                                                                                    \
    /* --- rotary.cpp --------------------------------------------------------------------------------------------- */  \
    /* y (batch, length, heads, 2 half) = x with the pairs (i, i + half) turned by the angles of cos and sin, wide, */  \
    /* (length, half) with table_stride 0, or (batch, length, half) with length * half; turned back if inverse.     */  \
    /* Elements of x and y are x_... and y_... apart from sample to sample, position to position, head to head, and */  \
    /* a head's are neighbours. y may be x.                                                                         */  \
    void rotary(int dtype, Address x, Address y, Address cos, Address sin, int64_t batch, int64_t length,              \
                int64_t heads, int64_t half, int64_t x_sample, int64_t x_position, int64_t x_head, int64_t y_sample,   \
                int64_t y_position, int64_t y_head, int64_t table_stride, bool inverse, int threads);

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
