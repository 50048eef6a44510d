// Cross-entropy of tokens over rows of logits, whole or a rank's part of the vocabulary.
//
// A row is taken in blocks that stay in the first cache: the block's largest logit, then its exponentials relative to the largest
// so far, so that the row is read from memory once. Forward moves one row in; the gradient one in and one out; both together
// (where each token's scale is known beforehand) one in and one out, and every exponential is computed once: a block is replaced by
// its exponentials, which the second pass over the row, now in the second cache, multiplies by what they lack.
#include <cmath>
#include <memory>

#include "common/math.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

namespace {

constexpr int64_t kBlock = 1024;

// The rows of a table of logits: `valid` columns that are labels [first_label, first_label + valid), then padding.
template <class T>
struct Rows {
    T* base;
    int64_t stride, valid, width;
    const int64_t* labels;
    int64_t first_label;

    T* row(int64_t token) const { return base + token * stride; }
    // The column of a token's label, or -1 where it is not here.
    int64_t column(int64_t token) const {
        const int64_t column = labels[token] - first_label;
        return column >= 0 && column < valid ? column : -1;
    }
};

template <class T>
wide_t<T> row_largest(const T* x, int64_t n) {
    using A = wide_t<T>;
    const A lowest = -std::numeric_limits<A>::infinity();
    Vec<A> most[4] = {fill(lowest), fill(lowest), fill(lowest), fill(lowest)};
    int64_t i = 0;
    for (; i + 4 * kLanes<A> <= n; i += 4 * kLanes<A>)
        for (int k = 0; k < 4; ++k) most[k] = max(most[k], load(x + i + k * kLanes<A>));
    for (; i + kLanes<A> <= n; i += kLanes<A>) most[0] = max(most[0], load(x + i));
    A result = largest(max(max(most[0], most[1]), max(most[2], most[3])));
    for (; i < n; ++i) result = std::max(result, load_one(x + i));
    return result;
}

// Sum of exp(x - shift) over n logits; with `keeps` they take the logits' place.
template <class T, bool keeps, class Source>
wide_t<T> sum_exp(Source* x, int64_t n, wide_t<T> shift) {
    using A = wide_t<T>;
    Vec<A> sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes<A> <= n; i += 2 * kLanes<A>)
        for (int k = 0; k < 2; ++k) {
            const Vec<A> value = exp_below(load(x + i + k * kLanes<A>) - shift);
            if constexpr (keeps) store(x + i + k * kLanes<A>, value);
            sums[k] += value;
        }
    each_register<A>(n - i, [&](int64_t at, int64_t count) {
        Vec<A> value = exp_below(load_some(x + i + at, count) - shift);
        if constexpr (keeps) store_some(x + i + at, value, count);
        for (int64_t lane = count; lane < kLanes<A>; ++lane) value[lane] = 0;
        sums[0] += value;
    });
    return sum(sums[0] + sums[1]);
}

// What a sum relative to `before` becomes relative to `now`.
template <class A>
A rebased(A total, A before, A now) {
    return total == 0 ? total : total * exp(fill(before - now))[0];
}

// Largest logit and sum of exponentials of a row, block by block.
template <class T>
void row_terms(const T* x, int64_t n, wide_t<T>& most, wide_t<T>& total) {
    using A = wide_t<T>;
    most = -std::numeric_limits<A>::infinity();
    total = 0;
    for (int64_t at = 0; at < n; at += kBlock) {
        const int64_t count = std::min(kBlock, n - at);
        const A before = most;
        most = std::max(before, row_largest(x + at, count));
        if (most == -std::numeric_limits<A>::infinity()) {  // all so far are -infinity, or NaN, which must come through
            for (int64_t i = at; i < at + count; ++i) total += load_one(x + i) == most ? A(0) : load_one(x + i);
            continue;
        }
        if (most != before) total = rebased(total, before, most);
        total += sum_exp<T, false>(x + at, count, most);
    }
}

template <class T, class Put>
void gradient_row(const Rows<const T>& from, const Rows<T>& to, int64_t token, wide_t<T> most, wide_t<T> total, wide_t<T> scale,
                  wide_t<T> softmax_scale, Put&& put) {
    using A = wide_t<T>;
    const T* x = from.row(token);
    T* g = to.row(token);
    const A factor = softmax_scale / total;
    const int64_t column = from.column(token);
    const A label = column >= 0 ? load_one(x + column) : A(0);
    each_register<A>(from.valid, [&](int64_t i, int64_t count) {
        if (count == kLanes<A>) prefetch(x + from.stride + i);  // the next row, or what lies behind the last
        put(g + i, exp_below(load_some(x + i, count) - most) * factor, count);
    });
    if (column >= 0) store_one(g + column, exp(fill(label - most))[0] * factor - scale);
    for (int64_t i = from.valid; i < from.width; ++i) store_one(g + i, A(0));
}

