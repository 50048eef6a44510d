// What the two backward kernels of attention are called with; the weights are made again from the log-sum-exp (Dao et al. 2022,
// algorithm 4). Queries' gradients and those of keys and values are separate kernels, so that each sum has one owner and one order:
// the same bits every time, for seven products a tile where atomic sums would need five.
#pragma once

#include "cuda/attention_tile.h"

namespace trilith::cuda {

template <class T>
struct Backward {
    HeadTensor<const T> q, k, v, dout;
    const float *lse, *delta;  // (batch, head, query); delta: inner products of outputs and their gradients
    const int64_t* kv_index;
    HeadTensor<T> dq, dk, dv;
    int num_queries, num_keys, num_heads, features;
    float scale;
    AttentionRule rule;

    __device__ __forceinline__ float slope(int64_t head) const {
        return rule.slopes ? static_cast<float>(((const double*)rule.slopes)[head]) / scale : 0.0f;
    }
    // The log-sum-exp of a query to base 2; where it is infinite, all weights come out as zero.
    __device__ __forceinline__ float log2_sum(int64_t batch, int64_t head, int row) const {
        if (row >= num_queries) return INFINITY;
        const float found = lse[(batch * num_heads + head) * num_queries + row];
        return found == -INFINITY ? INFINITY : found * kLog2E;
    }
    __device__ __forceinline__ float delta_of(int64_t batch, int64_t head, int row) const {
        return row < num_queries ? delta[(batch * num_heads + head) * num_queries + row] : 0.0f;
    }
};

// The gradients of keys and values (attention_keys.cu).
template <class T, int kFeatures>
void launch_key_gradients(const Backward<T>& op, const AttentionSizes& sizes, Address stream);

}  // namespace trilith::cuda
