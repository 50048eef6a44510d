// What forward and backward of attention share: where tensors lie, which keys a query sees, and products of tiles.
//
// Tiles are packed wide, so that every product reads its right factor in whole registers of contiguous memory and its left
// factor by broadcast: a tile of kTileRows x 2 registers of the result stays in registers over the whole depth.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "common/math.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

constexpr int kTileRows = kBytes == 64 ? 8 : 4;  // rows of a product that registers hold
constexpr int kChunkRows = 8;                    // queries that are masked and bounded together
constexpr int64_t kPanel = 32;                   // keys that are skipped or visited together
constexpr int64_t kQueries = 64, kKeys = 128;    // a tile of scores
constexpr int64_t kPanels = kKeys / kPanel;

template <class A>
using Memory = std::unique_ptr<A, void (*)(void*)>;
template <class A>
Memory<A> allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return Memory<A>(static_cast<A*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))), std::free);
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A tensor (batch, sequence, head, D) with D contiguous.
template <class T>
struct Heads {
    T* base;
    int64_t batch_stride, row_stride, head_stride;
    T* row(int64_t batch, int64_t row, int64_t head) const {
        return base + batch * batch_stride + row * row_stride + head * head_stride;
    }
};

// A query: it sees keys with first <= position <= last that lie at begin <= index < end in memory.
template <class A>
struct Row {
    int_t<A> position, first, last, begin, end;
};

// Keys that a query sees. Padding has the largest position, which nobody sees.
template <class A>
struct Visibility {
    using I = int_t<A>;
    static constexpr I kNowhere = std::numeric_limits<I>::max();
    const int64_t *query_positions, *key_positions, *prefix;  // 0: positions count from 0, no prefix
    int64_t query_stride, key_stride;                         // between samples
    bool causal;
    int64_t window;                    // 0: none
    const int64_t *begins, *ends;      // 0: all
    int64_t range_stride;
    const uint8_t* live;               // 0: all
    int64_t block, live_head_stride, live_columns;

    I query(int64_t batch, int64_t i) const {
        return static_cast<I>(query_positions ? query_positions[batch * query_stride + i] : i);
    }
    I key(int64_t batch, int64_t j) const { return static_cast<I>(key_positions ? key_positions[batch * key_stride + j] : j); }
    I first(I query) const { return window > 0 ? static_cast<I>(query - window + 1) : std::numeric_limits<I>::min(); }
    I last(int64_t batch, I query) const {
        if (!causal) return kNowhere - 1;
        return prefix ? std::max(query, static_cast<I>(prefix[batch] - 1)) : query;
    }
    Row<A> row(int64_t batch, int64_t i, int64_t num_keys) const {
        const I position = query(batch, i);
        const int64_t at = batch * range_stride + i;
        return {position, first(position), last(batch, position), static_cast<I>(begins ? begins[at] : 0),
                static_cast<I>(ends ? std::min(ends[at], num_keys) : num_keys)};
    }
    // The blocks of keys that queries near i see of a head, as bytes; null: all.
    const uint8_t* live_row(int64_t head, int64_t i) const {
        return live ? live + head * live_head_stride + i / block * live_columns : nullptr;
    }
};

// Of some queries the hull of what they see, and what all of them see.
template <class A>
struct Bounds {
    using I = int_t<A>;
    I first_min, first_max, last_min, last_max, begin_min, begin_max, end_min, end_max;
};

template <class A>
Bounds<A> bounds_of(const Row<A>* rows, int64_t count) {
    const Row<A>& r = rows[0];
    Bounds<A> b{r.first, r.first, r.last, r.last, r.begin, r.begin, r.end, r.end};
    for (int64_t i = 1; i < count; ++i) {
        b.first_min = std::min(b.first_min, rows[i].first), b.first_max = std::max(b.first_max, rows[i].first);
        b.last_min = std::min(b.last_min, rows[i].last), b.last_max = std::max(b.last_max, rows[i].last);
        b.begin_min = std::min(b.begin_min, rows[i].begin), b.begin_max = std::max(b.begin_max, rows[i].begin);
        b.end_min = std::min(b.end_min, rows[i].end), b.end_max = std::max(b.end_max, rows[i].end);
    }
    return b;
}

// The positions of packed keys, with the least and largest of each panel.
template <class A>
struct KeyPanels {
    using I = int_t<A>;
    Memory<I> position, least, greatest;
    KeyPanels(const Visibility<A>& sees, int64_t batch, int64_t num_keys)
        : position(allocate<I>(round_up(num_keys, kKeys))),
          least(allocate<I>(round_up(num_keys, kKeys) / kPanel)),
          greatest(allocate<I>(round_up(num_keys, kKeys) / kPanel)) {
        const int64_t padded = round_up(num_keys, kKeys);
        for (int64_t j = 0; j < padded; ++j) position.get()[j] = j < num_keys ? sees.key(batch, j) : sees.kNowhere;
        for (int64_t panel = 0; panel < padded / kPanel; ++panel) {
            const I* at = position.get() + panel * kPanel;
            least.get()[panel] = *std::min_element(at, at + kPanel);
            greatest.get()[panel] = *std::max_element(at, at + kPanel);
        }
    }
    bool is_seen(int64_t panel, const Bounds<A>& b) const {
        return least.get()[panel] <= b.last_max && greatest.get()[panel] >= b.first_min && panel * kPanel < b.end_max &&
               (panel + 1) * kPanel > b.begin_min;
    }
    bool is_seen_whole(int64_t panel, const Bounds<A>& b) const {
        return greatest.get()[panel] <= b.last_min && least.get()[panel] >= b.first_max && panel * kPanel >= b.begin_max &&
               (panel + 1) * kPanel <= b.end_min;
    }
};

