// GELU (Hendrycks and Gimpel 2016), exact and by its tanh form, with the bias before it; SwiGLU and GeGLU (Shazeer 2020).
//
// One pass each: forward moves one tensor in (a gated unit two) and one out, backward two in and one out (three and two).
// Only inputs are kept; backward computes the function again, which costs less than reading it. Gate and up may be the two
// halves of one product, and so may their gradients. Large results are written past the caches.
#include <cstdlib>
#include <memory>

#include "common/curves.h"
#include "common/kinds.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

namespace {

constexpr int64_t kGrain = 1024;            // pieces of flat tensors begin at multiples, which keeps them aligned
constexpr int64_t kComputeBytes = 4;        // a byte takes as long as so many that are only moved

template <class G>
struct ValueAndSlope {
    G value, slope;
};

template <int kind, class V, int count>
TRILITH_INLINE ValueAndSlope<Group<V, count>> evaluate(const Group<V, count>& x) {
    using A = Element<V>;
    using G = Group<V, count>;
    if constexpr (kind == kGelu) {
        const Normal<G> at = normal(x);
        return {x * at.cumulative, fma(x, at.density, at.cumulative)};
    } else {
        // SiLU is x sigmoid(x); the tanh form x sigmoid(a x + b x^3), because (1 + tanh(u)) / 2 = sigmoid(2u). Beyond `far`
        // the sigmoid is 0 or 1 beside x.
        constexpr bool is_tanh = kind == kGeluTanh, is_double = sizeof(A) == sizeof(double);
        constexpr A far = is_tanh ? A(is_double ? 20 : 10) : A(is_double ? 700 : 87);
        constexpr A a = A(1.5957691216057308), b = a * A(0.044715), f = kSigmoidFactor<A>;
        const G near = each(x, [=](V v) { return within(v, far); }), square = near * near;
        const G factor = each(square, [=](V v) { return is_tanh ? fma(v, fill(f * b), fill(f * a)) : fill(f); });
        const Sigmoid<G> s = sigmoid(near, factor);
        const G reached = each(s.value, x, [=](V v, V at) { return at < -far ? V{} : v; }), value = x * reached;
        const G inner = each(square, [=](V v) { return is_tanh ? fma(v, fill(3 * b), fill(a)) : fill(A(1)); });
        return {value, fma(value * s.rest, inner, reached)};
    }
}

// AVX-512 has 32 registers, the others 16.
constexpr int kInStep = kBytes == 64 ? 4 : 2;

// use(offset, lanes, value, slope) for each register of a row of n, whose argument is argument(offset, lanes).
template <int kind, class A, class F, class G>
TRILITH_INLINE void each_evaluated(int64_t n, F&& argument, G&& use) {
    constexpr int64_t lanes = kLanes<A>;
    int64_t i = 0;
    for (; i + kInStep * lanes <= n; i += kInStep * lanes) {
        Group<Vec<A>, kInStep> x;
        for (int k = 0; k < kInStep; ++k) x.part[k] = argument(i + k * lanes, lanes);
        const auto at = evaluate<kind>(x);
        for (int k = 0; k < kInStep; ++k) use(i + k * lanes, lanes, at.value.part[k], at.slope.part[k]);
    }
    each_register<A>(n - i, [&](int64_t offset, int64_t count) {
        Group<Vec<A>, 1> x;
        x.part[0] = argument(i + offset, count);
        const auto at = evaluate<kind>(x);
        use(i + offset, count, at.value.part[0], at.slope.part[0]);
    });
}

template <class T, int kind>
void forward(const T* x, const T* bias, T* y, int64_t rows, int64_t width, int threads) {
    using A = wide_t<T>;
    const int64_t total = rows * width;
    const int used = useful_threads(threads, kComputeBytes * total * static_cast<int64_t>(sizeof(T)));
    const bool streamed = is_streamed(y, total, bias ? width : total);
    if (!bias) {
        for_each_piece(total, used, kGrain, [&](int64_t begin, int64_t end) {
            with_store<T>(streamed, [&](auto&& put) {
                each_evaluated<kind, A>(
                    end - begin, [&](int64_t i, int64_t lanes) { return load_some(x + begin + i, lanes); },
                    [&](int64_t i, int64_t lanes, Vec<A> value, Vec<A>) { put(y + begin + i, value, lanes); });
            });
        });
        return;
    }
    for_each_piece(rows, used, 1, [&](int64_t begin, int64_t end) {
        with_store<T>(streamed, [&](auto&& put) {
            for (int64_t at = begin * width; at < end * width; at += width)
                each_evaluated<kind, A>(
                    width, [&](int64_t i, int64_t lanes) { return load_some(x + at + i, lanes) + load_some(bias + i, lanes); },
                    [&](int64_t i, int64_t lanes, Vec<A> value, Vec<A>) { put(y + at + i, value, lanes); });
        });
    });
}

template <class T, int kind>
void backward(const T* dy, const T* x, T* dx, int64_t total, int threads) {
    using A = wide_t<T>;
    const int used = useful_threads(threads, kComputeBytes * total * static_cast<int64_t>(sizeof(T)));
    const bool streamed = is_streamed(dx, total, total);
    for_each_piece(total, used, kGrain, [&](int64_t begin, int64_t end) {
        with_store<T>(streamed, [&](auto&& put) {
            each_evaluated<kind, A>(
                end - begin, [&](int64_t i, int64_t lanes) { return load_some(x + begin + i, lanes); },
                [&](int64_t i, int64_t lanes, Vec<A>, Vec<A> slope) {
                    put(dx + begin + i, load_some(dy + begin + i, lanes) * slope, lanes);
                });
        });
    });
}

template <class T, int kind>
void bias_backward(const T* dy, const T* x, const T* bias, T* dx, T* dbias, int64_t rows, int64_t width, int threads) {
    using A = wide_t<T>;
    const int used = useful_threads(threads, kComputeBytes * rows * width * static_cast<int64_t>(sizeof(T)));
    const bool streamed = is_streamed(dx, rows * width, width);
    const int64_t parts = row_parts(rows);
    std::unique_ptr<A, void (*)(void*)> partial((A*)std::calloc(parts * width, sizeof(A)), std::free);
    for_each_part(parts, used, [&](int64_t part) {
        A* sums = partial.get() + part * width;
        const Range range = part_of(rows, parts, part);
        with_store<T>(streamed, [&](auto&& put) {
            for (int64_t at = range.begin * width; at < range.end * width; at += width)
                each_evaluated<kind, A>(
                    width, [&](int64_t i, int64_t lanes) { return load_some(x + at + i, lanes) + load_some(bias + i, lanes); },
                    [&](int64_t i, int64_t lanes, Vec<A>, Vec<A> slope) {
                        const Vec<A> gradient = load_some(dy + at + i, lanes) * slope;
                        put(dx + at + i, gradient, lanes);
                        store_some(sums + i, load_some(sums + i, lanes) + gradient, lanes);
                    });
        });
    });
    each_register<A>(width, [&](int64_t i, int64_t lanes) {
        Vec<A> total{};
        for (int64_t part = 0; part < parts; ++part) total += load_some(partial.get() + part * width + i, lanes);
        store_some(dbias + i, total, lanes);
    });
}

}  // namespace

