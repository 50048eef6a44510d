// Attention without a matrix of scores, forward, for Hopper (Shah et al. 2024, FlashAttention-3).
//
// Three warpgroups: of the first, one warp finds the tiles that are visited and has the copy engine bring them, two tiles of keys and
// two of values ahead; the other two have 64 queries each. A warpgroup begins the scores of the next tile before the product of
// this one's weights with its values, so that both run while it works on the softmax. Weights stay in registers, as left factors.
// Shared memory: 128 queries, 2 x 128 keys and values (64 where D is 256), 80 KiB for D = 64, 160 for 128, 192 for 256. Heads of other
// sizes are padded by the copy engine. Registers: 48 a thread of the first warpgroup, 232 of the others.
#include "cuda/attention_hopper.h"
#include "cuda/attention_results.h"

namespace trilith::cuda {

namespace {

constexpr int kHopperRows = BlockRows::kRows;

// What a block has in shared memory behind its tiles: barriers, and what is seen, which registers have no room for.
struct Beside {
    uint64_t queries, keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
    BlockRows queries_seen;
};

constexpr int hopper_keys(int features) { return features > 128 ? 64 : 128; }
constexpr int hopper_bytes(int features) { return 2 * features * (kHopperRows + 2 * kStages * hopper_keys(features)) + int(sizeof(Beside)); }
static_assert(hopper_bytes(64) <= 227 << 10 && hopper_bytes(128) <= 227 << 10 && hopper_bytes(256) <= 227 << 10, "a block of an H100");

template <class T>
struct Hopper {
    CUtensorMap q, k, v;
    Forward<T> op;
};

template <class T, int kFeatures>
__global__ void __launch_bounds__(kHopperThreads, 1) attend_on_hopper(const __grid_constant__ Hopper<T> given) {
#ifdef TRILITH_HOPPER
    constexpr int kKeys = hopper_keys(kFeatures), kGroups = kKeys / 8, kSteps = kFeatures / 16, kSlabs = kFeatures / kSlab;
    constexpr int kQuerySlab = kHopperRows * kSlabRowBytes, kTileSlab = kKeys * kSlabRowBytes, kTile = kSlabs * kTileSlab;
    TRILITH_DYNAMIC_SHARED(bytes);
    unsigned char* const k_tiles = bytes + kSlabs * kQuerySlab;
    unsigned char* const v_tiles = k_tiles + kStages * kTile;
    Beside& beside = *reinterpret_cast<Beside*>(v_tiles + kStages * kTile);

    const Forward<T>& op = given.op;
    const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarpgroup;
    const int batch = blockIdx.z, head = blockIdx.y;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kHopperRows, end = lesser(first + kHopperRows, op.num_queries);
    if (threadIdx.x == 0) {
        barrier_init(&beside.queries, 1);
        for (int i = 0; i < kStages; ++i) {
            barrier_init(&beside.keys_full[i], 1), barrier_init(&beside.values_full[i], 1);
            barrier_init(&beside.keys_empty[i], kConsumerWarps), barrier_init(&beside.values_empty[i], kConsumerWarps);
        }
        barriers_publish();
    }
    beside.queries_seen.fill(op.rule, batch, first, op.num_queries, op.num_keys);
    const Hull hull = beside.queries_seen.hull();
    const KeyTiles is_visited{op.rule, hull, batch, head, first, end, op.num_keys, kKeys};
    const int num_tiles = is_visited.count();
    Scan scan(num_tiles);

    if (group == 0) {
        registers_give<kProducerRegisters>();
        if (threadIdx.x >= kWarp) return;
        const int kv_head = static_cast<int>(op.kv_index[head]);
        int tile = scan.next(is_visited);
        if (tile < num_tiles && lane == 0) {
            barrier_expect(&beside.queries, kSlabs * kQuerySlab);
            bring_rows(bytes, kSlabs, kQuerySlab, given.q, &beside.queries, head, first, batch);
        }
        for (Ring ring; tile < num_tiles; ring.advance(), tile = scan.next(is_visited)) {
            if (lane != 0) continue;
            const auto bring = [&](unsigned char* tiles, const CUtensorMap& tensor, uint64_t* full, uint64_t* empty) {
                barrier_wait(&empty[ring.stage], ring.parity ^ 1);
                barrier_expect(&full[ring.stage], kTile);
                bring_rows(tiles + ring.stage * kTile, kSlabs, kTileSlab, tensor, &full[ring.stage], kv_head, tile * kKeys, batch);
            };
            bring(k_tiles, given.k, beside.keys_full, beside.keys_empty);
            bring(v_tiles, given.v, beside.values_full, beside.values_empty);
        }
    } else {
        registers_take<kConsumerRegisters>();
        const int within = (group - 1) * 64 + threadIdx.x % kWarpgroup / kWarp * kStrip, strip = first + within;
        const int mine = strip + lane / 4;
        const float slope = slope_of(op.rule, head, op.scale);
        const float scale = op.scale * kLog2E;
        const uint32_t q_address = shared_address(bytes) + (group - 1) * 64 * kSlabRowBytes;
        const uint32_t k_address = shared_address(k_tiles), v_address = shared_address(v_tiles);
        float s[kGroups][4], out[kFeatures / 8][4], most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, factor[2];
        uint32_t weights[kGroups / 2][4];
        clear(out);

        const auto begin_scores = [&](int stage) {
            begin_rows<kSteps, kQuerySlab, kTileSlab, T>(s, q_address, k_address + stage * kTile);
        };
        const auto begin_outputs = [&](int stage) {
            begin_columns<kKeys / 16, kTileSlab, T>(out, weights, v_address + stage * kTile);
        };
        const auto apply_rule = [&](int tile) {
            const int from = tile * kKeys;
            const uint32_t live = live_groups(op.rule, head, strip, from, kGroups, op.num_keys);
            const BlockRows& seen = beside.queries_seen;
            const bool whole = sees_whole<kGroups>(op.rule, seen.strips[within / kStrip], from, live);
            const Row rows[2] = {seen.rows[within + lane / 4], seen.rows[within + lane / 4 + 8]};
            rule_scores(s, op.rule, batch, rows, from, op.num_keys, slope, whole, live);
            soften(s, most, total, scale, factor);
            if (op.rule.dropout_threshold) drop(s, op.rule, batch, head, rows, from, op.num_keys);
        };
        const auto leave = [&](uint64_t* empty, int stage) {
            if (lane == 0) barrier_arrive(&empty[stage]);
        };

        int tile = scan.next(is_visited);
        if (tile < num_tiles) {
            Ring keys, values;
            barrier_wait(&beside.queries, 0);
            barrier_wait(&beside.keys_full[0], 0);
            begin_scores(0);
            products_wait<0>();
            pin(s);
            leave(beside.keys_empty, 0);
            apply_rule(tile);
            round_factors<T>(weights, s);
            for (tile = scan.next(is_visited); tile < num_tiles; tile = scan.next(is_visited)) {
                keys.advance();
                barrier_wait(&beside.keys_full[keys.stage], keys.parity);
                begin_scores(keys.stage);
                barrier_wait(&beside.values_full[values.stage], values.parity);
                begin_outputs(values.stage);
                products_wait<1>();
                pin(s);
                leave(beside.keys_empty, keys.stage);
                apply_rule(tile);
                products_wait<0>();
                pin(out);
                leave(beside.values_empty, values.stage);
                values.advance();
                shrink(out, factor);
                round_factors<T>(weights, s);
            }
            barrier_wait(&beside.values_full[values.stage], values.parity);
            begin_outputs(values.stage);
            products_wait<0>();
            pin(out);
        }
        write_output(op, out, most, total, batch, head, mine, 0);
    }
#endif
}

}  // namespace

template <class T, int kFeatures>
bool launch_on_hopper(const Forward<T>& op, const AttentionSizes& sizes, Address stream) {
    // Heads that were padded for Ampere are padded further by the copy engine.
    constexpr int kPadded = kFeatures == 96 ? 128 : kFeatures, kKeys = hopper_keys(kPadded);
    if (!is_hopper() || sizes.num_keys == 0) return false;
    const Hopper<T> given{
        tensor_map(op.q, sizes.batch, sizes.num_queries, sizes.num_heads, sizes.features, kHopperRows),
        tensor_map(op.k, sizes.batch, sizes.num_keys, sizes.num_kv_heads, sizes.features, kKeys),
        tensor_map(op.v, sizes.batch, sizes.num_keys, sizes.num_kv_heads, sizes.features, kKeys),
        op,
    };
    const dim3 grid(static_cast<unsigned>(ceil_div(sizes.num_queries, kHopperRows)), static_cast<unsigned>(sizes.num_heads),
                    static_cast<unsigned>(sizes.batch));
    launch_attention(attend_on_hopper<T, kPadded>, grid, kHopperThreads, hopper_bytes(kPadded), stream, "attention_forward", given);
    return true;
}

#define TRILITH_HOPPERS(T)                                                                        \
    template bool launch_on_hopper<T, 64>(const Forward<T>&, const AttentionSizes&, Address);  \
    template bool launch_on_hopper<T, 96>(const Forward<T>&, const AttentionSizes&, Address);  \
    template bool launch_on_hopper<T, 128>(const Forward<T>&, const AttentionSizes&, Address); \
    template bool launch_on_hopper<T, 256>(const Forward<T>&, const AttentionSizes&, Address);
TRILITH_HOPPERS(__nv_bfloat16)
#ifndef TRILITH_NO_F16
TRILITH_HOPPERS(__half)
#endif
#undef TRILITH_HOPPERS

}  // namespace trilith::cuda
