// Attention's backward (Dao et al. 2022, algorithm 4): the weights are made again from the log-sum-exp, tile by tile.
//
// One part of the work is a head of a sample, so that all sums over queries and keys have one order. For a tile of queries and
// a tile of keys: scores and the weights' gradients eight queries at a time, with their part of the queries' gradient; then the
// keys' and values' gradients over the whole tile of queries, panel by panel, from the first query that sees the panel. Query
// heads that read one key/value head leave partial gradients, which are added in the order of heads.
// Memory: keys and values four times for each thread; the work is 10 S^2 D (half of it where causal).
#include <vector>

#include "cpu/attention_tile.h"

namespace trilith::TRILITH_ISA {

namespace {

template <class T>
struct Backward {
    using A = wide_t<T>;
    Heads<const T> q, k, v;
    const T *out, *dout;  // (batch, query, head, feature)
    const A* lse;         // (batch, head, query)
    Heads<T> dq, dk, dv;
    A *dk_parts, *dv_parts;  // (batch, head, key, stride): each query head's part; null where it is the whole
    const int64_t* kv_index;
    int64_t num_queries, num_keys, num_heads, features, stride;
    A scale;
    ScoreRule<A> rule;
};

// Scores and gradients of weights of one row become weights (with dropout) and gradients of scores.
template <class A>
void differentiate(A* scores, A* gradients, const Tile<A>& tile, Visit columns, const Row<A>& row, A slope, A lse, A delta) {
    if (lse == -std::numeric_limits<A>::infinity()) {  // nothing was seen
        std::fill(scores + columns.begin, scores + columns.end, A(0));
        std::fill(gradients + columns.begin, gradients + columns.end, A(0));
        return;
    }
    const bool plain = columns.whole && slope == 0;
    for (int64_t j = columns.begin; j < columns.end; j += kLanes<A>) {
        Vec<A> score = load(scores + j);
        if (!plain) score = ruled<A>(score, tile, j, row, slope, columns.whole);
        const Vec<A> weight = exp_below(score - lse);
        store(scores + j, weight);
        store(gradients + j, weight * (load(gradients + j) - delta));
    }
}

// Inner products of rows, each summed in the order in which product_tile sums the weights' gradients: where a query sees one key,
// both are the same number.
template <class A>
void inner_products(const A* x, const A* y, int64_t rows, int64_t features, int64_t stride, A* out) {
    A sums[kChunkRows] = {};
    for (int64_t f = 0; f < features; ++f)
        for (int64_t i = 0; i < kChunkRows; ++i)
            if (i < rows) sums[i] = fused(x[i * stride + f], y[i * stride + f], sums[i]);
    std::copy(sums, sums + rows, out);
}

template <class T>
void backward_part(const Backward<T>& op, int64_t batch, int64_t head) {
    using A = wide_t<T>;
    const int64_t stride = op.stride, padded = round_up(op.num_keys, kKeys), kv_head = op.kv_index[head];
    const KeyPanels<A> keys(op.rule.sees, batch, op.num_keys);
    Memory<A> k = allocate<A>(padded * stride), v = allocate<A>(padded * stride);
    Memory<A> k_transposed = allocate<A>(padded * op.features), v_transposed = allocate<A>(padded * op.features);
    pack_rows(op.k, batch, kv_head, {0, op.num_keys}, op.features, stride, A(1), k.get());
    std::fill(k.get() + op.num_keys * stride, k.get() + padded * stride, A(0));
    pack_rows(op.v, batch, kv_head, {0, op.num_keys}, op.features, stride, A(1), v.get());
    pack_transposed(k.get(), op.num_keys, op.features, stride, k_transposed.get());
    pack_transposed(v.get(), op.num_keys, op.features, stride, v_transposed.get());
    Memory<A> q = allocate<A>(kQueries * stride), dout = allocate<A>(kQueries * stride), dq = allocate<A>(kQueries * stride);
    Memory<A> out = allocate<A>(kQueries * stride);
    auto like_out = [&](const T* base) {
        return Heads<const T>{base, op.num_queries * op.num_heads * op.features, op.num_heads * op.features, op.features};
    };
    Memory<A> weights = allocate<A>(kQueries * kKeys), gradients = allocate<A>(kQueries * kKeys);
    // The last tile may reach behind the last key: products go to a copy with room for it.
    Memory<A> dk = allocate<A>(padded * stride), dv = allocate<A>(padded * stride);
    std::fill(dk.get(), dk.get() + padded * stride, A(0));
    std::fill(dv.get(), dv.get() + padded * stride, A(0));
    const A slope = op.rule.slopes ? static_cast<A>(op.rule.slopes[head]) : A(0);
    const A keep_scale = static_cast<A>(op.rule.dropout.scale);

    for (int64_t start = 0; start < op.num_queries; start += kQueries) {
        const int64_t count = std::min(kQueries, op.num_queries - start);
        const Range range{start, start + count};
        pack_rows(op.q, batch, head, range, op.features, stride, op.scale, q.get());
        pack_rows(like_out(op.dout), batch, head, range, op.features, stride, A(1), dout.get());
        pack_rows(like_out(op.out), batch, head, range, op.features, stride, A(1), out.get());
        std::fill(dq.get(), dq.get() + count * stride, A(0));
        Row<A> seen[kQueries];
        A lse[kQueries], delta[kQueries];
        for (int64_t i = 0; i < count; ++i) {
            seen[i] = op.rule.sees.row(batch, start + i, op.num_keys);
            lse[i] = op.lse[(batch * op.num_heads + head) * op.num_queries + start + i];
        }
        for (int64_t i = 0; i < count; i += kChunkRows)
            inner_products(dout.get() + i * stride, out.get() + i * stride, std::min<int64_t>(kChunkRows, count - i), op.features,
                           stride, delta + i);
        for (int64_t tile = 0; tile < padded / kKeys; ++tile) {
            Tile<A> seen_keys{keys.position.get() + tile * kKeys, tile * kKeys, nullptr, op.rule.sees.block};
            int64_t first_row[kPanels], end_row[kPanels];
            std::fill(first_row, first_row + kPanels, count);
            std::fill(end_row, end_row + kPanels, int64_t(0));
            for (int64_t chunk = 0; chunk < count; chunk += kChunkRows) {
                const int64_t held = std::min<int64_t>(kChunkRows, count - chunk);
                seen_keys.live = op.rule.sees.live_row(head, start + chunk);
                const Visit columns = visit(keys, tile, bounds_of<A>(seen + chunk, held), seen_keys.live, seen_keys.block,
                                            op.num_keys);
                A *weight_rows = weights.get() + chunk * kKeys, *gradient_rows = gradients.get() + chunk * kKeys;
                if (columns.begin >= columns.end) {
                    std::fill(weight_rows, weight_rows + held * kKeys, A(0));
                    std::fill(gradient_rows, gradient_rows + held * kKeys, A(0));
                    continue;
                }
                const int64_t width = columns.end - columns.begin;
                for (int64_t panel = columns.begin / kPanel; panel < columns.end / kPanel; ++panel) {
                    first_row[panel] = std::min(first_row[panel], chunk);
                    end_row[panel] = chunk + held;
                }
                const A* right = k_transposed.get() + tile * op.features * kKeys + columns.begin;
                product<A, false>({q.get() + chunk * stride, right, weight_rows + columns.begin, stride, 1, kKeys, kKeys,
                                   op.features},
                                  held, width);
                right = v_transposed.get() + tile * op.features * kKeys + columns.begin;
                product<A, false>({dout.get() + chunk * stride, right, gradient_rows + columns.begin, stride, 1, kKeys, kKeys,
                                   op.features},
                                  held, width);
                for (int64_t i = 0; i < held; ++i) {
                    A *weight = weight_rows + i * kKeys, *gradient = gradient_rows + i * kKeys;
                    std::fill(weight, weight + columns.begin, A(0));
                    std::fill(weight + columns.end, weight + kKeys, A(0));
                    std::fill(gradient, gradient + columns.begin, A(0));
                    std::fill(gradient + columns.end, gradient + kKeys, A(0));
                    auto each_kept = [&](auto&& f) {
                        for_kept<A>(op.rule, batch, head, seen[chunk + i].position, seen_keys.positions, columns, f);
                    };
                    if (op.rule.drops) each_kept([&](int64_t j, auto mask) {
                        store(gradient + j, mask ? load(gradient + j) * keep_scale : Vec<A>{});
                    });
                    differentiate<A>(weight, gradient, seen_keys, columns, seen[chunk + i], slope, lse[chunk + i],
                                     delta[chunk + i]);
                    if (op.rule.drops) each_kept([&](int64_t j, auto mask) {
                        store(weight + j, mask ? load(weight + j) * keep_scale : Vec<A>{});
                    });
                }
                product<A, true>({gradient_rows + columns.begin, k.get() + (tile * kKeys + columns.begin) * stride,
                                  dq.get() + chunk * stride, kKeys, 1, stride, stride, width},
                                 held, stride);
            }
            for (int64_t panel = 0; panel < kPanels; ++panel) {
                const int64_t from = first_row[panel], depth = end_row[panel] - from, column = panel * kPanel;
                if (depth <= 0) continue;
                const int64_t at = (tile * kKeys + column) * stride, corner = from * kKeys + column;
                product<A, true>({weights.get() + corner, dout.get() + from * stride, dv.get() + at, 1, kKeys, stride, stride,
                                  depth},
                                 kPanel, stride);
                product<A, true>({gradients.get() + corner, q.get() + from * stride, dk.get() + at, 1, kKeys, stride, stride,
                                  depth},
                                 kPanel, stride);
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            T* to = op.dq.row(batch, start + i, head);
            const A* from = dq.get() + i * stride;
            each_register<A>(op.features, [&](int64_t f, int64_t lanes) { store_some(to + f, load(from + f) * op.scale, lanes); });
        }
    }
    if (op.dk_parts) {
        const int64_t size = op.num_keys * stride, at = (batch * op.num_heads + head) * size;
        std::copy(dk.get(), dk.get() + size, op.dk_parts + at);
        std::copy(dv.get(), dv.get() + size, op.dv_parts + at);
        return;
    }
    for (int64_t key = 0; key < op.num_keys; ++key)
        each_register<A>(op.features, [&](int64_t f, int64_t lanes) {
            store_some(op.dk.row(batch, key, kv_head) + f, load(dk.get() + key * stride + f), lanes);
            store_some(op.dv.row(batch, key, kv_head) + f, load(dv.get() + key * stride + f), lanes);
        });
}

// Whether each key/value head is read by exactly one query head.
bool is_one_to_one(const int64_t* kv_index, int64_t num_heads, int64_t num_kv_heads) {
    std::vector<int> readers(static_cast<size_t>(num_kv_heads));
    for (int64_t head = 0; head < num_heads; ++head) ++readers[static_cast<size_t>(kv_index[head])];
    return std::all_of(readers.begin(), readers.end(), [](int count) { return count == 1; });
}

// The gradients of one key/value head: the sum over the query heads that read it, in their order.
template <class T>
void gather_heads(const wide_t<T>* parts, const Heads<T>& to, const Backward<T>& op, int64_t batch, int64_t kv_head) {
    using A = wide_t<T>;
    const int64_t size = op.num_keys * op.stride;
    for (int64_t key = 0; key < op.num_keys; ++key)
        each_register<A>(op.features, [&](int64_t f, int64_t lanes) {
            Vec<A> total{};
            for (int64_t head = 0; head < op.num_heads; ++head)
                if (op.kv_index[head] == kv_head)
                    total += load(parts + (batch * op.num_heads + head) * size + key * op.stride + f);
            store_some(to.row(batch, key, kv_head) + f, total, lanes);
        });
}

}  // namespace

void attention_backward(int dtype, const AttentionSizes& sizes, const AttentionRule& rule, Address q, Address k, Address v,
                        Address kv_index, Address out, Address lse, Address dout, Address dq, Address dk, Address dv,
                        const AttentionSizes& gradient_sizes, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const int64_t stride = round_up(sizes.features, kLanes<A>), heads = sizes.batch * sizes.num_heads;
        const bool whole = is_one_to_one((const int64_t*)kv_index, sizes.num_heads, sizes.num_kv_heads);
        const int64_t size = whole ? 0 : heads * sizes.num_keys * stride;
        Memory<A> dk_parts = allocate<A>(size), dv_parts = allocate<A>(size);
        const Backward<T> op{heads_of<const T>(q, sizes.q), heads_of<const T>(k, sizes.k), heads_of<const T>(v, sizes.v),
                             (const T*)out, (const T*)dout, (const A*)lse, heads_of<T>(dq, gradient_sizes.q),
                             heads_of<T>(dk, gradient_sizes.k), heads_of<T>(dv, gradient_sizes.v),
                             whole ? nullptr : dk_parts.get(), whole ? nullptr : dv_parts.get(), (const int64_t*)kv_index, sizes.num_queries, sizes.num_keys,
                             sizes.num_heads, sizes.features, stride, static_cast<A>(sizes.scale), score_rule<A>(rule)};
        const int used = useful_threads(threads, heads * sizes.num_queries * sizes.num_keys * sizes.features);
        for_each_part(heads, used, [&](int64_t part) { backward_part(op, part / sizes.num_heads, part % sizes.num_heads); });
        if (whole) return;
        for_each_part(sizes.batch * sizes.num_kv_heads, used, [&](int64_t part) {
            const int64_t batch = part / sizes.num_kv_heads, kv_head = part % sizes.num_kv_heads;
            gather_heads(dk_parts.get(), op.dk, op, batch, kv_head);
            gather_heads(dv_parts.get(), op.dv, op, batch, kv_head);
        });
    });
}

}  // namespace trilith::TRILITH_ISA
