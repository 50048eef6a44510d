// Attention without a matrix of scores, forward, for Ampere and later (Dao et al. 2022; Dao 2023, FlashAttention-2).
//
// A block has 128 queries of a head (64 where D is 256), a warp sixteen of them, with their factors, output and softmax in
// registers; tiles of keys and values pass through shared memory, the next one on its way while this one is at work. Tiles that no
// query of the block sees are not loaded, and scores are looked at one by one only where a strip does not see the whole tile.
// Blocks with most tiles, the last ones of a causal mask, begin first. Bytes: q, k, v and the output once, and keys and values again
// from the second cache for each block; work 4 S^2 D, half of it where causal.
#include "cuda/attention_results.h"
#include "cuda/ops.h"

namespace trilith::cuda {

namespace {

template <class T, int kFeatures>
__global__ void __launch_bounds__(kAttentionThreads, 1) attend(const __grid_constant__ Forward<T> op) {
    constexpr AttentionShape kShape = forward_shape(kFeatures);
    constexpr int kStride = kShape.stride, kKeys = kShape.columns, kGroups = kKeys / 8, kSteps = kFeatures / 16;
    constexpr int kOut = kFeatures / kShape.parts, kOutGroups = kOut / 8, kTile = kKeys * kStride;
    TRILITH_DYNAMIC_SHARED(bytes);
    T* const k_tiles = reinterpret_cast<T*>(bytes);
    T* const v_tiles = k_tiles + 2 * kTile;
    __shared__ Hull hulls[kAttentionWarps];

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = warp % kShape.parts, strip = warp / kShape.parts;
    const int64_t batch = blockIdx.z, head = blockIdx.y;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kShape.rows, mine = first + strip * kStrip + lane / 4;
    const int end = lesser(first + kShape.rows, op.num_queries);

    const T* const k = op.k.at(batch, op.kv_index[head]);
    const T* const v = op.v.at(batch, op.kv_index[head]);
    const Row rows[2] = {row_of(op.rule, batch, lesser(mine, op.num_queries - 1), op.num_keys),
                         row_of(op.rule, batch, lesser(mine + 8, op.num_queries - 1), op.num_keys)};
    const Hull strip_hull = warp_hull(join(hull_of(rows[0]), hull_of(rows[1])));
    const Hull hull = block_hull(strip_hull, hulls);

    // The left factor of all products with keys: sixteen rows of q, straight from memory.
    uint32_t q[kSteps][4];
    const T* const q_rows = op.q.at(batch, head);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = mine + i % 2 * 8, feature = step * 16 + lane % 4 * 2 + i / 2 * 8;
            const bool is_there = row < op.num_queries && feature < op.features;
            q[step][i] = is_there ? *reinterpret_cast<const uint32_t*>(q_rows + row * op.q.strides.row + feature) : 0u;
        }

    const KeyTiles is_visited{op.rule, hull, batch, head, first, end, op.num_keys, kKeys};
    const int num_tiles = is_visited.count();
    const auto begin = [&](int tile, int stage) {
        begin_tile<kFeatures, kKeys>(k_tiles + stage * kTile, k, op.k.strides.row, tile * kKeys, op.num_keys, op.features);
        begin_tile<kFeatures, kKeys>(v_tiles + stage * kTile, v, op.v.strides.row, tile * kKeys, op.num_keys, op.features);
    };
    const float slope = slope_of(op.rule, head, op.scale);
    const float scale = op.scale * kLog2E;
    float out[kOutGroups][4], most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    clear(out);

    Scan scan(num_tiles);
    int tile = scan.next(is_visited), stage = 0;
    if (tile < num_tiles) begin(tile, 0);
    copies_close();
    while (tile < num_tiles) {
        const int next = scan.next(is_visited), from = tile * kKeys;
        if (next < num_tiles) begin(next, stage ^ 1);
        copies_close();
        copies_wait<1>();
        __syncthreads();
        float s[kGroups][4];
        clear(s);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) multiply_rows<kStride>(s, q[step], k_tiles + stage * kTile, step);
        const uint32_t live = live_groups(op.rule, head, first + strip * kStrip, from, kGroups, op.num_keys);
        const bool whole = sees_whole<kGroups>(op.rule, strip_hull, from, live);
        rule_scores(s, op.rule, batch, rows, from, op.num_keys, slope, whole, live);
        float factor[2];
        soften(s, most, total, scale, factor);
        shrink(out, factor);
        if (op.rule.dropout_threshold) drop(s, op.rule, batch, head, rows, from, op.num_keys);
        multiply_columns<kStride>(out, s, v_tiles + stage * kTile, part * kOut);
        __syncthreads();
        tile = next, stage ^= 1;
    }
    copies_wait<0>();

    write_output(op, out, most, total, batch, head, mine, part * kOut);
}

}  // namespace

void attention_forward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k, Address v,
                       Address kv_index, Address out, Address lse, Address stream) {
    if (sizes.batch * sizes.num_heads * sizes.num_queries == 0) return;
    with_attention_kernel(dtype, sizes.features, [&](auto tag, auto features) {
        using T = typename decltype(tag)::type;
        constexpr int kFeatures = decltype(features)::value;
        const Forward<T> op{{(const T*)q, sizes.q}, {(const T*)k, sizes.k}, {(const T*)v, sizes.v}, (T*)out, (float*)lse,
                            (const int64_t*)kv_index, static_cast<int>(sizes.num_queries), static_cast<int>(sizes.num_keys),
                            static_cast<int>(sizes.num_heads), static_cast<int>(sizes.features), static_cast<float>(sizes.scale), rule};
        if (launch_on_hopper<T, kFeatures>(op, sizes, stream)) return;
        constexpr AttentionShape kShape = forward_shape(kFeatures);
        const dim3 grid(static_cast<unsigned>(ceil_div(sizes.num_queries, kShape.rows)), static_cast<unsigned>(sizes.num_heads),
                        static_cast<unsigned>(sizes.batch));
        launch_attention(attend<T, kFeatures>, grid, kAttentionThreads, attention_bytes(kShape, false), stream, "attention_forward", op);
    });
}

}  // namespace trilith::cuda
