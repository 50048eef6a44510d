// Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019), Lion (Chen et al. 2023) and SGD with momentum in torch's form,
// one launch over all slices of flat buffers; the sum of squares that gradients are clipped by, and the clip factor, which never
// leave the device.
//
// Bytes an element of AdamW in fp32: 16 read and 12 written, 2 more for a copy in 16 bits, 4 for the norm before. Gradients are
// divided by the loss scale and clipped as they are read, the module's weights rounded and the gradients zeroed as the rest is
// written. Blocks take chunks of all slices in turn. What changes from step to step is read from memory, so a captured graph
// stays right. Nothing is contracted here (csrc/build.py): the bits of weights and states are those of csrc/cpu/optimizer.cpp.
#include <algorithm>

#include "common/slices.h"
#include "cuda/device.h"
#include "cuda/ops.h"
#include "cuda/plan.h"

namespace trilith::cuda {

namespace {

__device__ __forceinline__ double scale_of(const Step& now) { return now.clip_factor / now.loss_scale; }

constexpr int kThreads = 256, kLanes4 = 4;
constexpr int64_t kChunk = 16384;

// average + (1 - beta) (value - average), from the end that is nearer.
struct Average {
    float part, rest;
    bool is_short;
    __device__ explicit Average(double beta) : part(float(1 - beta)), rest(float(beta)), is_short(beta > 0.5) {}
    __device__ __forceinline__ float operator()(float average, float value) const {
        const float distance = value - average;
        return is_short ? average + distance * part : value - distance * rest;
    }
};

// What a rule is made of, beside what a step and a group say.
struct AdamGiven {
    double beta1, beta2, eps, weight_decay;
    bool is_decoupled;
};
struct AdamRule {
    using Given = AdamGiven;
    static constexpr int num_states = 2;
    Average mean, square;
    float scale, l2, decay, size, eps;
    bool has_l2, has_decay;

    __device__ AdamRule(const Given& given, const Step& now, const Multipliers& group) : mean(given.beta1), square(given.beta2) {
        // m / c1 / (sqrt(v / c2) + eps), with the corrections taken out of the loop
        const double root = sqrt(now.correction2), lr = now.lr * group.lr, reduction = given.weight_decay * group.decay;
        scale = float(scale_of(now));
        l2 = float(reduction), decay = float(lr * reduction);
        size = float(lr * root / now.correction1), eps = float(given.eps * root);
        has_l2 = !given.is_decoupled && reduction != 0, has_decay = given.is_decoupled && reduction != 0;
    }
    __device__ __forceinline__ void operator()(float& p, float g, float& m, float& v) const {
        g *= scale;
        if (has_l2) g += p * l2;
        m = mean(m, g);
        const float gg = g * g;
        v = v < INFINITY ? square(v, gg) : v + gg;  // infinity stays, where a distance is NaN
        float change = m * size / (sqrtf(v) + eps);
        if (has_decay) change += p * decay;
        p -= change;
    }
};

struct LionGiven {
    double beta1, beta2, weight_decay;
};
struct LionRule {
    using Given = LionGiven;
    static constexpr int num_states = 1;
    Average direction, mean;
    float scale, decay, size;

    __device__ LionRule(const Given& given, const Step& now, const Multipliers& group)
        : direction(given.beta1), mean(given.beta2) {
        const double lr = now.lr * group.lr;
        scale = float(scale_of(now)), decay = float(lr * given.weight_decay * group.decay), size = float(lr);
    }
    __device__ __forceinline__ void operator()(float& p, float g, float& m, float&) const {
        g *= scale;
        const float toward = direction(m, g);
        const float change = toward > 0 ? size : toward < 0 ? -size : 0.0f;
        m = mean(m, g);
        p -= p * decay + change;
    }
};

struct SgdGiven {
    double momentum, dampening, weight_decay;
    bool is_nesterov;
};
template <bool has_momentum>
struct SgdRule {
    using Given = SgdGiven;
    static constexpr int num_states = has_momentum ? 1 : 0;
    float scale, l2, lr, momentum, fresh;
    bool has_l2, is_nesterov, is_first;

