// LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang and Sennrich 2019), with the residual's sum fused both ways.
//
// A row is read from memory once and stays in the cache for its second and third pass: forward moves one row in (two
// with a residual) and one out (two), backward two in and one out, which is the floor. Large results are written past
// the caches. Variance is the mean of squared distances from the mean, not a difference of large sums. Backward takes
// two rows at a time, so that the sums for weight and bias pass through registers half as often, and asks for the next two
// while it writes.
#include <cstdlib>
#include <memory>

#include "common/parallel.h"
#include "common/rows.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

namespace {

constexpr int kRows = 2;

template <class T>
struct Forward {
    using A = wide_t<T>;
    const T *x, *residual, *weight, *bias;
    T *sum, *y;
    A *mean, *rstd;
    int64_t width;
    A eps;
    bool streamed;
};

// Row sums through four accumulators, so that additions do not wait for each other.
template <class A, class F>
inline A row_sum(int64_t n, F&& term) {
    constexpr int64_t step = kLanes<A>;
    Vec<A> acc[4] = {};
    int64_t i = 0;
    for (; i + 4 * step <= n; i += 4 * step)
        for (int k = 0; k < 4; ++k) acc[k] += term(i + k * step, step);
    each_register<A>(n - i, [&](int64_t at, int64_t count) {
        Vec<A> value = term(i + at, count);
        if (count < step)
            for (int64_t lane = count; lane < step; ++lane) value[lane] = 0;
        acc[0] += value;
    });
    return trilith::TRILITH_ISA::sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// What a row is summed for first: its numbers for their mean, or, of RMSNorm, at once their squares.
template <bool is_rms, class V>
inline V first_term(V x) {
    return is_rms ? x * x : x;
}

// One row, whose first terms sum to `total`; `next` is what is read after this row.
template <class T, bool is_rms, class Row>
void norm_row(const Forward<T>& op, int64_t row, const Row* x, wide_t<T> total, const T* next, const T* next_residual) {
    using A = wide_t<T>;
    const int64_t n = op.width;
    const A mean = is_rms ? A(0) : total / static_cast<A>(n);
    A squares = total;
    if constexpr (!is_rms)
        squares = row_sum<A>(n, [&](int64_t i, int64_t count) {
            Vec<A> centred = load_some(x + i, count) - mean;
            return centred * centred;
        });
    const A rstd = 1 / std::sqrt(squares / static_cast<A>(n) + op.eps);
    if constexpr (!is_rms) op.mean[row] = mean;
    op.rstd[row] = rstd;
    T* y = op.y + row * n;
    with_put<T>(op.streamed, [&](auto put) {
        each_register<A>(n, [&](int64_t i, int64_t count) {
            if (next) prefetch(next + i);
            if (next_residual) prefetch(next_residual + i);
            Vec<A> normal = (load_some(x + i, count) - mean) * rstd, weight = load_some(op.weight + i, count);
            put(y + i, op.bias ? fma(normal, weight, load_some(op.bias + i, count)) : normal * weight, count);
        });
    });
}

template <class T, bool is_rms>
void forward_rows(const Forward<T>& op, int64_t begin, int64_t end) {
    using A = wide_t<T>;
    const int64_t n = op.width;
    std::unique_ptr<A, void (*)(void*)> buffer(op.residual ? (A*)std::malloc(n * sizeof(A)) : nullptr, std::free);
    A* const held = buffer.get();
    for (int64_t row = begin; row < end; ++row) {
        const T* x = op.x + row * n;
        const T* next = row + 1 < end ? x + n : nullptr;
        if (!op.residual) {
            const A total = row_sum<A>(n, [&](int64_t i, int64_t count) { return first_term<is_rms>(load_some(x + i, count)); });
            norm_row<T, is_rms>(op, row, x, total, next, nullptr);
            continue;
        }
        // The sum goes to memory at once and stays in `held` for the passes over it: its place in memory is not read again.
        const T* residual = op.residual + row * n;
        T* sum = op.sum + row * n;
        A total = 0;
        with_put<T>(op.streamed, [&](auto put) {
            total = row_sum<A>(n, [&](int64_t i, int64_t count) {
                Vec<A> value = load_some(x + i, count) + load_some(residual + i, count);
                put(sum + i, value, count);
                value = rounded<T>(value);
                store_some(held + i, value, count);
                return first_term<is_rms>(value);
            });
        });
        norm_row<T, is_rms>(op, row, held, total, next, next ? residual + n : nullptr);
    }
    if (op.streamed) stream_fence();
}

template <class T>
struct Backward {
    using A = wide_t<T>;
    const T *dy, *dsum, *x, *weight;
    const A *mean, *rstd;
    T* dx;
    int64_t width;
    bool streamed;
};

// Rows [row, row + count): dx, and their part of the gradients of weight and bias added to `dweight` and `dbias`.
// `more_rows`: as many follow.
template <class T, bool is_rms, int count>
void backward_rows(const Backward<T>& op, int64_t row, bool more_rows, wide_t<T>* dweight, wide_t<T>* dbias) {
    using A = wide_t<T>;
    const int64_t n = op.width;
    const T *dy = op.dy + row * n, *x = op.x + row * n;
    A mean[count], rstd[count];
    Vec<A> sum_g[count] = {}, sum_gx[count] = {};
    for (int r = 0; r < count; ++r) {
        mean[r] = is_rms ? A(0) : op.mean[row + r];
        rstd[r] = op.rstd[row + r];
    }
    each_register<A>(n, [&](int64_t i, int64_t lanes) {
        Vec<A> weight = load_some(op.weight + i, lanes), dw = load_some(dweight + i, lanes), db{};
        if (dbias) db = load_some(dbias + i, lanes);
        for (int r = 0; r < count; ++r) {
            Vec<A> d = load_some(dy + r * n + i, lanes);
            Vec<A> normal = (load_some(x + r * n + i, lanes) - mean[r]) * rstd[r];
            Vec<A> g = d * weight;
            if constexpr (!is_rms) sum_g[r] += g;
            sum_gx[r] = fma(g, normal, sum_gx[r]);
            dw = fma(d, normal, dw);
            db += d;
        }
        store_some(dweight + i, dw, lanes);
        if (dbias) store_some(dbias + i, db, lanes);
    });
    for (int r = 0; r < count; ++r) {
        const A scale = 1 / static_cast<A>(n);
        const A mean_g = is_rms ? A(0) : sum(sum_g[r]) * scale, mean_gx = sum(sum_gx[r]) * scale;
        const T *dy_row = dy + r * n, *x_row = x + r * n, *dsum = op.dsum ? op.dsum + (row + r) * n : nullptr;
        T* dx = op.dx + (row + r) * n;
        auto value = [&](int64_t i, int64_t lanes) {
            if (more_rows) {  // while this row is written, the one that stands in its place in the next group is read
                prefetch(dy_row + count * n + i);
                prefetch(x_row + count * n + i);
            }
            Vec<A> normal = (load_some(x_row + i, lanes) - mean[r]) * rstd[r];
            Vec<A> g = load_some(dy_row + i, lanes) * load_some(op.weight + i, lanes);
            return (g - mean_g - normal * mean_gx) * rstd[r];
        };
        with_put<T>(op.streamed, [&](auto put) {
            if (dsum)
                each_register<A>(n, [&](int64_t i, int64_t lanes) {
                    if (more_rows) prefetch(dsum + count * n + i);
                    put(dx + i, value(i, lanes) + load_some(dsum + i, lanes), lanes);
                });
            else
                each_register<A>(n, [&](int64_t i, int64_t lanes) { put(dx + i, value(i, lanes), lanes); });
        });
    }
}

template <class T, bool is_rms>
void backward_part(const Backward<T>& op, Range rows, wide_t<T>* dweight, wide_t<T>* dbias) {
    int64_t row = rows.begin;
    for (; row + kRows <= rows.end; row += kRows)
        backward_rows<T, is_rms, kRows>(op, row, row + 2 * kRows <= rows.end, dweight, dbias);
    for (; row < rows.end; ++row) backward_rows<T, is_rms, 1>(op, row, false, dweight, dbias);
    if (op.streamed) stream_fence();
}

}  // namespace

void norm_forward(int dtype, Address x, Address residual, Address weight, Address bias, Address sum, Address y,
                  Address mean, Address rstd, int64_t rows, int64_t width, double eps, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(T));
        Forward<T> op{(const T*)x, (const T*)residual, (const T*)weight, (const T*)bias, (T*)sum,
                      (T*)y,       (A*)mean,           (A*)rstd,         width,          static_cast<A>(eps),
                      false};
        op.streamed = is_streamed(op.y, rows * width, width) && streams(op.sum, width);
        for_each_piece(rows, useful_threads(threads, 2 * bytes), 1, [&](int64_t begin, int64_t end) {
            mean ? forward_rows<T, false>(op, begin, end) : forward_rows<T, true>(op, begin, end);
        });
    });
}

