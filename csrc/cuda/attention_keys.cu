// Attention's backward for Ampere and later: the gradients of keys and values.
//
// A block has 128 keys and values of a key/value head (64 where D is 256), a warp sixteen of them with both gradients in registers;
// tiles of queries and of output gradients pass, of one query head that reads them after the other. Scores are made across, keys by
// queries, so that weights and their gradients are left factors as they are. Bytes: k, v, dk, dv once, q and dout once a block; work
// 8 S^2 D, half of it where causal.
#include "cuda/attention_gradients.h"

namespace trilith::cuda {

namespace {

template <class T, int kFeatures>
__global__ void __launch_bounds__(kAttentionThreads, 1) key_gradients(const __grid_constant__ Backward<T> op) {
    constexpr AttentionShape kShape = key_shape(kFeatures);
    constexpr int kStride = kShape.stride, kQueries = kShape.columns, kGroups = kQueries / 8, kSteps = kFeatures / 16;
    constexpr int kOut = kFeatures / kShape.parts, kTile = kQueries * kStride;
    TRILITH_DYNAMIC_SHARED(bytes);
    T* const k_rows = reinterpret_cast<T*>(bytes);
    T* const v_rows = k_rows + kShape.rows * kStride;
    T* const q_tiles = v_rows + kShape.rows * kStride;
    T* const dout_tiles = q_tiles + 2 * kTile;
    __shared__ QueryTile<kQueries> tiles[2];

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = warp % kShape.parts, strip = warp / kShape.parts;
    const int64_t batch = blockIdx.z, kv_head = blockIdx.y;
    const int first = static_cast<int>(blockIdx.x) * kShape.rows, my_strip = first + strip * kStrip;
    const int end = lesser(first + kShape.rows, op.num_keys);
    begin_tile<kFeatures, kShape.rows>(k_rows, op.k.at(batch, kv_head), op.k.strides.row, first, op.num_keys, op.features);
    begin_tile<kFeatures, kShape.rows>(v_rows, op.v.at(batch, kv_head), op.v.strides.row, first, op.num_keys, op.features);
    int places[2], positions[2];  // of this thread's keys
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        places[half] = my_strip + lane / 4 + 8 * half;
        positions[half] = places[half] < op.num_keys
                              ? position_of(op.rule.key_positions, op.rule.key_position_stride, batch, places[half])
                              : kLastPlace;
    }

    // Tiles of one query head after the other.
    const int num_tiles = static_cast<int>(ceil_div(op.num_queries, kQueries));
    const Keys block_keys = keys_of(op.rule, batch, first, end);
    int head = -1;
    Scan scan(0);
    const auto is_visited = [&](int tile) {
        const int from = tile * kQueries, to = lesser(from + kQueries, op.num_queries);
        return is_seen(hull_of_rows(op.rule, batch, from, to, op.num_keys), block_keys) &&
               is_live(op.rule, head, from, to, first, end);
    };
    // The next tile of queries; num_tiles after the last one of the last head.
    const auto advance = [&] {
        int tile = head < 0 ? num_tiles : scan.next(is_visited);
        while (tile == num_tiles && ++head < op.num_heads)
            if (op.kv_index[head] == kv_head) {
                scan = Scan(num_tiles);
                tile = scan.next(is_visited);
            }
        return tile;
    };
    const auto begin = [&](int tile, int stage) {
        const int from = tile * kQueries;
        begin_tile<kFeatures, kQueries>(q_tiles + stage * kTile, op.q.at(batch, head), op.q.strides.row, from, op.num_queries,
                                        op.features);
        begin_tile<kFeatures, kQueries>(dout_tiles + stage * kTile, op.dout.at(batch, head), op.dout.strides.row, from,
                                        op.num_queries, op.features);
        if (threadIdx.x < kQueries) tiles[stage].fill(op, batch, head, from, threadIdx.x);
    };
    float dk[kOut / 8][4], dv[kOut / 8][4];
    clear(dk), clear(dv);

    int tile = advance(), stage = 0;
    if (tile < num_tiles) begin(tile, 0);
    copies_close();
    while (tile < num_tiles) {
        const int now = head, from = tile * kQueries;
        tile = advance();
        if (tile < num_tiles) begin(tile, stage ^ 1);
        copies_close();
        copies_wait<1>();
        __syncthreads();
        const T* const q_tile = q_tiles + stage * kTile;
        const T* const dout_tile = dout_tiles + stage * kTile;
        float s[kGroups][4], dp[kGroups][4];
        clear(s), clear(dp);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t a[4];
            left_factor<kStride>(a, k_rows + strip * kStrip * kStride, step);
            multiply_rows<kStride>(s, a, q_tile, step);
            left_factor<kStride>(a, v_rows + strip * kStrip * kStride, step);
            multiply_rows<kStride>(dp, a, dout_tile, step);
        }
        const uint32_t live = live_query_groups(op.rule, now, from, my_strip, kGroups, op.num_queries, op.num_keys);
        const bool whole = is_strip_seen(op, batch, from, lesser(from + kQueries, op.num_queries), my_strip) &&
                           (!op.rule.live || live == (1u << kGroups) - 1);
        weights_of_keys(s, op, tiles[stage], places, positions, now, whole, live);
        const uint32_t kept = kept_of_keys<kGroups>(op, tiles[stage], places, positions, batch, now);
        gradients_of_keys(s, dp, op, tiles[stage], kept);
        multiply_columns<kStride>(dv, s, dout_tile, part * kOut);
        multiply_columns<kStride>(dk, dp, q_tile, part * kOut);
        __syncthreads();
        stage ^= 1;
    }
    copies_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (places[half] >= op.num_keys) continue;
        write_row(op.dk.at(batch, kv_head) + places[half] * op.dk.strides.row, dk, half, op.scale, part * kOut, op.features);
        write_row(op.dv.at(batch, kv_head) + places[half] * op.dv.strides.row, dv, half, 1.0f, part * kOut, op.features);
    }
}

}  // namespace

template <class T, int kFeatures>
void launch_key_gradients(const Backward<T>& op, const AttentionSizes& sizes, Address stream) {
    constexpr AttentionShape kShape = key_shape(kFeatures);
    if (sizes.batch * sizes.num_kv_heads * sizes.num_keys == 0) return;
    const dim3 grid(static_cast<unsigned>(ceil_div(sizes.num_keys, kShape.rows)), static_cast<unsigned>(sizes.num_kv_heads),
                    static_cast<unsigned>(sizes.batch));
    launch_attention(key_gradients<T, kFeatures>, grid, kAttentionThreads, attention_bytes(kShape, true), stream, "attention_backward", op);
}

#define TRILITH_KEYS(T)                                                                              \
    template void launch_key_gradients<T, 64>(const Backward<T>&, const AttentionSizes&, Address);  \
    template void launch_key_gradients<T, 96>(const Backward<T>&, const AttentionSizes&, Address);  \
    template void launch_key_gradients<T, 128>(const Backward<T>&, const AttentionSizes&, Address); \
    template void launch_key_gradients<T, 256>(const Backward<T>&, const AttentionSizes&, Address);
TRILITH_KEYS(__nv_bfloat16)
#ifndef TRILITH_NO_F16
TRILITH_KEYS(__half)
#endif
#undef TRILITH_KEYS

}  // namespace trilith::cuda
