// What the forward kernels of attention are called with, and how they end.
#pragma once

#include "cuda/attention_tile.h"

namespace trilith::cuda {

template <class T>
struct Forward {
    HeadTensor<const T> q, k, v;
    T* out;
    float* lse;
    const int64_t* kv_index;
    int num_queries, num_keys, num_heads, features;
    float scale;
    AttentionRule rule;
};

// Writes a strip's outputs from feature `first` on, and, with the first ones, the log-sum-exp; `mine`: the thread's first row.
template <int groups, class T>
__device__ __forceinline__ void write_output(const Forward<T>& op, const float (&out)[groups][4], const float (&most)[2],
                                             const float (&totals)[2], int64_t batch, int64_t head, int mine, int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = totals[half] + __shfl_xor_sync(0xFFFFFFFFu, totals[half], 1);
        total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
        const int row = mine + 8 * half;
        if (row >= op.num_queries) continue;
        T* const to = op.out + ((batch * op.num_queries + row) * op.num_heads + head) * op.features;
        write_row(to, out, half, total == 0.0f ? 0.0f : 1.0f / total, first, op.features);
        if (first == 0 && threadIdx.x % 4 == 0)
            op.lse[(batch * op.num_heads + head) * op.num_queries + row] =
                total == 0.0f ? -INFINITY : most[half] * op.scale + logf(total);
    }
}

// Runs the kernel for Hopper (attention_sm90.cu) where the device is one; false where it is not.
template <class T, int kFeatures>
bool launch_on_hopper(const Forward<T>& op, const AttentionSizes& sizes, Address stream);

}  // namespace trilith::cuda