void norm_backward(int dtype, Address dy, Address dsum, Address x, Address weight, Address mean, Address rstd,
                   Address dx, Address dweight, Address dbias, int64_t rows, int64_t width, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(T));
        Backward<T> op{(const T*)dy,  (const T*)dsum, (const T*)x, (const T*)weight, (const A*)mean,
                       (const A*)rstd, (T*)dx,         width,       false};
        op.streamed = is_streamed(op.dx, rows * width, width);
        const int64_t parts = row_parts(rows);
        const int64_t lines = dbias ? 2 : 1;
        std::unique_ptr<A, void (*)(void*)> partial((A*)std::calloc(parts * lines * width, sizeof(A)), std::free);
        const int used = useful_threads(threads, 3 * bytes);
        for_each_part(parts, used, [&](int64_t part) {
            Range range = part_of(rows, parts, part, kRows);
            A* dw = partial.get() + part * lines * width;
            A* db = dbias ? dw + width : nullptr;
            mean ? backward_part<T, false>(op, range, dw, db) : backward_part<T, true>(op, range, dw, db);
        });
        T* const targets[] = {(T*)dweight, (T*)dbias};
        for (int64_t line = 0; line < lines; ++line)
            for_each_piece(width, used, 1024, [&](int64_t begin, int64_t end) {
                each_register<A>(end - begin, [&](int64_t i, int64_t lanes) {
                    Vec<A> total{};
                    for (int64_t part = 0; part < parts; ++part)
                        total += load_some(partial.get() + (part * lines + line) * width + begin + i, lanes);
                    store_some(targets[line] + begin + i, total, lanes);
                });
            });
    });
}

}  // namespace trilith::TRILITH_ISA
