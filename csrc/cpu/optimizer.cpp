// Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019), Lion (Chen et al. 2023) and SGD with momentum in
// torch's form, over slices of flat buffers; and the sum of squares that gradients are clipped by.
//
// An optimizer is bound by memory: AdamW in fp32 must read weight, gradient and two moments and write three of them, 28
// bytes an element. So everything that touches the same elements happens in that one pass: gradients of any format are
// widened, divided by the loss scale and clipped on the way in, the module's own weights (2 bytes more in bf16) are
// rounded and the gradients zeroed on the way out. All slices are one row of elements, cut evenly over the threads. What
// changes from step to step is read from memory.
//
// Nothing is contracted here (setup.py): every lane, every tail and every instruction set rounds the same sums and
// products in the same order, so a result does not depend on how a shard is cut or on the processor. Averages are moved
// towards the new value by a part of the distance, which keeps the digits of 1 - beta that beta itself has lost; decay
// and step leave the weight in one subtraction.
#include <vector>

#include "common/parallel.h"
#include "common/slices.h"
#include "common/vec.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

namespace {

// --- memory in one format, numbers in another ---------------------------------------------------------------------------

template <class A, class T>
inline Vec<A> load_as(const T* p, int64_t count) {
    if constexpr (std::is_same_v<wide_t<T>, A>) {
        return load_some(p, count);
    } else {
        Vec<A> v{};
        for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<A>(load_one(p + lane));
        return v;
    }
}
template <class T, class V>
inline void store_as(T* p, V v, int64_t count) {
    using A = std::remove_reference_t<decltype(v[0])>;
    if constexpr (std::is_same_v<wide_t<T>, std::remove_const_t<A>>)
        store_some(p, v, count);
    else
        for (int64_t lane = 0; lane < count; ++lane) store_one(p + lane, static_cast<wide_t<T>>(v[lane]));
}

// A state is stored as it is, but in bf16: there a moment's change of a part in a thousand would always be rounded away,
// so it is rounded up with the probability of what is cut off. The random bits are a hash of `seeds`, weights and
// gradients of the step, so that they do not depend on where an element lies.
template <class T, class V>
inline void store_state(T* p, V v, V, V, uint32_t, int64_t count) {
    store_some(p, v, count);
}
inline void store_state(bf16* p, vf v, vf weight, vf gradient, uint32_t salt, int64_t count) {
    vu hash = ((vu)weight ^ salt) * 0x85EBCA6Bu;
    hash = (hash ^ (hash >> 15) ^ (vu)gradient) * 0xC2B2AE35u;
    hash = (hash ^ (hash >> 13)) * 0x27D4EB2Fu;
    vu bits = (vu)v, dithered = (bits + (hash >> 16)) & 0xFFFF0000u;
    const vu exponent = bits & 0x7F800000u;
    store_some(p, exponent == 0x7F800000u ? v : (vf)dithered, count);
}

// --- one pass over all slices -------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 1024, kLineBytes = 64;

// What all optimizers are called with.
struct Update {
    const Slice* slices;
    const Multipliers* multipliers;
    int64_t count;
    DType weight_dtype;
    bool zeroes_gradients;
    int threads;
};

// Writes the new values of `n` elements, which the cache still has, to the module's own weights.
template <class P, class W>
void copy_weights(const P* from, W* to, int64_t n) {
    if constexpr (std::is_same_v<wide_t<W>, P>) {
        if (streams(to, n)) {
            for (int64_t i = 0; i < n; i += kLanes<P>) stream(to + i, load(from + i));
            return;
        }
    }
    each_register<P>(n, [&](int64_t i, int64_t count) { store_as(to + i, load_some(from + i, count), count); });
}

// One register of elements from `i` on, or its first `count`. The rule changes weight and states in place.
template <class P, class G, class M, class Rule>
[[gnu::always_inline]] inline void update_register(const Slice& slice, const Rule& rule, int64_t i, int64_t count) {
    P* const parameter = (P*)slice.parameter + i;
    M* const first = (M*)slice.states[0] + i;
    M* const second = (M*)slice.states[1] + i;
    Vec<P> p = load_some(parameter, count), m{}, v{};
    const Vec<P> g = load_as<P>((const G*)slice.gradient + i, count);
    if constexpr (Rule::num_states > 0) m = load_some(first, count);
    if constexpr (Rule::num_states > 1) v = load_some(second, count);
    rule(p, g, m, v);
    store_some(parameter, p, count);
    if constexpr (Rule::num_states > 0) store_state(first, m, p, g, 0x9E3779B9u, count);
    if constexpr (Rule::num_states > 1) store_state(second, v, p, g, 0x7F4A7C15u, count);
}

template <class P, class G, class M, class Rule>
[[gnu::noinline]] void update_some(const Slice& slice, const Rule& rule, int64_t i, int64_t count) {
    update_register<P, G, M>(slice, rule, i, count);
}

template <class P, class G, class M, class Rule>
[[gnu::noinline]] void update_block(const Slice& given_slice, const Rule& given_rule, int64_t begin, int64_t end) {
    // Copies that nothing points to: no store can change them, so their members stay in registers.
    const Slice slice = given_slice;
    const Rule rule = given_rule;
    int64_t i = begin;
    for (; i + kLanes<P> <= end; i += kLanes<P>) update_register<P, G, M>(slice, rule, i, kLanes<P>);
    if (i < end) update_some<P, G, M>(given_slice, given_rule, i, end - i);
}

// Elements [begin, end) of one slice, by blocks that stay in the nearest cache.
template <class P, class G, class M, class Rule>
void update_slice(const Update& update, const Slice& slice, const Rule& rule, int64_t begin, int64_t end) {
    // The slices of a flat buffer begin anywhere, but alike in all of them: blocks begin where memory's lines do.
    const int64_t past = (int64_t)((slice.parameter + (uintptr_t)begin * sizeof(P)) % kLineBytes / sizeof(P));
    int64_t next = std::min<int64_t>(begin + kBlock - past, end);
    for (; begin < end; begin = next, next = std::min(begin + kBlock, end)) {
        update_block<P, G, M>(slice, rule, begin, next);
        if (slice.weight)
            with_dtype(update.weight_dtype, [&](auto tag) {
                using W = typename decltype(tag)::type;
                copy_weights((const P*)slice.parameter + begin, (W*)slice.weight + begin, next - begin);
            });
        if (update.zeroes_gradients)
            std::memset((G*)slice.gradient + begin, 0, static_cast<size_t>(next - begin) * sizeof(G));
    }
    if (slice.weight) stream_fence();
}

template <class P, class G, class M, class MakeRule>
void update_all(const Update& update, MakeRule&& make_rule) {
    int64_t total = 0;
    for (int64_t s = 0; s < update.count; ++s) total += update.slices[s].numel;
    const int threads = useful_threads(update.threads, total * (int64_t)(2 * sizeof(P) + sizeof(G) + 4 * sizeof(M)));
    for_each_piece(total, threads, 1024, [&](int64_t begin, int64_t end) {
        int64_t at = 0;
        for (int64_t s = 0; s < update.count && at < end; at += update.slices[s++].numel) {
            const Slice& slice = update.slices[s];
            const int64_t from = std::max<int64_t>(begin - at, 0), to = std::min(end - at, slice.numel);
            if (from < to) update_slice<P, G, M>(update, slice, make_rule(update.multipliers[s]), from, to);
        }
    });
}

// Calls f with tags of the types of weights, gradients and states; states are fp32, bf16, or fp64 beside fp64 weights.
template <class F>
void with_dtypes(int parameter, int gradient, int state, F&& f) {
    with_dtype(static_cast<DType>(gradient), [&](auto g) {
        if (static_cast<DType>(parameter) == DType::f64)
            f(Tag<double>(), g, Tag<double>());
        else if (static_cast<DType>(state) == DType::bf16)
            f(Tag<float>(), g, Tag<bf16>());
        else
            f(Tag<float>(), g, Tag<float>());
    });
}

// --- the rules ----------------------------------------------------------------------------------------------------------

inline double scale_of(const Step& now) { return now.clip_factor / now.loss_scale; }

// average + (1 - beta) (value - average), from the end that is nearer.
template <class A>
struct Average {
    A part, rest;
    bool is_short;
    explicit Average(double beta) : part(static_cast<A>(1 - beta)), rest(static_cast<A>(beta)), is_short(beta > 0.5) {}
    [[gnu::always_inline]] Vec<A> operator()(Vec<A> average, Vec<A> value) const {
        const Vec<A> distance = value - average;
        return is_short ? average + distance * part : value - distance * rest;
    }
};

template <class A>
struct AdamRule {
    static constexpr int num_states = 2;
    Average<A> mean, square;
    A scale, l2, decay, size, eps;
    bool has_l2, has_decay;

