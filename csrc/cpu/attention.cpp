// Attention without a matrix of scores, forward (Dao et al. 2022; online softmax: Milakov and Gimelshein 2018).
//
// One part of the work is a head of a sample, or a run of its queries where there are few heads. Its keys and values are packed
// once: keys transposed in tiles, so that scores come out in registers along the keys. Then, for each tile of queries and each
// tile of keys, eight queries at a time: scores, softmax and the product with the values follow each other while the scores are
// in the first cache. Panels of keys that none of the eight sees are skipped, and only panels that some do not see are masked.
// Memory: keys and values once more for each thread, and two numbers a query; the work is 4 S^2 D (half of it where causal).
#include "cpu/attention_tile.h"

namespace trilith::TRILITH_ISA {

namespace {

template <class T>
struct Forward {
    using A = wide_t<T>;
    Heads<const T> q, k, v;
    T* out;  // (batch, query, head, feature)
    A* lse;  // (batch, head, query)
    const int64_t* kv_index;
    int64_t num_queries, num_keys, num_heads, features;
    A scale;
    ScoreRule<A> rule;
};

// The queries of a tile, as far as their softmax has come.
template <class A>
struct Running {
    alignas(64) A largest[kQueries], total[kQueries];
};

// Softmax of one row's visited scores in place: afterwards they are weights relative to the largest score so far, and the
// output so far is rescaled.
template <class A>
void soften(A* scores, const Tile<A>& tile, Visit columns, const Row<A>& row, A slope, A& largest_so_far, A& total, A* out,
            int64_t stride) {
    constexpr int64_t lanes = kLanes<A>;
    const A infinity = std::numeric_limits<A>::infinity();
    Vec<A> most = fill(-infinity);
    if (columns.whole && slope == 0) {
        for (int64_t j = columns.begin; j < columns.end; j += lanes) most = max(most, load(scores + j));
    } else {
        for (int64_t j = columns.begin; j < columns.end; j += lanes) {
            const Vec<A> score = ruled<A>(load(scores + j), tile, j, row, slope, columns.whole);
            store(scores + j, score);
            most = max(most, score);
        }
    }
    const A before = largest_so_far, now = std::max(before, largest(most));
    largest_so_far = now;
    const A shift = now == -infinity ? A(0) : now;  // nothing was seen: all weights are zero
    Vec<A> sums{};
    for (int64_t j = columns.begin; j < columns.end; j += lanes) {
        const Vec<A> weight = exp_below(load(scores + j) - shift);
        store(scores + j, weight);
        sums += weight;
    }
    if (now != before) {
        const A factor = exp_below(fill(before - shift))[0];
        total *= factor;
        for (int64_t i = 0; i < stride; i += lanes) store(out + i, load(out + i) * factor);
    }
    total += sum(sums);
}

template <class T>
void forward_part(const Forward<T>& op, int64_t batch, int64_t head, Range queries) {
    using A = wide_t<T>;
    const int64_t stride = round_up(op.features, kLanes<A>), padded = round_up(op.num_keys, kKeys);
    const int64_t kv_head = op.kv_index[head];
    const KeyPanels<A> keys(op.rule.sees, batch, op.num_keys);
    Memory<A> rows = allocate<A>(padded * stride), transposed = allocate<A>(padded * op.features);
    pack_rows(op.k, batch, kv_head, {0, op.num_keys}, op.features, stride, A(1), rows.get());
    pack_transposed(rows.get(), op.num_keys, op.features, stride, transposed.get());
    pack_rows(op.v, batch, kv_head, {0, op.num_keys}, op.features, stride, A(1), rows.get());
    std::fill(rows.get() + op.num_keys * stride, rows.get() + padded * stride, A(0));
    Memory<A> q = allocate<A>(kQueries * stride), out = allocate<A>(kQueries * stride);
    alignas(64) A scores[kChunkRows * kKeys];
    const A slope = op.rule.slopes ? static_cast<A>(op.rule.slopes[head]) : A(0);
    const A keep_scale = static_cast<A>(op.rule.dropout.scale);

    for (int64_t start = queries.begin; start < queries.end; start += kQueries) {
        const int64_t count = std::min(kQueries, queries.end - start);
        pack_rows(op.q, batch, head, {start, start + count}, op.features, stride, op.scale, q.get());
        std::fill(out.get(), out.get() + count * stride, A(0));
        Running<A> running;
        Row<A> seen[kQueries];
        for (int64_t i = 0; i < count; ++i) {
            running.largest[i] = -std::numeric_limits<A>::infinity();
            running.total[i] = 0;
            seen[i] = op.rule.sees.row(batch, start + i, op.num_keys);
        }
        for (int64_t tile = 0; tile < padded / kKeys; ++tile) {
            const A* right = transposed.get() + tile * op.features * kKeys;
            Tile<A> seen_keys{keys.position.get() + tile * kKeys, tile * kKeys, nullptr, op.rule.sees.block};
            for (int64_t chunk = 0; chunk < count; chunk += kChunkRows) {
                const int64_t held = std::min<int64_t>(kChunkRows, count - chunk);
                seen_keys.live = op.rule.sees.live_row(head, start + chunk);
                const Visit columns = visit(keys, tile, bounds_of<A>(seen + chunk, held), seen_keys.live, seen_keys.block,
                                            op.num_keys);
                if (columns.begin >= columns.end) continue;
                const int64_t width = columns.end - columns.begin;
                A* out_rows = out.get() + chunk * stride;
                product<A, false>({q.get() + chunk * stride, right + columns.begin, scores + columns.begin, stride, 1, kKeys,
                                   kKeys, op.features},
                                  held, width);
                for (int64_t i = 0; i < held; ++i) {
                    A* row = scores + i * kKeys;
                    soften<A>(row, seen_keys, columns, seen[chunk + i], slope, running.largest[chunk + i],
                              running.total[chunk + i], out_rows + i * stride, stride);
                    if (op.rule.drops)
                        for_kept<A>(op.rule, batch, head, seen[chunk + i].position, seen_keys.positions, columns,
                                    [&](int64_t j, auto mask) {
                                        store(row + j, mask ? load(row + j) * keep_scale : Vec<A>{});
                                    });
                }
                product<A, true>({scores + columns.begin, rows.get() + (tile * kKeys + columns.begin) * stride, out_rows, kKeys,
                                  1, stride, stride, width},
                                 held, stride);
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const A total = running.total[i], factor = total > 0 || total != total ? 1 / total : A(0);
            T* to = op.out + ((batch * op.num_queries + start + i) * op.num_heads + head) * op.features;
            const A* from = out.get() + i * stride;
            each_register<A>(op.features, [&](int64_t f, int64_t lanes) { store_some(to + f, load(from + f) * factor, lanes); });
            op.lse[(batch * op.num_heads + head) * op.num_queries + start + i] = running.largest[i] + std::log(total);
        }
    }
}

}  // namespace

void attention_forward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k, Address v,
                       Address kv_index, Address out, Address lse, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        const Forward<T> op{heads_of<const T>(q, sizes.q), heads_of<const T>(k, sizes.k), heads_of<const T>(v, sizes.v),
                            (T*)out,       (wide_t<T>*)lse, (const int64_t*)kv_index, sizes.num_queries,
                            sizes.num_keys, sizes.num_heads, sizes.features,           static_cast<wide_t<T>>(sizes.scale),
                            score_rule<wide_t<T>>(rule)};
        // Where heads are few, their queries are dealt too; each query's result is its own.
        const int64_t heads = sizes.batch * sizes.num_heads, tiles = (sizes.num_queries + kQueries - 1) / kQueries;
        const int64_t pieces = heads == 0 ? 0 : std::clamp<int64_t>(16 / heads, 1, std::max<int64_t>(tiles / 4, 1));
        const int64_t work = sizes.num_queries * sizes.num_keys * sizes.features;
        for_each_part(heads * pieces, useful_threads(threads, heads * work), [&](int64_t part) {
            const int64_t head = part / pieces;
            forward_part(op, head / sizes.num_heads, head % sizes.num_heads,
                         part_of(sizes.num_queries, pieces, part % pieces, kQueries));
        });
    });
}

}  // namespace trilith::TRILITH_ISA