// How many of the blocks that a panel touches are live: 0 none, 1 some, 2 all. `live`: a row of them.
inline int liveness(const uint8_t* live, int64_t block, int64_t panel, int64_t num_keys) {
    const int64_t from = panel * kPanel / block, to = (std::min((panel + 1) * kPanel, num_keys) + block - 1) / block;
    int64_t count = 0;
    for (int64_t i = from; i < to; ++i) count += live[i] != 0;
    return count == 0 ? 0 : count < to - from ? 1 : 2;
}

// Which columns [begin, end) of a tile of scores kChunkRows queries visit, and whether all of them are seen by all.
struct Visit {
    int64_t begin, end;
    bool whole;
};
// `live`: the row of blocks of these queries, `block` keys each; null: all.
template <class A>
Visit visit(const KeyPanels<A>& keys, int64_t tile, const Bounds<A>& bounds, const uint8_t* live, int64_t block,
            int64_t num_keys) {
    int64_t begin = kPanels, end = 0;
    bool whole = true;
    for (int64_t panel = 0; panel < kPanels; ++panel) {
        const int64_t at = tile * kPanels + panel;
        if (keys.is_seen(at, bounds) && (!live || liveness(live, block, at, num_keys) > 0)) {
            begin = std::min(begin, panel);
            end = panel + 1;
        }
    }
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t at = tile * kPanels + panel;
        whole = whole && keys.is_seen_whole(at, bounds) && (!live || liveness(live, block, at, num_keys) == 2);
    }
    return {begin * kPanel, end * kPanel, whole};
}

// --- packing ------------------------------------------------------------------------------------------------------------

// Rows [begin, end) of a head as (rows, stride) wide numbers times `factor`, zero behind the last feature.
template <class T>
void pack_rows(const Heads<const T>& x, int64_t batch, int64_t head, Range rows, int64_t features, int64_t stride,
               wide_t<T> factor, wide_t<T>* out) {
    using A = wide_t<T>;
    for (int64_t row = rows.begin; row < rows.end; ++row, out += stride) {
        const T* from = x.row(batch, row, head);
        each_register<A>(features, [&](int64_t i, int64_t count) { store_some(out + i, load_some(from + i, count) * factor, count); });
        std::fill(out + features, out + stride, A(0));
    }
}

// All rows of a head, transposed, in tiles of kKeys: (tile, feature, key); rows behind the last one are zero.
template <class A>
void pack_transposed(const A* rows, int64_t num_rows, int64_t features, int64_t stride, A* out) {
    for (int64_t tile = 0; tile < round_up(num_rows, kKeys) / kKeys; ++tile, out += features * kKeys) {
        const int64_t count = std::min(kKeys, num_rows - tile * kKeys);
        const A* from = rows + tile * kKeys * stride;
        for (int64_t first = 0; first < kKeys; first += 16)  // a few lines of the target at a time
            for (int64_t feature = 0; feature < features; ++feature)
                for (int64_t key = first; key < first + 16; ++key)
                    out[feature * kKeys + key] = key < count ? from[key * stride + feature] : A(0);
    }
}

// --- products -----------------------------------------------------------------------------------------------------------

// C (rows, columns) = or += A B over `depth`. A is read element by element at [row * a_row + k * a_depth]; B and C lie in
// rows of b_stride and c_stride.
template <class A>
struct Product {
    const A *a, *b;
    A* c;
    int64_t a_row, a_depth, b_stride, c_stride, depth;
};

template <class A, int rows, int registers, bool adds>
inline void product_tile(const Product<A>& p, int64_t row, int64_t column) {
    constexpr int64_t lanes = kLanes<A>;
    const A *a = p.a + row * p.a_row, *b = p.b + column;
    A* c = p.c + row * p.c_stride + column;
    Vec<A> sums[rows][registers];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < registers; ++v) sums[r][v] = adds ? load(c + r * p.c_stride + v * lanes) : Vec<A>{};
    for (int64_t k = 0; k < p.depth; ++k) {
        Vec<A> right[registers];
#pragma GCC unroll 2
        for (int v = 0; v < registers; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Vec<A> left = fill(a[r * p.a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < registers; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
        }
        a += p.a_depth;
        b += p.b_stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < registers; ++v) store(c + r * p.c_stride + v * lanes, sums[r][v]);
}

template <class A, bool adds, int rows>
inline void product_rows(const Product<A>& p, int64_t row, int64_t columns) {
    int64_t column = 0;
    for (; column + 2 * kLanes<A> <= columns; column += 2 * kLanes<A>) product_tile<A, rows, 2, adds>(p, row, column);
    if (column < columns) product_tile<A, rows, 1, adds>(p, row, column);
}

// `columns` is a multiple of a register.
template <class A, bool adds>
void product(const Product<A>& p, int64_t rows, int64_t columns) {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) product_rows<A, adds, kTileRows>(p, row, columns);
    if constexpr (kTileRows == 8)
        if (row + 4 <= rows) product_rows<A, adds, 4>(p, row, columns), row += 4;
    if (row + 2 <= rows) product_rows<A, adds, 2>(p, row, columns), row += 2;
    if (row < rows) product_rows<A, adds, 1>(p, row, columns);
}

