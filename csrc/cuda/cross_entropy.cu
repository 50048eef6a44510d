// Cross-entropy of tokens over rows of logits, whole or a rank's part of the vocabulary.
//
// A block takes a row. Bytes, e to a logit: the terms read e, the gradient reads e and writes e, and both together
// (cross_entropy_fused) move 2 e of device memory: the row is read for its largest logit and sum at once (Milakov and Gimelshein
// 2018), kept by the second cache, and read from there for the gradient in its place. One block to a multiprocessor keeps the
// rows that are under way, 256 KB each at a vocabulary of 128 K in 16 bits, within that cache. An exponential costs a sixteenth
// of a multiprocessor's clock, so two a logit take less than its bytes do.
#include <algorithm>
#include <climits>

#include "cuda/ops.h"
#include "cuda/rows.h"

namespace trilith::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kAhead = 4;  // packs that a thread asks for together
constexpr float kLog2E = 1.4426950408889634f;

// Rows `stride` elements apart; `valid` columns are the labels [first_label, first_label + valid), those to `width` are padding.
template <class T>
struct Rows {
    T* base;
    int64_t stride;
    int valid, width;
    const int64_t* labels;
    int64_t first_label;

    __device__ T* row(int64_t token) const { return base + token * stride; }
    // The column of a token's label, or -1 where it is not here.
    __device__ int column(int64_t token) const {
        const int64_t column = labels[token] - first_label;
        return column >= 0 && column < valid ? static_cast<int>(column) : -1;
    }
};

// A largest number and the sum of exponentials relative to it.
struct Terms {
    float most, total;
};
__device__ __forceinline__ Terms joined(Terms a, Terms b) {
    const float most = fmaxf(a.most, b.most);
    if (most == -INFINITY) return {most, a.total + b.total};  // nothing yet; a NaN that was met stays one
    return {most, a.total * exp2f((a.most - most) * kLog2E) + b.total * exp2f((b.most - most) * kLog2E)};
}

// Over the block, in the order of lanes and warps.
__device__ __forceinline__ Terms block_terms(Terms mine) {
    __shared__ Terms warps[kThreads / kWarp];
    auto over_warp = [](Terms t) {
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2)
            t = joined(t, {__shfl_xor_sync(0xFFFFFFFFu, t.most, step), __shfl_xor_sync(0xFFFFFFFFu, t.total, step)});
        return t;
    };
    mine = over_warp(mine);
    __syncthreads();  // of the use before
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
    __syncthreads();
    return over_warp(warps[threadIdx.x % kWarp]);
}

// f(first column, number of them, logits as floats) over a row in packs, kAhead of them under way in each thread, then one by one.
// The order does not depend on where the row lies unless it is not made of packs (`packed` false).
template <bool packed, class T, class F>
__device__ __forceinline__ void each_pack(const T* x, int count, F&& f) {
    constexpr int lanes = packed ? kLanes<T> : 1;
    const int packs = count / lanes;
    int p = threadIdx.x;
    for (; p + (kAhead - 1) * kThreads < packs; p += kAhead * kThreads) {
        Pack<T, lanes> held[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) held[k] = reinterpret_cast<const Pack<T, lanes>*>(x)[p + k * kThreads];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) f((p + k * kThreads) * lanes, held[k]);
    }
    for (; p < packs; p += kThreads) f(p * lanes, reinterpret_cast<const Pack<T, lanes>*>(x)[p]);
    const int rest = packs * lanes + threadIdx.x;
    if (lanes > 1 && rest < count) f(rest, Pack<T, 1>{x[rest]});
}

template <class T, int n>
__device__ __forceinline__ float largest_of(const Pack<T, n>& pack) {
    float most = widen(pack.at[0]);
#pragma unroll
    for (int i = 1; i < n; ++i) most = fmaxf(most, widen(pack.at[i]));
    return most;
}
template <class T, int n>
__device__ __forceinline__ float sum_exp(const Pack<T, n>& pack, float most) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) total += exp2f((widen(pack.at[i]) - most) * kLog2E);
    return total;
}

