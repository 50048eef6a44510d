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
        return slope_of(rule, head, scale);
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

// --- keys by queries ----------------------------------------------------------------------------------------------------

// Of the queries of a tile.
template <int queries>
struct QueryTile {
    Row rows[queries];
    float log2_sums[queries], deltas[queries];

    template <class T>
    __device__ __forceinline__ void fill(const Backward<T>& op, int64_t batch, int64_t head, int from, int i) {
        rows[i] = row_of(op.rule, batch, lesser(from + i, op.num_queries - 1), op.num_keys);
        log2_sums[i] = op.log2_sum(batch, head, from + i);
        deltas[i] = op.delta_of(batch, head, from + i);
    }
};

// Bit j: whether the eight queries from `from` + 8 j on are in live blocks of a strip of keys.
__device__ __forceinline__ uint32_t live_query_groups(const AttentionRule& rule, int64_t head, int from, int key, int groups,
                                                      int num_queries, int num_keys) {
    if (!rule.live) return 0xFFFFFFFFu;
    const auto* live = (const uint8_t*)rule.live + head * rule.live_head_stride + key / rule.block;
    uint32_t bits = 0;
    for (int j = 0; j < groups; ++j)
        if (from + 8 * j < num_queries && key < num_keys && live[(from + 8 * j) / rule.block * rule.live_columns]) bits |= 1u << j;
    return bits;
}

// Whether queries [from, to) see all of a strip of keys, as far as that can be told from the first and the last.
template <class T>
__device__ __forceinline__ bool is_strip_seen(const Backward<T>& op, int64_t batch, int from, int to, int strip) {
    if (op.rule.key_positions || op.rule.query_positions || op.rule.key_begins) return false;
    return is_seen_whole(hull_of_rows(op.rule, batch, from, to, op.num_keys), {strip, strip + kStrip, strip, strip + kStrip - 1});
}

// Scores of a strip of keys, by queries, become weights. `places`, `positions`: of the thread's two keys.
template <int groups, int queries, class T>
__device__ __forceinline__ void weights_of_keys(float (&s)[groups][4], const Backward<T>& op, const QueryTile<queries>& tile,
                                                const int (&places)[2], const int (&positions)[2], int64_t head, bool whole,
                                                uint32_t live) {
    const float slope = op.slope(head), scale = op.scale * kLog2E;
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2, half = i / 2;
            float score = s[j][i];
            if (slope != 0.0f) score += slope * static_cast<float>(positions[half] - tile.rows[column].position);
            if (!whole && !((live >> j & 1u) && sees(tile.rows[column], positions[half], places[half]))) score = -INFINITY;
            s[j][i] = exp2_fast(score * scale - tile.log2_sums[column]);
        }
}

// Bit 4 j + i: whether dropout keeps weight i of group j. A loop, not unrolled: registers are full where it is called.
template <int groups, int queries, class T>
__device__ __forceinline__ uint32_t kept_of_keys(const Backward<T>& op, const QueryTile<queries>& tile, const int (&places)[2],
                                                 const int (&positions)[2], int64_t batch, int64_t head) {
    static_assert(groups * 4 <= 32, "a bit each");
    const AttentionRule& rule = op.rule;
    if (!rule.dropout_threshold) return 0xFFFFFFFFu;
    const int64_t sample = ((const int64_t*)rule.sample_ids)[batch];
    uint32_t bits = 0;
#pragma unroll 1
    for (int bit = 0; bit < groups * 4; ++bit) {
        const int column = bit / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + bit % 2, half = bit % 4 / 2;
        const int place = half ? places[1] : places[0], position = place < op.num_keys ? (half ? positions[1] : positions[0]) : 0;
        const Words words =
            philox(key_counter(sample, rule.first_head + head, tile.rows[column].position, position / kDecisionsPerCall),
                   rule.key_first, rule.key_second);
        if (is_kept(from_decision<1>(words, position % kDecisionsPerCall), 0, rule.dropout_threshold)) bits |= 1u << bit;
    }
    return bits;
}

// The gradients of these weights become those of scores, and the weights what dropout leaves of them.
template <int groups, int queries, class T>
__device__ __forceinline__ void gradients_of_keys(float (&s)[groups][4], float (&dp)[groups][4], const Backward<T>& op,
                                                  const QueryTile<queries>& tile, uint32_t kept) {
    const float factor = 65536.0f / static_cast<float>(65536 - op.rule.dropout_threshold);
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
            const float by = kept >> (4 * j + i) & 1u ? factor : 0.0f;
            dp[j][i] = s[j][i] * (dp[j][i] * by - tile.deltas[column]);
            s[j][i] *= by;
        }
}

// Runs the kernels for Hopper (attention_sm90_backward.cu) where the device is one and they take the heads; else false.
template <class T, int kFeatures>
bool launch_gradients_on_hopper(const Backward<T>& op, const AttentionSizes& sizes, Address stream);

// The gradients of keys and values (attention_keys.cu).
template <class T, int kFeatures>
void launch_key_gradients(const Backward<T>& op, const AttentionSizes& sizes, Address stream);

}  // namespace trilith::cuda