    [[gnu::always_inline]] void operator()(Vec<A>& p, Vec<A> g, Vec<A>& m, Vec<A>& v) const {
        g *= scale;
        if (has_l2) g += p * l2;
        m = mean(m, g);
        const Vec<A> gg = g * g;
        v = v < std::numeric_limits<A>::infinity() ? square(v, gg) : v + gg;  // infinity stays, where a distance is NaN
        Vec<A> change = m * size / (sqrt(v) + eps);
        if (has_decay) change += p * decay;
        p -= change;
    }
};

template <class A>
struct LionRule {
    static constexpr int num_states = 1;
    Average<A> direction, mean;
    A scale, decay, size;

    [[gnu::always_inline]] void operator()(Vec<A>& p, Vec<A> g, Vec<A>& m, Vec<A>&) const {
        g *= scale;
        const Vec<A> toward = direction(m, g), zero{};
        const Vec<A> change = toward > zero ? zero + size : toward < zero ? zero - size : zero;
        m = mean(m, g);
        p -= p * decay + change;
    }
};

template <class A, bool has_momentum>
struct SgdRule {
    static constexpr int num_states = has_momentum ? 1 : 0;
    A scale, l2, lr, momentum, fresh;
    bool has_l2, is_nesterov, is_first;

    [[gnu::always_inline]] void operator()(Vec<A>& p, Vec<A> g, Vec<A>& m, Vec<A>&) const {
        g *= scale;
        if (has_l2) g += p * l2;
        if constexpr (has_momentum) {
            m = is_first ? g : m * momentum + g * fresh;
            g = is_nesterov ? g + m * momentum : m;
        }
        p -= g * lr;
    }
};

// --- sum of squares -----------------------------------------------------------------------------------------------------

constexpr int64_t kSquaresPerPart = 1 << 16;
constexpr int kAccumulators = 64 / kLanes<double>;

// A register of fp64 from any format.
inline vd load_double(const double* p) { return load(p); }
template <class T>
inline vd load_double(const T* p) {
    typename VecOf<float, kBytes / 2>::type half;
    if constexpr (std::is_same_v<T, float>) {
        std::memcpy(&half, p, sizeof half);
    } else {
        T padded[kLanes<float>] = {};
        std::memcpy(padded, p, kLanes<double> * sizeof(T));
        const vf wide = load(padded);
        std::memcpy(&half, &wide, sizeof half);
    }
    return __builtin_convertvector(half, vd);
}

// Always 64 sums of every 64th element, added as one tree: the same bits for every instruction set. Squares of fp32 and
// of shorter numbers are exact in fp64.
template <class T>
double squares_of_part(const T* p, int64_t n) {
    Vec<double> sums[kAccumulators] = {};
    auto add = [&](const T* from) __attribute__((always_inline)) {
        for (int k = 0; k < kAccumulators; ++k) {
            const vd x = load_double(from + k * kLanes<double>);
            sums[k] += x * x;
        }
    };
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) add(p + i);
    if (i < n) {
        T rest[64] = {};
        std::memcpy(rest, p + i, static_cast<size_t>(n - i) * sizeof(T));
        add(rest);
    }
    for (int half = kAccumulators / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    return sum(sums[0]);
}

inline int64_t parts_of(const Run& run) { return (run.numel + kSquaresPerPart - 1) / kSquaresPerPart; }

}  // namespace

