// Attention's backward for Hopper: gradients of queries, and of keys and values, as two kernels (attention_gradients.h).
//
// As in forward one warp brings tiles and two warpgroups have 64 rows each, which stay in shared memory: queries and their output
// gradients while keys and values pass, or keys and values while queries pass, of one head after the other. Scores and gradients of
// weights are made from shared memory, and become left factors in registers; the product of the queries' gradient runs beside the
// scores of the next tile. Shared memory: 2 x 128 rows and 2 x 2 x 64 that pass, 128 KiB for D = 128. Heads of more features are left to the
// kernels for Ampere: two gradients of 256 features do not fit into registers.
#include "cuda/attention_gradients.h"
#include "cuda/attention_hopper.h"

namespace trilith::cuda {

namespace {

constexpr int kRows = BlockRows::kRows, kPassing = 64, kGroups = kPassing / 8;

template <class T>
struct Hopper {
    CUtensorMap q, k, v, dout;
    Backward<T> op;
};

// Barriers of a block: of what stays, and of pairs of tiles that pass.
struct Stages {
    uint64_t staying, full[kStages], empty[kStages];
    __device__ __forceinline__ void init() {
        if (threadIdx.x == 0) {
            barrier_init(&staying, 1);
            for (int i = 0; i < kStages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], kConsumerWarps);
            barriers_publish();
        }
    }
};
// What lies behind the tiles: for the gradients of queries, and for those of keys.
struct BesideQueries {
    Stages stages;
    BlockRows seen;
    float log2_sums[kRows], deltas[kRows];
};
struct BesideKeys {
    Stages stages;
    QueryTile<kPassing> tiles[kStages];
    int heads[kStages], from[kStages];  // whose queries they are; a head of -1 ends the work
};

template <class Beside>
constexpr int hopper_bytes(int features) {
    return 2 * features * 2 * (kRows + kStages * kPassing) + int(sizeof(Beside));
}
static_assert(hopper_bytes<BesideKeys>(128) <= 227 << 10 && hopper_bytes<BesideQueries>(128) <= 227 << 10, "a block of an H100");

// Where the tensors of a block lie in shared memory: two whose rows stay, two that pass.
template <int kFeatures>
struct Tiles {
    static constexpr int kSlabs = kFeatures / kSlab, kRowSlab = kRows * kSlabRowBytes, kTileSlab = kPassing * kSlabRowBytes;
    static constexpr int kStaying = kSlabs * kRowSlab, kTile = kSlabs * kTileSlab;
    unsigned char* bytes;
    __device__ __forceinline__ unsigned char* staying(int which) const { return bytes + which * kStaying; }
    __device__ __forceinline__ unsigned char* passing(int which, int stage) const {
        return bytes + 2 * kStaying + (2 * stage + which) * kTile;
    }
    __device__ __forceinline__ unsigned char* behind() const { return passing(0, kStages); }
    // Brings two tensors' rows from `from` on.
    __device__ __forceinline__ void bring_staying(const CUtensorMap& a, const CUtensorMap& b, uint64_t* barrier, int head, int from,
                                                  int batch) const {
        barrier_expect(barrier, 2 * kStaying);
        bring_rows(staying(0), kSlabs, kRowSlab, a, barrier, head, from, batch);
        bring_rows(staying(0) + kRowSlab / 2, kSlabs, kRowSlab, a, barrier, head, from + kPassing, batch);
        bring_rows(staying(1), kSlabs, kRowSlab, b, barrier, head, from, batch);
        bring_rows(staying(1) + kRowSlab / 2, kSlabs, kRowSlab, b, barrier, head, from + kPassing, batch);
    }
    __device__ __forceinline__ void bring_passing(const CUtensorMap& a, const CUtensorMap& b, Stages& stages, int stage, int head,
                                                  int from, int batch) const {
        barrier_expect(&stages.full[stage], 2 * kTile);
        bring_rows(passing(0, stage), kSlabs, kTileSlab, a, &stages.full[stage], head, from, batch);
        bring_rows(passing(1, stage), kSlabs, kTileSlab, b, &stages.full[stage], head, from, batch);
    }
};

template <class T, int kFeatures>
__global__ void __launch_bounds__(kHopperThreads, 1) query_gradients_on_hopper(const __grid_constant__ Hopper<T> given) {
#ifdef TRILITH_HOPPER
    using Place = Tiles<kFeatures>;
    TRILITH_DYNAMIC_SHARED(bytes);
    const Place place{bytes};
    BesideQueries& beside = *reinterpret_cast<BesideQueries*>(place.behind());
    const Backward<T>& op = given.op;
    const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarpgroup;
    const int batch = blockIdx.z, head = blockIdx.y;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows, end = lesser(first + kRows, op.num_queries);
    beside.stages.init();
    for (int i = threadIdx.x; i < kRows; i += kHopperThreads) {
        beside.log2_sums[i] = op.log2_sum(batch, head, first + i);
        beside.deltas[i] = op.delta_of(batch, head, first + i);
    }
    beside.seen.fill(op.rule, batch, first, op.num_queries, op.num_keys);
    const Hull hull = beside.seen.hull();
    const KeyTiles is_visited{op.rule, hull, batch, head, first, end, op.num_keys, kPassing};
    const int num_tiles = is_visited.count();
    Scan scan(num_tiles);

    if (group == 0) {
        registers_give<kProducerRegisters>();
        if (threadIdx.x >= kWarp) return;
        const int kv_head = static_cast<int>(op.kv_index[head]);
        int tile = scan.next(is_visited);
        if (tile < num_tiles && lane == 0) place.bring_staying(given.q, given.dout, &beside.stages.staying, head, first, batch);
        for (Ring ring; tile < num_tiles; ring.advance(), tile = scan.next(is_visited)) {
            if (lane != 0) continue;
            barrier_wait(&beside.stages.empty[ring.stage], ring.parity ^ 1);
            place.bring_passing(given.k, given.v, beside.stages, ring.stage, kv_head, tile * kPassing, batch);
        }
    } else {
        registers_take<kConsumerRegisters>();
        const int within = (group - 1) * 64 + threadIdx.x % kWarpgroup / kWarp * kStrip, strip = first + within;
        const int mine = within + lane / 4;
        const float log2_sums[2] = {beside.log2_sums[mine], beside.log2_sums[mine + 8]};
        const float deltas[2] = {beside.deltas[mine], beside.deltas[mine + 8]};
        const float slope = op.slope(head), scale = op.scale * kLog2E;
        const uint32_t left = (group - 1) * 64 * kSlabRowBytes;
        const uint32_t q_rows = shared_address(place.staying(0)) + left, dout_rows = shared_address(place.staying(1)) + left;
        float s[kGroups][4], dp[kGroups][4], dq[kFeatures / 8][4];
        uint32_t factors[kGroups / 2][4];
        clear(dq);
        Ring ring;
        int before = -1;  // the stage that the last products read
        const auto leave = [&](int stage) {
            if (stage >= 0 && lane == 0) barrier_arrive(&beside.stages.empty[stage]);
        };
        int tile = scan.next(is_visited);
        if (tile < num_tiles) barrier_wait(&beside.stages.staying, 0);
        for (; tile < num_tiles; tile = scan.next(is_visited), ring.advance()) {
            const uint32_t k_tile = shared_address(place.passing(0, ring.stage)), v_tile = shared_address(place.passing(1, ring.stage));
            barrier_wait(&beside.stages.full[ring.stage], ring.parity);
            begin_rows<kFeatures / 16, Place::kRowSlab, Place::kTileSlab, T>(s, q_rows, k_tile);
            begin_rows<kFeatures / 16, Place::kRowSlab, Place::kTileSlab, T>(dp, dout_rows, v_tile);
            products_wait<2>();
            leave(before);
            products_wait<1>();
            pin(s);
            const int from = tile * kPassing;
            const uint32_t live = live_groups(op.rule, head, strip, from, kGroups, op.num_keys);
            const bool whole = sees_whole<kGroups>(op.rule, beside.seen.strips[within / kStrip], from, live);
            const Row rows[2] = {beside.seen.rows[mine], beside.seen.rows[mine + 8]};
            rule_scores(s, op.rule, batch, rows, from, op.num_keys, slope, whole, live);
#pragma unroll
            for (int j = 0; j < kGroups; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[j][i] = exp2_fast(s[j][i] * scale - log2_sums[i / 2]);
            products_wait<0>();
            pin(dp);
            if (op.rule.dropout_threshold) drop(dp, op.rule, batch, head, rows, from, op.num_keys);
#pragma unroll
            for (int j = 0; j < kGroups; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[j][i] *= dp[j][i] - deltas[i / 2];
            round_factors<T>(factors, s);
            begin_columns<kPassing / 16, Place::kTileSlab, T>(dq, factors, k_tile);
            before = ring.stage;
        }
        products_wait<0>();
        pin(dq);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (first + mine + 8 * half < op.num_queries)
                write_row(op.dq.at(batch, head) + (first + mine + 8 * half) * op.dq.strides.row, dq, half, op.scale, 0, op.features);
    }
#endif
}

template <class T, int kFeatures>
__global__ void __launch_bounds__(kHopperThreads, 1) key_gradients_on_hopper(const __grid_constant__ Hopper<T> given) {
#ifdef TRILITH_HOPPER
    using Place = Tiles<kFeatures>;
    TRILITH_DYNAMIC_SHARED(bytes);
    const Place place{bytes};
    BesideKeys& beside = *reinterpret_cast<BesideKeys*>(place.behind());
    const Backward<T>& op = given.op;
    const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarpgroup;
    const int batch = blockIdx.z, kv_head = blockIdx.y;
    const int first = static_cast<int>(blockIdx.x) * kRows, end = lesser(first + kRows, op.num_keys);
    beside.stages.init();
    __syncthreads();

    if (group == 0) {
        registers_give<kProducerRegisters>();
        if (threadIdx.x >= kWarp) return;
        if (lane == 0) place.bring_staying(given.k, given.v, &beside.stages.staying, kv_head, first, batch);
        const Keys keys = keys_of(op.rule, batch, first, end);
        const int num_tiles = static_cast<int>(ceil_div(op.num_queries, kPassing));
        Ring ring;
        // Hands the queries of a head from `from` on to the others, or, with a head of -1, the end.
        const auto hand_over = [&](int head, int from) {
            barrier_wait(&beside.stages.empty[ring.stage], ring.parity ^ 1);
            if (head >= 0)
                for (int i = lane; i < kPassing; i += kWarp) beside.tiles[ring.stage].fill(op, batch, head, from, i);
            if (lane == 0) beside.heads[ring.stage] = head, beside.from[ring.stage] = from;
            __syncwarp();
            if (lane == 0 && head >= 0) place.bring_passing(given.q, given.dout, beside.stages, ring.stage, head, from, batch);
            if (lane == 0 && head < 0) barrier_arrive(&beside.stages.full[ring.stage]);
            ring.advance();
        };
        for (int head = 0; head < op.num_heads; ++head) {
            if (op.kv_index[head] != kv_head) continue;
            const auto is_visited = [&](int tile) {
                const int from = tile * kPassing, to = lesser(from + kPassing, op.num_queries);
                return is_seen(hull_of_rows(op.rule, batch, from, to, op.num_keys), keys) &&
                       is_live(op.rule, head, from, to, first, end);
            };
            Scan scan(num_tiles);
            for (int tile = scan.next(is_visited); tile < num_tiles; tile = scan.next(is_visited)) hand_over(head, tile * kPassing);
        }
        hand_over(-1, 0);
    } else {
        registers_take<kConsumerRegisters>();
        const int within = (group - 1) * 64 + threadIdx.x % kWarpgroup / kWarp * kStrip, strip = first + within;
        int places[2], positions[2];  // of this thread's keys
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            places[half] = strip + lane / 4 + 8 * half;
            positions[half] = places[half] < op.num_keys
                                  ? position_of(op.rule.key_positions, op.rule.key_position_stride, batch, places[half])
                                  : kLastPlace;
        }
        const uint32_t left = (group - 1) * 64 * kSlabRowBytes;
        const uint32_t k_rows = shared_address(place.staying(0)) + left, v_rows = shared_address(place.staying(1)) + left;
        float s[kGroups][4], dp[kGroups][4], dk[kFeatures / 8][4], dv[kFeatures / 8][4];
        uint32_t weights[kGroups / 2][4], gradients[kGroups / 2][4];
        clear(dk), clear(dv);
        barrier_wait(&beside.stages.staying, 0);
        Ring ring;
        barrier_wait(&beside.stages.full[0], 0);
        int head = beside.heads[0], from = beside.from[0];
        while (head >= 0) {
            const QueryTile<kPassing>& tile = beside.tiles[ring.stage];
            const uint32_t q_tile = shared_address(place.passing(0, ring.stage));
            const uint32_t dout_tile = shared_address(place.passing(1, ring.stage));
            const uint32_t kept = kept_of_keys<kGroups>(op, tile, places, positions, batch, head);
            begin_rows<kFeatures / 16, Place::kRowSlab, Place::kTileSlab, T>(s, k_rows, q_tile);
            begin_rows<kFeatures / 16, Place::kRowSlab, Place::kTileSlab, T>(dp, v_rows, dout_tile);
            products_wait<1>();
            pin(s);
            const uint32_t live = live_query_groups(op.rule, head, from, strip, kGroups, op.num_queries, op.num_keys);
            const bool whole = is_strip_seen(op, batch, from, lesser(from + kPassing, op.num_queries), strip) &&
                               (!op.rule.live || live == (1u << kGroups) - 1);
            weights_of_keys(s, op, tile, places, positions, head, whole, live);
            products_wait<0>();
            pin(dp);
            gradients_of_keys(s, dp, op, tile, kept);
            round_factors<T>(weights, s);
            round_factors<T>(gradients, dp);
            products_open();
            add_columns<kPassing / 16, Place::kTileSlab, T>(dv, weights, dout_tile);
            add_columns<kPassing / 16, Place::kTileSlab, T>(dk, gradients, q_tile);
            products_close();
            // Both gradients beside the next scores would need more registers than there are.
            products_wait<0>();
            pin(dk), pin(dv);
            if (lane == 0) barrier_arrive(&beside.stages.empty[ring.stage]);
            ring.advance();
            barrier_wait(&beside.stages.full[ring.stage], ring.parity);
            head = beside.heads[ring.stage], from = beside.from[ring.stage];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (places[half] >= op.num_keys) continue;
            write_row(op.dk.at(batch, kv_head) + places[half] * op.dk.strides.row, dk, half, op.scale, 0, op.features);
            write_row(op.dv.at(batch, kv_head) + places[half] * op.dv.strides.row, dv, half, 1.0f, 0, op.features);
        }
    }
#endif
}

}  // namespace

template <class T, int kFeatures>
bool launch_gradients_on_hopper(const Backward<T>& op, const AttentionSizes& sizes, Address stream) {
    if constexpr (kFeatures > 128) {
        return false;
    } else {
        constexpr int kPadded = kFeatures == 96 ? 128 : kFeatures;
        if (!is_hopper() || sizes.num_queries * sizes.num_keys * sizes.batch == 0) return false;
        const Hopper<T> given{
            tensor_map(op.q, sizes.batch, sizes.num_queries, sizes.num_heads, sizes.features, kPassing),
            tensor_map(op.k, sizes.batch, sizes.num_keys, sizes.num_kv_heads, sizes.features, kPassing),
            tensor_map(op.v, sizes.batch, sizes.num_keys, sizes.num_kv_heads, sizes.features, kPassing),
            tensor_map(op.dout, sizes.batch, sizes.num_queries, sizes.num_heads, sizes.features, kPassing),
            op,
        };
        const auto launch = [&](auto kernel, int64_t rows, int64_t heads, int bytes) {
            const dim3 grid(static_cast<unsigned>(ceil_div(rows, kRows)), static_cast<unsigned>(heads),
                            static_cast<unsigned>(sizes.batch));
            launch_attention(kernel, grid, kHopperThreads, bytes, stream, "attention_backward", given);
        };
        launch(query_gradients_on_hopper<T, kPadded>, sizes.num_queries, sizes.num_heads, hopper_bytes<BesideQueries>(kPadded));
        launch(key_gradients_on_hopper<T, kPadded>, sizes.num_keys, sizes.num_kv_heads, hopper_bytes<BesideKeys>(kPadded));
        return true;
    }
}

#define TRILITH_HOPPERS(T)                                                                                  \
    template bool launch_gradients_on_hopper<T, 64>(const Backward<T>&, const AttentionSizes&, Address);  \
    template bool launch_gradients_on_hopper<T, 96>(const Backward<T>&, const AttentionSizes&, Address);  \
    template bool launch_gradients_on_hopper<T, 128>(const Backward<T>&, const AttentionSizes&, Address); \
    template bool launch_gradients_on_hopper<T, 256>(const Backward<T>&, const AttentionSizes&, Address);
TRILITH_HOPPERS(__nv_bfloat16)
#ifndef TRILITH_NO_F16
TRILITH_HOPPERS(__half)
#endif
#undef TRILITH_HOPPERS

}  // namespace trilith::cuda
