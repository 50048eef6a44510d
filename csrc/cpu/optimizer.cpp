// Optimizer updates over flat shards, each in one pass, and the sum of squares of a gradient.
//
// A chunk of every array passes through registers once: the gradient times its factor (loss scale and clipping in one), the
// moments, the weight; while the chunk is in the first cache, the weight's copy in fewer bits is written and the gradient cleared.
// AdamW moves 28 bytes a parameter in fp32 (reads 4 arrays, writes 3), 2 more for a 16-bit copy, 4 more to clear the gradient.
// Each number is computed for itself, in the same order of operations wherever it lies and without fused ones, so that results do
// not depend on how a shard is cut, nor on threads or instruction set. Adam: Kingma and Ba 2015; AdamW: Loshchilov and Hutter
// 2019; Lion: Chen et al. 2023.
#include <vector>

#include "common/parallel.h"
#include "common/vec.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

namespace {

constexpr int64_t kChunk = 4096, kSquaresChunk = 1 << 16;

// Adds the squares of a register to two registers of doubles.
inline void add_squares(vd* sums, vd x) { sums[0] = fma(x, x, sums[0]); }
inline void add_squares(vd* sums, vf x) {
    typename VecOf<float, kBytes / 2>::type low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    const vd a = __builtin_convertvector(low, vd), b = __builtin_convertvector(high, vd);
    sums[0] = fma(a, a, sums[0]);
    sums[1] = fma(b, b, sums[1]);
}

// The chunks of a list of arrays, dealt as one sequence.
struct Chunks {
    std::vector<int64_t> first;  // of each array, and behind the last
    Chunks(const int64_t* sizes, int64_t count, int64_t chunk) : first(static_cast<size_t>(count) + 1) {
        for (int64_t i = 0; i < count; ++i)
            first[static_cast<size_t>(i) + 1] = first[static_cast<size_t>(i)] + (sizes[i] + chunk - 1) / chunk;
    }
    int64_t total() const { return first.back(); }
    // Calls f(array, begin, end) for the chunks [from, to).
    template <class F>
    void each(const int64_t* sizes, int64_t chunk, int64_t from, int64_t to, F&& f) const {
        size_t array = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), from) - first.begin()) - 1;
        for (int64_t at = from; at < to; ++at) {
            while (at >= first[array + 1]) ++array;
            const int64_t begin = (at - first[array]) * chunk;
            f(array, begin, std::min(begin + chunk, sizes[array]));
        }
    }
};

template <class A>
struct Constants {
    A lr, factor, decay, beta1, beta2, eps, step_size, root_correction, dampening;
    bool decoupled, nesterov, is_first;
    explicit Constants(const OptimizerStep& step)
        : lr(static_cast<A>(step.values[0])),
          factor(static_cast<A>(step.values[1])),
          decay(static_cast<A>(step.decay)),
          beta1(static_cast<A>(step.beta1)),
          beta2(static_cast<A>(step.beta2)),
          eps(static_cast<A>(step.eps)),
          step_size(static_cast<A>(step.values[0] / step.values[2])),
          root_correction(static_cast<A>(step.values[3])),
          dampening(static_cast<A>(step.dampening)),
          decoupled(step.decoupled),
          nesterov(step.nesterov),
          is_first(step.values[4] != 0.0) {}
};

template <class A>
inline void adam(const Constants<A>& c, Vec<A>& weight, Vec<A> slope, Vec<A>& average, Vec<A>& square) {
    if (c.decoupled)
        weight = weight * (1 - c.lr * c.decay);
    else if (c.decay != 0)
        slope = slope + weight * c.decay;
    average = average + (slope - average) * (1 - c.beta1);
    square = square * c.beta2 + slope * slope * (1 - c.beta2);
    weight = weight - average * c.step_size / (sqrt(square) / c.root_correction + c.eps);
}

template <class A>
inline void lion(const Constants<A>& c, Vec<A>& weight, Vec<A> slope, Vec<A>& average) {
    const Vec<A> direction = average + (slope - average) * (1 - c.beta1);
    const Vec<A> sign = direction > 0 ? fill(A(1)) : direction < 0 ? fill(A(-1)) : direction;  // 0 and NaN stay
    weight = weight * (1 - c.lr * c.decay) - sign * c.lr;
    average = average + (slope - average) * (1 - c.beta2);
}

template <class A>
inline void sgd(const Constants<A>& c, Vec<A>& weight, Vec<A> slope, Vec<A>* momentum) {
    if (c.decay != 0) slope = slope + weight * c.decay;
    if (momentum) {
        *momentum = c.is_first ? slope : *momentum * c.beta1 + slope * (1 - c.dampening);
        slope = c.nesterov ? slope + *momentum * c.beta1 : *momentum;
    }
    weight = weight - slope * c.lr;
}

