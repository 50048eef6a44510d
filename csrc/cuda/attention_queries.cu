// Attention's backward for Ampere and later: the gradient of queries, and what both kernels need of outputs before.
//
// As in forward a block has 128 queries (64 where D is 256), which stay in shared memory with their output gradients while tiles of
// keys and values pass. Bytes: q, dout, dq once, k and v once a block; work 6 S^2 D, half of it where causal.
#include "cuda/attention_gradients.h"
#include "cuda/ops.h"

namespace trilith::cuda {

namespace {

// One warp a row of outputs: delta (batch, head, query) = the row times its gradient.
template <class T>
__global__ void __launch_bounds__(256) inner_products(const T* out, const T* dout, float* delta, int64_t rows, int num_queries,
                                                     int num_heads, int features) {
    const int64_t row = (int64_t(blockIdx.x) * 256 + threadIdx.x) / kWarp;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int i = threadIdx.x % kWarp * 2; i < features; i += kWarp * 2) {
        const auto a = *reinterpret_cast<const Pack<T, 2>*>(out + row * features + i);
        const auto b = *reinterpret_cast<const Pack<T, 2>*>(dout + row * features + i);
        sum += widen(a.at[0]) * widen(b.at[0]) + widen(a.at[1]) * widen(b.at[1]);
    }
    sum = warp_sum(sum);
    const int64_t head = row % num_heads, query = row / num_heads % num_queries, batch = row / num_heads / num_queries;
    if (threadIdx.x % kWarp == 0) delta[(batch * num_heads + head) * num_queries + query] = sum;
}

template <class T, int kFeatures>
__global__ void __launch_bounds__(kAttentionThreads, 1) query_gradients(const __grid_constant__ Backward<T> op) {
    constexpr AttentionShape kShape = query_shape(kFeatures);
    constexpr int kStride = kShape.stride, kKeys = kShape.columns, kGroups = kKeys / 8, kSteps = kFeatures / 16;
    constexpr int kOut = kFeatures / kShape.parts, kTile = kKeys * kStride;
    TRILITH_DYNAMIC_SHARED(bytes);
    T* const q_rows = reinterpret_cast<T*>(bytes);
    T* const dout_rows = q_rows + kShape.rows * kStride;
    T* const k_tiles = dout_rows + kShape.rows * kStride;
    T* const v_tiles = k_tiles + 2 * kTile;
    __shared__ Hull hulls[kAttentionWarps];

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = warp % kShape.parts, strip = warp / kShape.parts;
    const int64_t batch = blockIdx.z, head = blockIdx.y;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kShape.rows, mine = first + strip * kStrip + lane / 4;
    const int end = lesser(first + kShape.rows, op.num_queries);
    const T* const k = op.k.at(batch, op.kv_index[head]);
    const T* const v = op.v.at(batch, op.kv_index[head]);
    begin_tile<kFeatures, kShape.rows>(q_rows, op.q.at(batch, head), op.q.strides.row, first, op.num_queries, op.features);
    begin_tile<kFeatures, kShape.rows>(dout_rows, op.dout.at(batch, head), op.dout.strides.row, first, op.num_queries, op.features);

    const Row rows[2] = {row_of(op.rule, batch, lesser(mine, op.num_queries - 1), op.num_keys),
                         row_of(op.rule, batch, lesser(mine + 8, op.num_queries - 1), op.num_keys)};
    const float log2_sums[2] = {op.log2_sum(batch, head, mine), op.log2_sum(batch, head, mine + 8)};
    const float deltas[2] = {op.delta_of(batch, head, mine), op.delta_of(batch, head, mine + 8)};
    const Hull strip_hull = warp_hull(join(hull_of(rows[0]), hull_of(rows[1])));
    const Hull hull = block_hull(strip_hull, hulls);

    const KeyTiles is_visited{op.rule, hull, batch, head, first, end, op.num_keys, kKeys};
    const int num_tiles = is_visited.count();
    const auto begin = [&](int tile, int stage) {
        begin_tile<kFeatures, kKeys>(k_tiles + stage * kTile, k, op.k.strides.row, tile * kKeys, op.num_keys, op.features);
        begin_tile<kFeatures, kKeys>(v_tiles + stage * kTile, v, op.v.strides.row, tile * kKeys, op.num_keys, op.features);
    };
    const float slope = op.slope(head), scale = op.scale * kLog2E;
    float dq[kOut / 8][4];
    clear(dq);

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
        float s[kGroups][4], dp[kGroups][4];
        clear(s), clear(dp);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t a[4];
            left_factor<kStride>(a, q_rows + strip * kStrip * kStride, step);
            multiply_rows<kStride>(s, a, k_tiles + stage * kTile, step);
            left_factor<kStride>(a, dout_rows + strip * kStrip * kStride, step);
            multiply_rows<kStride>(dp, a, v_tiles + stage * kTile, step);
        }
        const uint32_t live = live_groups(op.rule, head, first + strip * kStrip, from, kGroups, op.num_keys);
        const bool whole = sees_whole<kGroups>(op.rule, strip_hull, from, live);
        rule_scores(s, op.rule, batch, rows, from, op.num_keys, slope, whole, live);
        if (op.rule.dropout_threshold) drop(dp, op.rule, batch, head, rows, from, op.num_keys);
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[j][i] = exp2_fast(s[j][i] * scale - log2_sums[i / 2]) * (dp[j][i] - deltas[i / 2]);
        multiply_columns<kStride>(dq, s, k_tiles + stage * kTile, part * kOut);
        __syncthreads();
        tile = next, stage ^= 1;
    }
    copies_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (mine + 8 * half < op.num_queries)
            write_row(op.dq.at(batch, head) + (mine + 8 * half) * op.dq.strides.row, dq, half, op.scale, part * kOut, op.features);
}

}  // namespace