    __device__ SgdRule(const Given& given, const Step& now, const Multipliers& group) {
        const double reduction = given.weight_decay * group.decay;
        scale = float(scale_of(now)), l2 = float(reduction), lr = float(now.lr * group.lr);
        momentum = float(given.momentum), fresh = float(1 - given.dampening);
        has_l2 = reduction != 0, is_nesterov = given.is_nesterov, is_first = now.is_first != 0;
    }
    __device__ __forceinline__ void operator()(float& p, float g, float& m, float&) const {
        g *= scale;
        if (has_l2) g += p * l2;
        if constexpr (has_momentum) {
            m = is_first ? g : m * momentum + g * fresh;
            g = is_nesterov ? g + m * momentum : m;
        }
        p -= g * lr;
    }
};

// A state is stored as it is, but in bf16: there it is rounded up with the probability of what is cut off, by a hash of weights
// and gradients (csrc/cpu/optimizer.cpp).
__device__ __forceinline__ float stored(float v, float, float, uint32_t, float) { return v; }
__device__ __forceinline__ __nv_bfloat16 stored(float v, float weight, float gradient, uint32_t salt, __nv_bfloat16) {
    uint32_t hash = (__float_as_uint(weight) ^ salt) * 0x85EBCA6Bu;
    hash = (hash ^ (hash >> 15) ^ __float_as_uint(gradient)) * 0xC2B2AE35u;
    hash = (hash ^ (hash >> 13)) * 0x27D4EB2Fu;
    const uint32_t bits = __float_as_uint(v), dithered = (bits + (hash >> 16)) & 0xFFFF0000u;
    const bool is_finite = (bits & 0x7F800000u) != 0x7F800000u;
    return __float2bfloat16_rn(is_finite ? __uint_as_float(dithered) : v);
}

constexpr uint32_t kFirstSalt = 0x9E3779B9u, kSecondSalt = 0x7F4A7C15u;

template <class W, int lanes>
__device__ __forceinline__ void copy_weights(const Pack<float, lanes>& p, Address weight, int64_t i) {
    Pack<W, lanes> copy;
#pragma unroll
    for (int k = 0; k < lanes; ++k) copy.at[k] = narrow<W>(p.at[k]);
    *reinterpret_cast<Pack<W, lanes>*>((W*)weight + i) = copy;
}

// What a launch does beside its rule. `weight`: the code of the format of the module's weights, -1 where they get no copy.
struct Also {
    int weight;
    bool zeroes;
};

// `lanes` neighbours from `i` on.
template <class G, class M, int lanes, class Rule>
__device__ __forceinline__ void update(const Slice& slice, const Rule& rule, int64_t i, const Also& also) {
    using P4 = Pack<float, lanes>;
    float* const parameters = (float*)slice.parameter + i;
    G* const gradients = (G*)slice.gradient + i;
    M* const first = (M*)slice.states[0] + i;
    M* const second = (M*)slice.states[1] + i;
    P4 p = *reinterpret_cast<const P4*>(parameters);
    Pack<G, lanes> g = *reinterpret_cast<const Pack<G, lanes>*>(gradients);
    Pack<M, lanes> m{}, v{};
    if constexpr (Rule::num_states > 0) m = *reinterpret_cast<const Pack<M, lanes>*>(first);
    if constexpr (Rule::num_states > 1) v = *reinterpret_cast<const Pack<M, lanes>*>(second);
#pragma unroll
    for (int k = 0; k < lanes; ++k) {
        const float gradient = widen(g.at[k]);
        float mean = widen(m.at[k]), square = widen(v.at[k]);
        rule(p.at[k], gradient, mean, square);
        if constexpr (Rule::num_states > 0) m.at[k] = stored(mean, p.at[k], gradient, kFirstSalt, M());
        if constexpr (Rule::num_states > 1) v.at[k] = stored(square, p.at[k], gradient, kSecondSalt, M());
    }
    *reinterpret_cast<P4*>(parameters) = p;
    if constexpr (Rule::num_states > 0) *reinterpret_cast<Pack<M, lanes>*>(first) = m;
    if constexpr (Rule::num_states > 1) *reinterpret_cast<Pack<M, lanes>*>(second) = v;
    if (also.weight == static_cast<int>(DType::bf16)) copy_weights<__nv_bfloat16>(p, slice.weight, i);
    if (also.weight == static_cast<int>(DType::f16)) copy_weights<__half>(p, slice.weight, i);
    if (also.weight == static_cast<int>(DType::f32)) copy_weights<float>(p, slice.weight, i);
    if (also.zeroes) *reinterpret_cast<Pack<G, lanes>*>(gradients) = Pack<G, lanes>{};
}

// Whether four neighbours from element `skipped` on are aligned in every buffer of a slice.
template <class G, class M, int num_states>
__device__ __forceinline__ bool fits(const Slice& slice, int64_t skipped, int weight) {
    auto is_fit = [&](Address base, int64_t size) { return (base + skipped * size) % (kLanes4 * size) == 0; };
    bool fit = is_fit(slice.parameter, 4) && is_fit(slice.gradient, sizeof(G));
    for (int state = 0; state < num_states; ++state) fit = fit && is_fit(slice.states[state], sizeof(M));
    if (weight >= 0) fit = fit && is_fit(slice.weight, weight == static_cast<int>(DType::f32) ? 4 : 2);
    return fit;
}

template <class G, class M, class Rule>
__global__ void __launch_bounds__(kThreads, 2) update_slices(const Slice* slices, const Multipliers* multipliers, int count,
                                                          const Step* step, const typename Rule::Given given, const Also also) {
    const Step now = *step;
    int64_t before = 0, chunk = blockIdx.x;  // chunks of the slices before this one, and the block's next
    for (int s = 0; s < count; ++s) {
        const Slice slice = slices[s];
        const int64_t chunks = ceil_div(slice.numel, kChunk);
        if (chunk < before + chunks) {
            const Rule rule(given, now, multipliers[s]);
            // The slices of flat buffers begin anywhere, but alike in all of them: packs begin where those of the weights do.
            const int64_t past = static_cast<int64_t>(slice.parameter / sizeof(float) % kLanes4);
            const int64_t skipped = past ? kLanes4 - past : 0;
            const bool packed = fits<G, M, Rule::num_states>(slice, skipped, also.weight);
            for (; chunk < before + chunks; chunk += gridDim.x) {
                const int64_t from = (chunk - before) * kChunk, end = from + kChunk < slice.numel ? from + kChunk : slice.numel;
                if (!packed) {
                    for (int64_t i = from + threadIdx.x; i < end; i += kThreads) update<G, M, 1>(slice, rule, i, also);
                    continue;
                }
                const int64_t begin = from + skipped < end ? from + skipped : end, packs = (end - begin) / kLanes4;
                if (from + threadIdx.x < begin) update<G, M, 1>(slice, rule, from + threadIdx.x, also);
#pragma unroll 2
                for (int64_t k = threadIdx.x; k < packs; k += kThreads)
                    update<G, M, kLanes4>(slice, rule, begin + k * kLanes4, also);
                const int64_t rest = begin + packs * kLanes4 + threadIdx.x;
                if (rest < end) update<G, M, 1>(slice, rule, rest, also);
            }
        }
        before += chunks;
    }
}

// Calls f with tags of the formats of gradients and states.
template <class F>
void with_dtypes(int gradient, int state, F&& f) {
    with_device_dtype(gradient, [&](auto g) {
        static_cast<DType>(state) == DType::bf16 ? f(g, Tag<__nv_bfloat16>()) : f(g, Tag<float>());
    });
}

struct Call {
    int dtype, gradient_dtype, state_dtype, weight_dtype;
    Address slices, multipliers;
    int64_t count, numel;
    Address step;
    bool zeroes;
    Address stream;
};

template <class Rule>
void launch(const Call& call, const typename Rule::Given& given, const char* what) {
    if (call.numel == 0) return;
    if (static_cast<DType>(call.dtype) != DType::f32) throw std::invalid_argument("an optimizer on CUDA has weights in fp32");
    const auto blocks = static_cast<unsigned>(
        std::min<int64_t>(ceil_div(call.numel, kChunk) + call.count, int64_t(4) * multiprocessors()));
    const Also also{call.weight_dtype, call.zeroes};
    with_dtypes(call.gradient_dtype, call.state_dtype, [&](auto g, auto m) {
        update_slices<typename decltype(g)::type, typename decltype(m)::type, Rule>
            <<<blocks, kThreads, 0, (cudaStream_t)call.stream>>>((const Slice*)call.slices, (const Multipliers*)call.multipliers,
                                                                 static_cast<int>(call.count), (const Step*)call.step, given,
                                                                 also);
    });
    check_launch(what);
}

// --- sum of squares -------------------------------------------------------------------------------------------------------

constexpr int kSquareThreads = 256;

// The block's sum of fp64 numbers, in one order.
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double warps[32];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; ++i) total += warps[i];
    return total;
}