void adam(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers,
          int64_t count, Address step, double beta1, double beta2, double eps, double weight_decay, bool is_decoupled,
          bool zeroes_gradients, int threads) {
    const Update update{(const Slice*)slices, (const Multipliers*)multipliers,    count, static_cast<DType>(weight_dtype),
                        zeroes_gradients,     threads};
    const Step now = *(const Step*)step;
    with_dtypes(dtype, gradient_dtype, state_dtype, [&](auto p, auto g, auto m) {
        using A = typename decltype(p)::type;
        update_all<A, typename decltype(g)::type, typename decltype(m)::type>(update, [&](Multipliers group) {
            // m / c1 / (sqrt(v / c2) + eps), with the corrections taken out of the loop
            const double root = std::sqrt(now.correction2), lr = now.lr * group.lr, decay = weight_decay * group.decay;
            return AdamRule<A>{Average<A>(beta1),
                               Average<A>(beta2),
                               static_cast<A>(scale_of(now)),
                               static_cast<A>(decay),
                               static_cast<A>(lr * decay),
                               static_cast<A>(lr * root / now.correction1),
                               static_cast<A>(eps * root),
                               !is_decoupled && decay != 0,
                               is_decoupled && decay != 0};
        });
    });
}

void lion(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers,
          int64_t count, Address step, double beta1, double beta2, double weight_decay, bool zeroes_gradients,
          int threads) {
    const Update update{(const Slice*)slices, (const Multipliers*)multipliers,    count, static_cast<DType>(weight_dtype),
                        zeroes_gradients,     threads};
    const Step now = *(const Step*)step;
    with_dtypes(dtype, gradient_dtype, state_dtype, [&](auto p, auto g, auto m) {
        using A = typename decltype(p)::type;
        update_all<A, typename decltype(g)::type, typename decltype(m)::type>(update, [&](Multipliers group) {
            const double lr = now.lr * group.lr;
            return LionRule<A>{Average<A>(beta1), Average<A>(beta2), static_cast<A>(scale_of(now)),
                               static_cast<A>(lr * weight_decay * group.decay), static_cast<A>(lr)};
        });
    });
}