template <bool packed, class T>
__device__ Terms row_terms(const T* x, int count) {
    Terms mine{-INFINITY, 0};
    each_pack<packed>(x, count, [&](int, const auto& pack) {
        const float most = fmaxf(mine.most, largest_of(pack));
        if (most == -INFINITY) {  // all so far are -infinity, or NaN, which must come through
            for (const T& value : pack.at) mine.total += widen(value) == most ? 0.0f : widen(value);
            return;
        }
        mine.total = mine.total * exp2f((mine.most - most) * kLog2E) + sum_exp(pack, most);
        mine.most = most;
    });
    return block_terms(mine);
}

// The gradient of a row, which may lie in the place of its logits.
template <bool packed, class T>
__device__ void gradient_row(const T* x, T* to, int valid, int width, int column, Terms terms, float scale, float softmax_scale) {
    const float factor = softmax_scale / terms.total;
    each_pack<packed>(x, valid, [&](int first, auto pack) {
        constexpr int n = sizeof(pack) / sizeof(T);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float p = exp2f((widen(pack.at[i]) - terms.most) * kLog2E) * factor;
            pack.at[i] = narrow<T>(first + i == column ? p - scale : p);
        }
        *reinterpret_cast<decltype(pack)*>(to + first) = pack;
    });
    for (int i = valid + threadIdx.x; i < width; i += kThreads) to[i] = narrow<T>(0.0f);
}

template <class T, bool packed>
__global__ void __launch_bounds__(kThreads, 1) largest_kernel(const Rows<const T> rows, float* most) {
    const T* x = rows.row(blockIdx.x);
    float mine = -INFINITY;
    each_pack<packed>(x, rows.valid, [&](int, const auto& pack) { mine = fmaxf(mine, largest_of(pack)); });
    const Terms found = block_terms({mine, 0});
    if (threadIdx.x == 0) most[blockIdx.x] = found.most;
}

template <class T, bool packed>
__global__ void __launch_bounds__(kThreads, 1)
    terms_kernel(const Rows<const T> rows, bool finds_largest, float* most, float* total, float* target, float* losses) {
    const int64_t token = blockIdx.x;
    const T* x = rows.row(token);
    Terms terms;
    if (finds_largest) {
        terms = row_terms<packed>(x, rows.valid);
    } else {
        const float given = most[token];
        float mine = 0;
        each_pack<packed>(x, rows.valid, [&](int, const auto& pack) { mine += sum_exp(pack, given); });
        __shared__ typename GroupSums<kThreads>::Shared shared;
        terms = {given, GroupSums<kThreads>(shared, 0)(mine)};
    }
    if (threadIdx.x == 0) {
        const int column = rows.column(token);
        const float at_label = column >= 0 ? widen(x[column]) - terms.most : 0.0f;
        if (finds_largest) most[token] = terms.most;
        total[token] = terms.total;
        target[token] = at_label;
        if (losses) losses[token] = column >= 0 ? logf(terms.total) - at_label : 0.0f;
    }
}

template <class T, bool packed>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(const Rows<const T> from, T* gradient, int64_t gradient_stride,
                                                            const float* most, const float* total, const float* scale,
                                                            const float* softmax_scale) {
    const int64_t token = blockIdx.x;
    gradient_row<packed>(from.row(token), gradient + token * gradient_stride, from.valid, from.width, from.column(token),
                         Terms{most[token], total[token]}, scale[token], softmax_scale[token]);
}

template <class T, bool packed>
__global__ void __launch_bounds__(kThreads, 1) fused_kernel(const Rows<T> rows, int64_t tokens, float z_loss, const float* scale, float* losses) {
    for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
        T* x = rows.row(token);
        const int column = rows.column(token);
        const float label = column >= 0 ? widen(x[column]) : 0.0f;  // before anyone writes: block_terms waits for all
        const Terms terms = row_terms<packed>(const_cast<const T*>(x), rows.valid);
        const float normaliser = logf(terms.total) + terms.most, softmax_scale = scale[token] * (1 + 2 * z_loss * normaliser);
        if (threadIdx.x == 0)
            losses[token] = column >= 0 ? logf(terms.total) - (label - terms.most) + z_loss * normaliser * normaliser : 0.0f;
        gradient_row<packed>(const_cast<const T*>(x), x, rows.valid, rows.width, column, terms, scale[token], softmax_scale);
    }
}

