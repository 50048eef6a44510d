// How attention deals its scores to blocks and warps, and which tiles of scores it visits: arithmetic on the host's side, too.
//
// Shared memory and registers of the Ampere path (csrc/tests/plan.cpp holds the bytes to what a block may have, tests the spills):
// forward: two tiles of keys and two of values; a warp holds 16 queries, their output, and a row of scores of each tile.
// backward of keys and values: 16 keys a warp; keys and values stay, two tiles of queries and of output gradients pass.
// backward of queries: as forward, with the queries and output gradients in shared memory, too.
// Where D is 256 two warps share 16 rows: each makes all scores, and half of the features of the result.
// KiB of shared memory for D = 64, 96, 128, 256 (163 on an A100): forward 36, 52, 68, 66; queries 72, 104, 136, 132; keys 54, 78, 102,
// 99. Registers of 256 threads: 255 at most, so that a multiprocessor holds one block (tests/kernels/test_cuda_build.py).
#pragma once

#include <cstdint>

#include "common/attention.h"

#ifdef __CUDACC__
#define TRILITH_PLAN __host__ __device__ __forceinline__
#else
#define TRILITH_PLAN inline
#endif

namespace trilith::cuda {

constexpr int kStrip = 16;           // rows of a warp
constexpr int kAttentionWarps = 8;   // of a block
constexpr int kLastPlace = 0x7FFFFFFF;

// `rows`: of a block; `columns`: of a tile that passes; `stride`: elements from row to row in shared memory, so that eight rows lie
// in different banks; `parts`: warps that share a strip of rows.
struct AttentionShape {
    int parts, rows, columns, stride;
};
constexpr AttentionShape attention_shape(int features, int columns) {
    const int parts = features > 128 ? 2 : 1;
    return {parts, kStrip * kAttentionWarps / parts, columns / parts, features + 8};
}
constexpr AttentionShape forward_shape(int features) { return attention_shape(features, 64); }
constexpr AttentionShape query_shape(int features) { return attention_shape(features, 64); }
constexpr AttentionShape key_shape(int features) { return attention_shape(features, 32); }

// Bytes of two pairs of tiles that pass, and of two tensors' rows where they stay.
constexpr int attention_bytes(const AttentionShape& s, bool rows_stay) {
    return 2 * s.stride * (2 * 2 * s.columns + (rows_stay ? 2 * s.rows : 0));
}

// The features a kernel pads D to; 0: none takes it.
constexpr int padded_features(int64_t features) {
    return features < 8 || features % 8 ? 0 : features <= 64 ? 64 : features <= 96 ? 96 : features <= 128 ? 128 : features <= 256 ? 256 : 0;
}

// A query: it sees keys at first <= position <= last that lie at begin <= place < end.
struct Row {
    int position, first, last, begin, end;
};

// Of some queries, what one of them at least sees, and what all see.
struct Hull {
    int first_min, first_max, last_min, last_max, begin_min, begin_max, end_min, end_max;
};

TRILITH_PLAN int lesser(int a, int b) { return a < b ? a : b; }
TRILITH_PLAN int greater(int a, int b) { return a > b ? a : b; }

TRILITH_PLAN Hull hull_of(const Row& r) { return {r.first, r.first, r.last, r.last, r.begin, r.begin, r.end, r.end}; }
TRILITH_PLAN Hull join(const Hull& a, const Hull& b) {
    return {lesser(a.first_min, b.first_min), greater(a.first_max, b.first_max), lesser(a.last_min, b.last_min),
            greater(a.last_max, b.last_max),  lesser(a.begin_min, b.begin_min), greater(a.begin_max, b.begin_max),
            lesser(a.end_min, b.end_min),     greater(a.end_max, b.end_max)};
}
// Of no query.
TRILITH_PLAN Hull no_hull() { return {kLastPlace, -kLastPlace, kLastPlace, -kLastPlace, kLastPlace, -kLastPlace, kLastPlace, -kLastPlace}; }

// Keys [from, to) in memory, whose positions are within [least, greatest].
struct Keys {
    int from, to, least, greatest;
};

// Whether some of the queries may see some of the keys, and whether each sees all, as far as positions and places say.
TRILITH_PLAN bool is_seen(const Hull& h, const Keys& k) {
    return k.least <= h.last_max && k.greatest >= h.first_min && k.from < h.end_max && k.to > h.begin_min;
}
TRILITH_PLAN bool is_seen_whole(const Hull& h, const Keys& k) {
    return k.greatest <= h.last_min && k.least >= h.first_max && k.from >= h.begin_max && k.to <= h.end_min;
}

TRILITH_PLAN int position_of(Address positions, int64_t stride, int64_t batch, int64_t i) {
    return positions ? static_cast<int>(((const int64_t*)positions)[batch * stride + i]) : static_cast<int>(i);
}

TRILITH_PLAN Row row_of(const AttentionRule& rule, int64_t batch, int64_t i, int num_keys) {
    Row row;
    row.position = position_of(rule.query_positions, rule.query_position_stride, batch, i);
    row.first = rule.window > 0 ? static_cast<int>(row.position - rule.window + 1) : -kLastPlace;
    row.last = kLastPlace - 1;
    if (rule.causal) {
        row.last = row.position;
        if (rule.prefix) row.last = greater(row.last, static_cast<int>(((const int64_t*)rule.prefix)[batch]) - 1);
    }
    const int64_t at = batch * rule.key_range_stride + i;
    row.begin = rule.key_begins ? static_cast<int>(((const int64_t*)rule.key_begins)[at]) : 0;
    row.end = rule.key_ends ? lesser(static_cast<int>(((const int64_t*)rule.key_ends)[at]), num_keys) : num_keys;
    return row;
}

// The hull of queries [from, to): of the first and the last where nothing is listed, since it grows with the place.
TRILITH_PLAN Hull hull_of_rows(const AttentionRule& rule, int64_t batch, int from, int to, int num_keys) {
    const bool is_listed = rule.query_positions || rule.key_begins;
    Hull hull = hull_of(row_of(rule, batch, from, num_keys));
    for (int i = is_listed ? from + 1 : to - 1; i < to; ++i) hull = join(hull, hull_of(row_of(rule, batch, i, num_keys)));
    return hull;
}

TRILITH_PLAN Keys keys_of(const AttentionRule& rule, int64_t batch, int from, int to) {
    if (!rule.key_positions) return {from, to, from, to - 1};
    Keys keys{from, to, kLastPlace, -kLastPlace};
    for (int j = from; j < to; ++j) {
        const int at = position_of(rule.key_positions, rule.key_position_stride, batch, j);
        keys.least = lesser(keys.least, at), keys.greatest = greater(keys.greatest, at);
    }
    return keys;
}

// Whether a block of scores of queries [row, row_end) and keys [column, column_end) is live in a head's layout.
TRILITH_PLAN bool is_live(const AttentionRule& rule, int64_t head, int row, int row_end, int column, int column_end) {
    if (!rule.live) return true;
    const auto* live = (const uint8_t*)rule.live + head * rule.live_head_stride;
    for (int64_t i = row / rule.block; i * rule.block < row_end; ++i)
        for (int64_t j = column / rule.block; j * rule.block < column_end; ++j)
            if (live[i * rule.live_columns + j]) return true;
    return false;
}

}  // namespace trilith::cuda