// A: weights; G: gradients; M: moments.
template <class A, class G, class M>
void update(const OptimizerStep& step, const Address* const arrays[5], const int64_t* sizes, int64_t from, int64_t to,
            const Chunks& chunks) {
    const Constants<A> c(step);
    const bool has_second = step.kind == OptimizerKind::adam;
    const bool has_first = has_second || step.kind == OptimizerKind::lion || step.beta1 != 0.0;
    chunks.each(sizes, kChunk, from, to, [&](size_t array, int64_t begin, int64_t end) {
        A* weights = (A*)arrays[0][array];
        G* slopes = (G*)arrays[1][array];
        M* averages = has_first ? (M*)arrays[2][array] : nullptr;
        M* squares = has_second ? (M*)arrays[3][array] : nullptr;
        auto each = [&](auto&& one) {
            each_register<A>(end - begin, [&](int64_t i, int64_t lanes) {
                const int64_t at = begin + i;
                Vec<A> weight = load_some(weights + at, lanes), average{}, square{};
                Vec<A> slope = load_some(slopes + at, lanes);
                if (step.values[1] != 1.0) slope = slope * c.factor;
                if (averages) average = load_some(averages + at, lanes);
                if (squares) square = load_some(squares + at, lanes);
                one(weight, slope, average, square);
                store_some(weights + at, weight, lanes);
                if (averages) store_some(averages + at, average, lanes);
                if (squares) store_some(squares + at, square, lanes);
            });
        };
        switch (step.kind) {
            case OptimizerKind::adam:
                each([&](Vec<A>& w, Vec<A> g, Vec<A>& a, Vec<A>& s) { adam(c, w, g, a, s); });
                break;
            case OptimizerKind::lion: each([&](Vec<A>& w, Vec<A> g, Vec<A>& a, Vec<A>&) { lion(c, w, g, a); }); break;
            case OptimizerKind::sgd:
                each([&](Vec<A>& w, Vec<A> g, Vec<A>& a, Vec<A>&) { sgd(c, w, g, averages ? &a : nullptr); });
                break;
        }
        if (arrays[4])
            with_dtype(static_cast<DType>(step.copy_dtype), [&](auto tag) {
                using T = typename decltype(tag)::type;
                if constexpr (std::is_same_v<wide_t<T>, A>) {
                    T* copies = (T*)arrays[4][array];
                    each_register<A>(end - begin, [&](int64_t i, int64_t lanes) {
                        store_some(copies + begin + i, load_some(weights + begin + i, lanes), lanes);
                    });
                }
            });
        if (step.clears_gradient) std::memset((void*)(slopes + begin), 0, static_cast<size_t>(end - begin) * sizeof(G));
    });
}

template <class A, class F>
void with_gradients(int dtype, F&& f) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using G = typename decltype(tag)::type;
        if constexpr (std::is_same_v<wide_t<G>, A>) f(tag);
    });
}

}  // namespace

void optimizer_step(const OptimizerStep& step, Address weights, Address gradients, Address first_moments, Address second_moments,
                    Address copies, Address sizes, int64_t count, int threads) {
    const Address* arrays[5] = {(const Address*)weights, (const Address*)gradients, (const Address*)first_moments,
                                (const Address*)second_moments, (const Address*)copies};
    const int64_t* lengths = (const int64_t*)sizes;
    const Chunks chunks(lengths, count, kChunk);
    auto run = [&](auto weight_tag, auto gradient_tag, auto moment_tag) {
        using A = typename decltype(weight_tag)::type;
        using G = typename decltype(gradient_tag)::type;
        using M = typename decltype(moment_tag)::type;
        for_each_piece(chunks.total(), useful_threads(threads, chunks.total() * kChunk * 16), 1, [&](int64_t from, int64_t to) {
            update<A, G, M>(step, arrays, lengths, from, to, chunks);
        });
    };
    if (static_cast<DType>(step.weight_dtype) == DType::f64)
        run(Tag<double>(), Tag<double>(), Tag<double>());
    else
        with_gradients<float>(step.gradient_dtype, [&](auto gradient_tag) {
            if (static_cast<DType>(step.moment_dtype) == DType::bf16)
                run(Tag<float>(), gradient_tag, Tag<bf16>());
            else
                run(Tag<float>(), gradient_tag, Tag<float>());
        });
}

double sum_of_squares(int dtype, Address arrays, Address sizes, int64_t count, int threads) {
    const int64_t* lengths = (const int64_t*)sizes;
    const Chunks chunks(lengths, count, kSquaresChunk);
    std::vector<double> parts(static_cast<size_t>(chunks.total()));
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        for_each_piece(chunks.total(), useful_threads(threads, chunks.total() * kSquaresChunk * 4), 1, [&](int64_t from, int64_t to) {
            int64_t part = from;
            chunks.each(lengths, kSquaresChunk, from, to, [&](size_t array, int64_t begin, int64_t end) {
                const T* x = (const T*)((const Address*)arrays)[array];
                vd sums[4] = {};
                int64_t i = begin;
                constexpr int64_t step = kLanes<wide_t<T>>;
                for (; i + 2 * step <= end; i += 2 * step)
                    for (int k = 0; k < 2; ++k) add_squares(sums + 2 * k, load(x + i + k * step));
                for (; i + step <= end; i += step) add_squares(sums, load(x + i));
                if (i < end) add_squares(sums, load_part(x + i, end - i));
                parts[static_cast<size_t>(part++)] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
            });
        });
    });
    double total = 0;
    for (double part : parts) total += part;
    return total;
}

}  // namespace trilith::TRILITH_ISA