int64_t attention_backward_workspace(int64_t batch, int64_t num_heads, int64_t num_queries) {
    return batch * num_heads * num_queries * static_cast<int64_t>(sizeof(float));
}

void attention_backward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k, Address v,
                        Address kv_index, Address out, Address lse, Address dout, Address dq, Address dk, Address dv,
                        const AttentionSizes& gradient_sizes, Address workspace, Address stream) {
    with_attention_kernel(dtype, sizes.features, [&](auto tag, auto padded) {
        using T = typename decltype(tag)::type;
        constexpr int kFeatures = decltype(padded)::value;
        constexpr AttentionShape kShape = query_shape(kFeatures);
        const auto queries = static_cast<int>(sizes.num_queries), heads = static_cast<int>(sizes.num_heads);
        const auto features = static_cast<int>(sizes.features);
        const int64_t rows = sizes.batch * queries * heads;
        const HeadStrides like_out{sizes.num_queries * heads * features, int64_t(heads) * features, features};
        const Backward<T> op{{(const T*)q, sizes.q},          {(const T*)k, sizes.k},          {(const T*)v, sizes.v},
                             {(const T*)dout, like_out},      (const float*)lse,               (const float*)workspace,
                             (const int64_t*)kv_index,        {(T*)dq, gradient_sizes.q},      {(T*)dk, gradient_sizes.k},
                             {(T*)dv, gradient_sizes.v},      queries,                         static_cast<int>(sizes.num_keys),
                             heads,                           features,                        static_cast<float>(sizes.scale), rule};
        if (rows > 0) {
            inner_products<T><<<static_cast<unsigned>(ceil_div(rows, 256 / kWarp)), 256, 0, (cudaStream_t)stream>>>(
                (const T*)out, (const T*)dout, (float*)workspace, rows, queries, heads, features);
        }
        if (launch_gradients_on_hopper<T, kFeatures>(op, sizes, stream)) return;
        if (rows > 0) {
            const dim3 grid(static_cast<unsigned>(ceil_div(queries, kShape.rows)), static_cast<unsigned>(heads),
                            static_cast<unsigned>(sizes.batch));
            launch_attention(query_gradients<T, kFeatures>, grid, kAttentionThreads, attention_bytes(kShape, true), stream, "attention_backward", op);
        }
        launch_key_gradients<T, kFeatures>(op, sizes, stream);
    });
}

}  // namespace trilith::cuda
