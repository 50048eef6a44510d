// Every op of csrc/cuda. The arguments are those of csrc/cpu/ops.inc, which says what they mean, with the stream in the place of
// the threads, and before it, where an op needs memory for partial results, the address of as many bytes as its ..._workspace
// says. "wide" is fp32; fp64 is not taken. All tensors lie on the current device, tables and step values of optimizers, too.
// Nothing waits for the device.
#pragma once

#include <cstdint>
#include <string>

#include "common/attention.h"

namespace trilith::cuda {

// Why kernels cannot run on a device; empty if they can.
std::string why_not(int device);

// --- norm.cu ---
void norm_forward(int dtype, Address x, Address residual, Address weight, Address bias, Address sum, Address y, Address mean,
                  Address rstd, int64_t rows, int64_t width, double eps, Address stream);
int64_t norm_backward_workspace(int64_t rows, int64_t width);
void norm_backward(int dtype, Address dy, Address dsum, Address x, Address weight, Address mean, Address rstd, Address dx,
                   Address dweight, Address dbias, int64_t rows, int64_t width, Address workspace, Address stream);

// --- activation.cu: dx may be dy ---
void activation_forward(int dtype, int kind, Address x, Address bias, Address y, int64_t rows, int64_t width, Address stream);
int64_t activation_backward_workspace(int64_t rows, int64_t width);
void activation_backward(int dtype, int kind, Address dy, Address x, Address bias, Address dx, Address dbias, int64_t rows,
                         int64_t width, Address workspace, Address stream);
void glu_forward(int dtype, int kind, Address gate, Address up, Address y, int64_t rows, int64_t width, int64_t gate_stride,
                 int64_t up_stride, Address stream);
void glu_backward(int dtype, int kind, Address dy, Address gate, Address up, Address dgate, Address dup, int64_t rows,
                  int64_t width, int64_t gate_stride, int64_t up_stride, int64_t gradient_stride, Address stream);
void dropout_forward(int dtype, Address x, Address bias, Address residual, Address y, Address sample_ids, Address positions,
                     int64_t position_stride, int64_t batch, int64_t length, int64_t width, int64_t first_feature,
                     uint32_t key_first, uint32_t key_second, uint32_t threshold, Address stream);
int64_t dropout_bias_backward_workspace(int64_t rows, int64_t width);
void dropout_bias_backward(int dtype, Address dy, Address dx, Address dbias, Address sample_ids, Address positions,
                           int64_t position_stride, int64_t batch, int64_t length, int64_t width, int64_t first_feature,
                           uint32_t key_first, uint32_t key_second, uint32_t threshold, Address workspace, Address stream);
void dropout_keep(Address keep, Address sample_ids, Address positions, int64_t position_stride, int64_t batch, int64_t length,
                  int64_t width, int64_t first_feature, uint32_t key_first, uint32_t key_second, uint32_t threshold,
                  Address stream);

// --- attention_forward.cu, attention_queries.cu, attention_keys.cu: bf16 and fp16, a multiple of 8 features, at most 256; tensors and
// their strides in packs of 16 bytes; kv_index and all that the rule points to on the device ---
void attention_forward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k, Address v,
                       Address kv_index, Address out, Address lse, Address stream);
int64_t attention_backward_workspace(int64_t batch, int64_t num_heads, int64_t num_queries);
void attention_backward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k, Address v,
                        Address kv_index, Address out, Address lse, Address dout, Address dq, Address dk, Address dv,
                        const AttentionSizes& gradient_sizes, Address workspace, Address stream);

// --- rope.cu: y may be x ---
void rotary(int dtype, Address x, Address y, Address cos, Address sin, int64_t batch, int64_t length, int64_t heads, int64_t half,
            int64_t x_sample, int64_t x_position, int64_t x_head, int64_t y_sample, int64_t y_position, int64_t y_head,
            int64_t table_stride, bool inverse, Address stream);

// --- cross_entropy.cu ---
void logit_max(int dtype, Address logits, int64_t stride, int64_t valid, int64_t tokens, Address most, Address stream);
void cross_entropy_terms(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                         int64_t tokens, bool finds_largest, Address most, Address total, Address target, Address losses,
                         Address stream);
void cross_entropy_gradient(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                            int64_t width, int64_t tokens, Address most, Address total, Address scale, Address softmax_scale,
                            Address gradient, int64_t gradient_stride, Address stream);
void cross_entropy_fused(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                         int64_t width, int64_t tokens, double z_loss, Address scale, Address losses, Address stream);

// --- softmax.cu: rows (outer, heads, queries) of `keys` scores, contiguous ---
// y = softmax(scale x), over keys <= query + num_keys - num_queries where causal, and over those whose byte of `mask` is not 0
// (0: no mask), which lies mask_... elements apart from one outer index, head and query to the next. A row that sees nothing is 0.
void softmax_forward(int dtype, Address x, Address y, int64_t outer, int64_t heads, int64_t queries, int64_t keys, double scale,
                     bool causal, Address mask, int64_t mask_outer, int64_t mask_head, int64_t mask_query, Address stream);
// dx = scale y (dy - sum of y dy over the row). dx may be dy.
void softmax_backward(int dtype, Address y, Address dy, Address dx, int64_t rows, int64_t keys, double scale, Address stream);

// --- optimizer.cu: `numel` is the sum of the slices' ---
void adam(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers, int64_t count,
          int64_t numel, Address step, double beta1, double beta2, double eps, double weight_decay, bool is_decoupled,
          bool zeroes_gradients, Address stream);
void lion(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers, int64_t count,
          int64_t numel, Address step, double beta1, double beta2, double weight_decay, bool zeroes_gradients, Address stream);
void sgd(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers, int64_t count,
         int64_t numel, Address step, double momentum, double dampening, double weight_decay, bool is_nesterov,
         bool zeroes_gradients, Address stream);
int64_t sum_of_squares_workspace();
void sum_of_squares(int dtype, Address runs, int64_t count, Address total, Address workspace, Address stream);
// norm (1) fp64 = the root of `squares` over the loss scale, where it is wanted; the clip factor of `step` becomes
// min(1, max_norm / (norm + 1e-6)) where max_norm is not 0.
void clip_step(Address squares, Address step, Address norm, double max_norm, Address stream);

}  // namespace trilith::cuda