// --- scores -------------------------------------------------------------------------------------------------------------

// What stands between a product of queries and keys and its softmax.
template <class A>
struct ScoreRule {
    Visibility<A> sees;
    const double* slopes;  // ALiBi, by local head; 0: none
    const int64_t* sample_ids;
    int64_t first_head;
    bool drops;
    DropoutStream dropout;
};

template <class A>
ScoreRule<A> score_rule(const AttentionRule& rule) {
    const bool drops = rule.dropout_threshold > 0;
    return {{(const int64_t*)rule.query_positions, (const int64_t*)rule.key_positions, (const int64_t*)rule.prefix,
             rule.query_position_stride, rule.key_position_stride, rule.causal, rule.window,
             (const int64_t*)rule.key_begins, (const int64_t*)rule.key_ends, rule.key_range_stride,
             (const uint8_t*)rule.live, rule.block, rule.live_head_stride, rule.live_columns},
            (const double*)rule.slopes,
            (const int64_t*)rule.sample_ids,
            rule.first_head,
            drops,
            dropout_stream(rule.key_first, rule.key_second, rule.dropout_threshold)};
}
template <class T>
Heads<T> heads_of(Address base, const HeadStrides& strides) {
    return {(T*)base, strides.batch, strides.row, strides.head};
}

// A tile of keys as some queries see it: their positions, the index of the first, the row of live blocks (null: all).
template <class A>
struct Tile {
    const int_t<A>* positions;
    int64_t first;
    const uint8_t* live;
    int64_t block;
};

// Adds the slope's part of one row's columns from j on, and hides what the query does not see.
template <class A>
inline Vec<A> ruled(Vec<A> score, const Tile<A>& tile, int64_t j, const Row<A>& row, A slope, bool whole) {
    using I = int_t<A>;
    Vec<I> position;
    std::memcpy(&position, tile.positions + j, sizeof position);
    if (slope != 0) score += __builtin_convertvector(position - row.position, Vec<A>) * slope;
    if (whole) return score;
    const Vec<A> hidden = fill(-std::numeric_limits<A>::infinity());
    if (tile.first + j >= row.end) return hidden;
    if (tile.live && !tile.live[(tile.first + j) / tile.block]) return hidden;  // a register lies in one block
    Vec<I> index;
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) index[lane] = static_cast<I>(tile.first + j + lane);
    return (position >= row.first) & (position <= row.last) & (index >= row.begin) & (index < row.end) ? score : hidden;
}

// Calls f(column, mask) for the registers of columns [begin, end) of a row, mask having all bits set where a weight is kept.
template <class A, class F>
void for_kept(const ScoreRule<A>& rule, int64_t batch, int64_t head, int64_t query, const int_t<A>* keys, Visit columns, F&& f) {
    const PhiloxRow counters = key_decisions(rule.sample_ids[batch], rule.first_head + head, query, rule.dropout.key);
    alignas(64) uint16_t numbers[kKeys + 3 * kDecisionStep];
    const int64_t count = columns.end - columns.begin;
    const int64_t first = keys[columns.begin];
    bool run = true;  // neighbours in memory are neighbours in the stream
    for (int64_t i = 1; i < count && run; ++i) run = keys[columns.begin + i] == first + i || keys[columns.begin + i] == Visibility<A>::kNowhere;
    if (run && first != Visibility<A>::kNowhere) {
        const int64_t skipped = first % kDecisionsPerCall;
        decision_numbers(counters, rule.dropout.key, first / kDecisionsPerCall, skipped + count, numbers);
        for (int64_t i = 0; i < count; i += kLanes<A>) f(columns.begin + i, kept<A>(numbers + skipped + i, rule.dropout.threshold));
        return;
    }
    alignas(64) uint16_t eight[2 * kDecisionStep];
    for (int64_t i = 0; i < count; ++i) {
        const int64_t key = keys[columns.begin + i];
        if (i == 0 || key / kDecisionsPerCall != keys[columns.begin + i - 1] / kDecisionsPerCall)
            decision_numbers(counters, rule.dropout.key, key / kDecisionsPerCall, kDecisionsPerCall, eight);
        numbers[i] = eight[key % kDecisionsPerCall];
    }
    for (int64_t i = 0; i < count; i += kLanes<A>) f(columns.begin + i, kept<A>(numbers + i, rule.dropout.threshold));
}

}  // namespace trilith::TRILITH_ISA