void activation_forward(int dtype, int kind, Address x, Address bias, Address y, int64_t rows, int64_t width,
                        int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        with_kind(kind, [&](auto k) {
            forward<T, decltype(k)::value>((const T*)x, (const T*)bias, (T*)y, rows, width, threads);
        });
    });
}

void activation_backward(int dtype, int kind, Address dy, Address x, Address bias, Address dx, Address dbias,
                         int64_t rows, int64_t width, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        with_kind(kind, [&](auto k) {
            constexpr int which = decltype(k)::value;
            if (bias)
                bias_backward<T, which>((const T*)dy, (const T*)x, (const T*)bias, (T*)dx, (T*)dbias, rows, width, threads);
            else
                backward<T, which>((const T*)dy, (const T*)x, (T*)dx, rows * width, threads);
        });
    });
}

void glu_forward(int dtype, int kind, Address gate, Address up, Address y, int64_t rows, int64_t width,
                 int64_t gate_stride, int64_t up_stride, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(T));
        const bool streamed = is_streamed((const T*)y, rows * width, width);
        with_kind(kind, [&](auto k) {
            for_each_piece(rows, useful_threads(threads, kComputeBytes * bytes), 1, [&](int64_t begin, int64_t end) {
                with_store<T>(streamed, [&](auto&& put) {
                    for (int64_t row = begin; row < end; ++row) {
                        const T *g = (const T*)gate + row * gate_stride, *u = (const T*)up + row * up_stride;
                        T* to = (T*)y + row * width;
                        each_evaluated<decltype(k)::value, A>(
                            width, [&](int64_t i, int64_t lanes) { return load_some(g + i, lanes); },
                            [&](int64_t i, int64_t lanes, Vec<A> value, Vec<A>) {
                                put(to + i, value * load_some(u + i, lanes), lanes);
                            });
                    }
                });
            });
        });
    });
}

void glu_backward(int dtype, int kind, Address dy, Address gate, Address up, Address dgate, Address dup, int64_t rows,
                  int64_t width, int64_t gate_stride, int64_t up_stride, int64_t gradient_stride, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(T));
        const bool streamed = is_streamed((const T*)dgate, 2 * rows * width, gradient_stride) &&
                              streams((const T*)dup, gradient_stride) && streams((const T*)dup, width);
        with_kind(kind, [&](auto k) {
            for_each_piece(rows, useful_threads(threads, kComputeBytes * bytes), 1, [&](int64_t begin, int64_t end) {
                with_store<T>(streamed, [&](auto&& put) {
                    for (int64_t row = begin; row < end; ++row) {
                        const T *g = (const T*)gate + row * gate_stride, *u = (const T*)up + row * up_stride;
                        const T* d = (const T*)dy + row * width;
                        T *dg = (T*)dgate + row * gradient_stride, *du = (T*)dup + row * gradient_stride;
                        each_evaluated<decltype(k)::value, A>(
                            width, [&](int64_t i, int64_t lanes) { return load_some(g + i, lanes); },
                            [&](int64_t i, int64_t lanes, Vec<A> value, Vec<A> slope) {
                                const Vec<A> given = load_some(d + i, lanes);
                                put(dg + i, given * load_some(u + i, lanes) * slope, lanes);
                                put(du + i, given * value, lanes);
                            });
                    }
                });
            });
        });
    });
}

}  // namespace trilith::TRILITH_ISA