template <class T>
Rows<T> rows_of(Address logits, int64_t stride, int64_t valid, int64_t width, Address labels, int64_t first_label) {
    if (width > INT_MAX - kThreads * kAhead * 8) throw std::invalid_argument("cross-entropy: a row is too wide");
    return {(T*)logits, stride, static_cast<int>(valid), static_cast<int>(width), (const int64_t*)labels, first_label};
}

// Calls f(packed) for rows that begin at multiples of 16 bytes, or not.
template <class T, class F>
void with_packing(std::initializer_list<std::pair<Address, int64_t>> tables, F&& f) {
    bool packed = true;
    for (const auto& [base, stride] : tables) packed = packed && is_aligned(base) && stride % kLanes<T> == 0;
    packed ? f(std::true_type()) : f(std::false_type());
}

}  // namespace

void logit_max(int dtype, Address logits, int64_t stride, int64_t valid, int64_t tokens, Address most, Address stream) {
    if (tokens == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto rows = rows_of<const T>(logits, stride, valid, valid, 0, 0);
        with_packing<T>({{logits, stride}}, [&](auto packed) {
            largest_kernel<T, packed()><<<static_cast<unsigned>(tokens), kThreads, 0, (cudaStream_t)stream>>>(rows, (float*)most);
        });
        check_launch("logit_max");
    });
}

void cross_entropy_terms(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                         int64_t tokens, bool finds_largest, Address most, Address total, Address target, Address losses,
                         Address stream) {
    if (tokens == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto rows = rows_of<const T>(logits, stride, valid, valid, labels, first_label);
        with_packing<T>({{logits, stride}}, [&](auto packed) {
            terms_kernel<T, packed()><<<static_cast<unsigned>(tokens), kThreads, 0, (cudaStream_t)stream>>>(
                rows, finds_largest, (float*)most, (float*)total, (float*)target, (float*)losses);
        });
        check_launch("cross_entropy_terms");
    });
}

void cross_entropy_gradient(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                            int64_t width, int64_t tokens, Address most, Address total, Address scale, Address softmax_scale,
                            Address gradient, int64_t gradient_stride, Address stream) {
    if (tokens == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto rows = rows_of<const T>(logits, stride, valid, width, labels, first_label);
        with_packing<T>({{logits, stride}, {gradient, gradient_stride}}, [&](auto packed) {
            gradient_kernel<T, packed()><<<static_cast<unsigned>(tokens), kThreads, 0, (cudaStream_t)stream>>>(
                rows, (T*)gradient, gradient_stride, (const float*)most, (const float*)total, (const float*)scale,
                (const float*)(softmax_scale ? softmax_scale : scale));
        });
        check_launch("cross_entropy_gradient");
    });
}

void cross_entropy_fused(int dtype, Address logits, int64_t stride, Address labels, int64_t first_label, int64_t valid,
                         int64_t width, int64_t tokens, double z_loss, Address scale, Address losses, Address stream) {
    if (tokens == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto rows = rows_of<T>(logits, stride, valid, width, labels, first_label);
        const auto blocks = static_cast<unsigned>(std::min<int64_t>(tokens, multiprocessors()));
        with_packing<T>({{logits, stride}}, [&](auto packed) {
            fused_kernel<T, packed()>
                <<<blocks, kThreads, 0, (cudaStream_t)stream>>>(rows, tokens, static_cast<float>(z_loss), (const float*)scale,
                                                                (float*)losses);
        });
        check_launch("cross_entropy_fused");
    });
}

}  // namespace trilith::cuda