// The token's loss, and its gradient in the place of its logits. Exponentials wait in `held` until the sum is known.
template <class T>
wide_t<T> fused_row(const Rows<T>& rows, int64_t token, wide_t<T> z_loss, wide_t<T> scale, wide_t<T>* held, wide_t<T>* shifts) {
    using A = wide_t<T>;
    T* x = rows.row(token);
    const int64_t column = rows.column(token);
    const A label = column >= 0 ? load_one(x + column) : A(0);
    A most = -std::numeric_limits<A>::infinity(), total = 0;
    for (int64_t at = 0, block = 0; at < rows.valid; at += kBlock, ++block) {
        const int64_t count = std::min(kBlock, rows.valid - at);
        const A before = most;
        most = std::max(before, row_largest(x + at, count));
        const A shift = most == -std::numeric_limits<A>::infinity() ? A(0) : most;
        if (most != before) total = rebased(total, before, most);
        A* values = held + at;
        if constexpr (sizeof(T) == sizeof(A)) {
            total += sum_exp<T, true>(reinterpret_cast<A*>(x) + at, count, shift);
        } else {
            each_register<A>(count, [&](int64_t i, int64_t lanes) { store_some(values + i, load_some(x + at + i, lanes), lanes); });
            total += sum_exp<T, true>(values, count, shift);
        }
        shifts[block] = shift;
    }
    const A normaliser = std::log(total) + most, softmax_scale = scale * (1 + 2 * z_loss * normaliser);
    const A loss = column >= 0 ? std::log(total) - (label - most) + z_loss * normaliser * normaliser : A(0);
    for (int64_t at = 0, block = 0; at < rows.valid; at += kBlock, ++block) {
        const int64_t count = std::min(kBlock, rows.valid - at);
        const A factor = (shifts[block] == most ? A(1) : exp(fill(shifts[block] - most))[0]) * (softmax_scale / total);
        each_register<A>(count, [&](int64_t i, int64_t lanes) {
            Vec<A> value;
            if constexpr (sizeof(T) == sizeof(A))
                value = load_some(reinterpret_cast<A*>(x) + at + i, lanes);
            else
                value = load_some(held + at + i, lanes);
            store_some(x + at + i, value * factor, lanes);
        });
    }
    if (column >= 0) store_one(x + column, exp(fill(label - most))[0] * (softmax_scale / total) - scale);
    for (int64_t i = rows.valid; i < rows.width; ++i) store_one(x + i, A(0));
    return loss;
}

}  // namespace

void logit_max(int dtype, Address logits, int64_t stride, int64_t valid, int64_t tokens, Address most, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        for_each_piece(tokens, useful_threads(threads, tokens * valid * 4), 1, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token)
                ((A*)most)[token] = row_largest((const T*)logits + token * stride, valid);
        });
    });
}

void cross_entropy_terms(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                         int64_t tokens, bool finds_largest, Address most, Address total, Address target, Address losses,
                         int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const Rows<const T> rows{(const T*)logits, stride, valid, valid, (const int64_t*)labels, first_label};
        A *mosts = (A*)most, *totals = (A*)total, *targets = (A*)target;
        for_each_piece(tokens, useful_threads(threads, tokens * valid * 8), 1, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
                const T* x = rows.row(token);
                if (finds_largest)
                    row_terms(x, valid, mosts[token], totals[token]);
                else
                    totals[token] = sum_exp<T, false>(x, valid, mosts[token]);
                const int64_t column = rows.column(token);
                targets[token] = column >= 0 ? load_one(x + column) - mosts[token] : A(0);
                if (losses) ((A*)losses)[token] = column >= 0 ? std::log(totals[token]) - targets[token] : A(0);
            }
        });
    });
}

void cross_entropy_gradient(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                            int64_t width, int64_t tokens, Address most, Address total, Address scale, Address softmax_scale,
                            Address gradient, int64_t gradient_stride, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const Rows<const T> from{(const T*)logits, stride, valid, width, (const int64_t*)labels, first_label};
        const Rows<T> to{(T*)gradient, gradient_stride, valid, width, nullptr, first_label};
        // In place a row is in the cache when it is written.
        const bool streamed = gradient != logits && is_streamed(to.base, tokens * width, gradient_stride) && streams(to.base, valid);
        for_each_piece(tokens, useful_threads(threads, tokens * width * 8), 1, [&](int64_t begin, int64_t end) {
            with_store<T>(streamed, [&](auto put) {
                const A* of_softmax = (const A*)(softmax_scale ? softmax_scale : scale);
                for (int64_t token = begin; token < end; ++token)
                    gradient_row(from, to, token, ((const A*)most)[token], ((const A*)total)[token], ((const A*)scale)[token],
                                 of_softmax[token], put);
            });
        });
    });
}

void cross_entropy_fused(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                         int64_t width, int64_t tokens, double z_loss, Address scale, Address losses, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const Rows<T> rows{(T*)logits, stride, valid, width, (const int64_t*)labels, first_label};
        for_each_piece(tokens, useful_threads(threads, tokens * width * 8), 1, [&](int64_t begin, int64_t end) {
            const int64_t blocks = (valid + kBlock - 1) / kBlock;
            std::unique_ptr<A[]> shifts(new A[static_cast<size_t>(blocks)]);
            std::unique_ptr<A[]> held(sizeof(T) == sizeof(A) ? nullptr : new A[static_cast<size_t>(valid)]);
            for (int64_t token = begin; token < end; ++token)
                ((A*)losses)[token] =
                    fused_row(rows, token, static_cast<A>(z_loss), ((const A*)scale)[token], held.get(), shifts.get());
        });
    });
}

}  // namespace trilith::TRILITH_ISA