void sgd(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers,
         int64_t count, Address step, double momentum, double dampening, double weight_decay, bool is_nesterov,
         bool zeroes_gradients, int threads) {
    const Update update{(const Slice*)slices, (const Multipliers*)multipliers,    count, static_cast<DType>(weight_dtype),
                        zeroes_gradients,     threads};
    const Step now = *(const Step*)step;
    with_dtypes(dtype, gradient_dtype, state_dtype, [&](auto p, auto g, auto m) {
        using A = typename decltype(p)::type;
        using G = typename decltype(g)::type;
        using M = typename decltype(m)::type;
        auto run = [&](auto has_momentum) {
            update_all<A, G, M>(update, [&](Multipliers group) {
                const double decay = weight_decay * group.decay;
                return SgdRule<A, decltype(has_momentum)::value>{
                    static_cast<A>(scale_of(now)),  static_cast<A>(decay),         static_cast<A>(now.lr * group.lr),
                    static_cast<A>(momentum),     static_cast<A>(1 - dampening), decay != 0,
                    is_nesterov,                  now.is_first != 0};
            });
        };
        momentum != 0 ? run(std::true_type()) : run(std::false_type());
    });
}

void sum_of_squares(int dtype, Address runs, int64_t count, Address total, int threads) {
    const Run* const all = (const Run*)runs;
    int64_t num_parts = 0, numel = 0;
    for (int64_t r = 0; r < count; ++r) num_parts += parts_of(all[r]), numel += all[r].numel;
    std::vector<double> sums(static_cast<size_t>(num_parts));
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        for_each_piece(num_parts, useful_threads(threads, numel * (int64_t)sizeof(T)), 1, [&](int64_t begin, int64_t end) {
            int64_t at = 0;
            for (int64_t r = 0; r < count && at < end; at += parts_of(all[r++])) {
                const int64_t last = std::min(end - at, parts_of(all[r]));
                for (int64_t part = std::max<int64_t>(begin - at, 0); part < last; ++part) {
                    const int64_t first = part * kSquaresPerPart, size = std::min(all[r].numel - first, kSquaresPerPart);
                    sums[static_cast<size_t>(at + part)] = squares_of_part((const T*)all[r].address + first, size);
                }
            }
        });
    });
    double sum = 0;
    for (double part : sums) sum += part;
    *(double*)total = sum;
}

}  // namespace trilith::TRILITH_ISA
