// What attention is called with, on the processor or on a device.
#pragma once

#include <cstdint>

namespace trilith {

using Address = std::uintptr_t;

// How attention's tensors (batch, sequence, head, feature) lie, in elements; features are contiguous.
struct HeadStrides {
    int64_t batch, row, head;
};
struct AttentionSizes {
    int64_t batch, num_queries, num_keys, num_heads, num_kv_heads, features;
    double scale;  // of the scores, before softmax
    HeadStrides q, k, v;
};

// Which keys a query sees and what is dropped. Positions int64 (sequence) or (batch, sequence), 0: counted from 0; prefix int64
// (batch): keys before it are seen by all; window 0: none; key_begins and key_ends int64, like positions of queries: the only keys,
// by their place in memory, that a query may see; slopes fp64 (head): ALiBi, times (key - query); a threshold of 0 drops nothing;
// sample_ids int64 (batch). live, bytes (1 or head, blocks of queries, blocks of keys), 0: all: the blocks of scores, `block` to
// either side (a multiple of 16), that are computed at all.
struct AttentionRule {
    bool causal;
    int64_t window;
    Address prefix, slopes, query_positions, key_positions;
    int64_t query_position_stride, key_position_stride;  // between samples
    Address key_begins, key_ends;
    int64_t key_range_stride;
    Address live;
    int64_t block, live_head_stride, live_columns;
    Address sample_ids;
    int64_t first_head;
    uint32_t key_first, key_second, dropout_threshold;
};

}  // namespace trilith