template <class T, int lanes>
__device__ __forceinline__ void add_squares(const T* from, double& total) {
    const Pack<T, lanes> pack = *reinterpret_cast<const Pack<T, lanes>*>(from);
#pragma unroll
    for (int i = 0; i < lanes; ++i) {
        const double x = widen(pack.at[i]);
        total += x * x;  // exact: 24 bits times 24 bits
    }
}

// One partial sum for each block. Squares are exact in fp64, and added there.
template <class T>
__global__ void __launch_bounds__(kSquareThreads) squares_of_runs(const Run* runs, int count, double* partial) {
    double total = 0;
    int64_t before = 0, chunk = blockIdx.x;
    for (int r = 0; r < count; ++r) {
        const Run run = runs[r];
        const T* const base = (const T*)run.address;
        const int64_t chunks = ceil_div(run.numel, kChunk);
        const int64_t past = static_cast<int64_t>(run.address % kPackBytes / sizeof(T));
        const int64_t skipped = past ? kLanes<T> - past : 0;
        for (; chunk < before + chunks; chunk += gridDim.x) {
            const int64_t from = (chunk - before) * kChunk, end = from + kChunk < run.numel ? from + kChunk : run.numel;
            const int64_t begin = from + skipped < end ? from + skipped : end, packs = (end - begin) / kLanes<T>;
            if (from + threadIdx.x < begin) add_squares<T, 1>(base + from + threadIdx.x, total);
#pragma unroll 4
            for (int64_t k = threadIdx.x; k < packs; k += kSquareThreads)
                add_squares<T, kLanes<T>>(base + begin + k * kLanes<T>, total);
            const int64_t rest = begin + packs * kLanes<T> + threadIdx.x;
            if (rest < end) add_squares<T, 1>(base + rest, total);
        }
        before += chunks;
    }
    const double sum = block_sum(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(1024) add_squares_of_blocks(const double* partial, int blocks, double* total) {
    double mine = 0;
    for (int i = threadIdx.x; i < blocks; i += 1024) mine += partial[i];
    const double sum = block_sum(mine);
    if (threadIdx.x == 0) *total = sum;
}

inline int square_blocks() { return 8 * multiprocessors(); }

// step[1] = min(1, max_norm / (norm + 1e-6)), the norm without the loss scale: torch's clip_grad_norm_. A norm that is not finite
// makes the factor NaN or 0, as there.
__global__ void clip_step_kernel(const double* squares, double* step, double* norm, double max_norm) {
    const double found = sqrt(*squares) / step[2];
    if (norm) *norm = found;
    const double factor = max_norm / (found + 1e-6);
    if (max_norm > 0) step[1] = factor > 1.0 ? 1.0 : factor;
}

}  // namespace

void adam(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers, int64_t count,
          int64_t numel, Address step, double beta1, double beta2, double eps, double weight_decay, bool is_decoupled,
          bool zeroes_gradients, Address stream) {
    const Call call{dtype, gradient_dtype, state_dtype, weight_dtype, slices, multipliers, count, numel, step, zeroes_gradients,
                    stream};
    launch<AdamRule>(call, {beta1, beta2, eps, weight_decay, is_decoupled}, "adam");
}

void lion(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers, int64_t count,
          int64_t numel, Address step, double beta1, double beta2, double weight_decay, bool zeroes_gradients, Address stream) {
    const Call call{dtype, gradient_dtype, state_dtype, weight_dtype, slices, multipliers, count, numel, step, zeroes_gradients,
                    stream};
    launch<LionRule>(call, {beta1, beta2, weight_decay}, "lion");
}

void sgd(int dtype, int gradient_dtype, int state_dtype, int weight_dtype, Address slices, Address multipliers, int64_t count,
         int64_t numel, Address step, double momentum, double dampening, double weight_decay, bool is_nesterov,
         bool zeroes_gradients, Address stream) {
    const Call call{dtype, gradient_dtype, state_dtype, weight_dtype, slices, multipliers, count, numel, step, zeroes_gradients,
                    stream};
    const SgdGiven given{momentum, dampening, weight_decay, is_nesterov};
    momentum != 0 ? launch<SgdRule<true>>(call, given, "sgd") : launch<SgdRule<false>>(call, given, "sgd");
}

int64_t sum_of_squares_workspace() { return square_blocks() * static_cast<int64_t>(sizeof(double)); }

void sum_of_squares(int dtype, Address runs, int64_t count, Address total, Address workspace, Address stream) {
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        const int blocks = square_blocks();
        squares_of_runs<T><<<blocks, kSquareThreads, 0, on>>>((const Run*)runs, static_cast<int>(count), (double*)workspace);
        add_squares_of_blocks<<<1, 1024, 0, on>>>((const double*)workspace, blocks, (double*)total);
        check_launch("sum_of_squares");
    });
}

void clip_step(Address squares, Address step, Address norm, double max_norm, Address stream) {
    clip_step_kernel<<<1, 1, 0, (cudaStream_t)stream>>>((const double*)squares, (double*)step, (double*)norm, max_norm);
    check_launch("clip_step");
}

}  // namespace trilith::cuda
