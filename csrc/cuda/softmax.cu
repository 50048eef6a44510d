// Softmax of scaled scores under a causal or a general mask, forward and backward, for attention whose scores are a tensor.
//
// Bytes, e to a score: forward 2 e, and one of the mask, backward 3 e. A row lies in the registers of a group of threads (plan.h)
// from its only read to its write; longer ones, and those that do not begin at multiples of 16 bytes, are looped over by a block.
#include "cuda/ops.h"
#include "cuda/rows.h"

namespace trilith::cuda {

namespace {

constexpr float kLog2E = 1.4426950408889634f;

struct Seen {
    const uint8_t* mask;
    int64_t mask_outer, mask_head, mask_query, heads, queries;
    int keys;
    bool causal;

    // The keys of a row that may be seen, and its bytes of the mask.
    __device__ int end(int64_t row) const {
        const int64_t last = causal ? row % queries + keys - queries : keys - 1;
        return static_cast<int>(last < -1 ? 0 : last + 1 < keys ? last + 1 : keys);
    }
    __device__ const uint8_t* bytes(int64_t row) const {
        if (!mask) return nullptr;
        const int64_t head = row / queries % heads, outer = row / queries / heads;
        return mask + outer * mask_outer + head * mask_head + row % queries * mask_query;
    }
};

// The largest number over a group: the sums' way of waiting (rows.h), for maxima.
template <int group>
__device__ __forceinline__ float group_max(float x, float* shared, int index) {
    constexpr int lanes = group < kWarp ? group : kWarp, warps = group > kWarp ? group / kWarp : 1;
    x = warp_max<lanes>(x);
    if constexpr (group <= kWarp) return x;
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x % group / kWarp] = x;
    wait_for_group<group>(index);
#pragma unroll
    for (int i = 0; i < warps; ++i) x = fmaxf(x, shared[i]);
    return x;
}

template <class T, int group, int packs, int groups>
__global__ void __launch_bounds__(group* groups)
    forward_rows(const T* x, T* y, int64_t rows, float scale, const Seen seen) {
    constexpr int lanes = kLanes<T>, slots = group > kWarp ? groups : 1;
    __shared__ typename GroupSums<group>::Shared shared[slots];
    __shared__ float largest[slots][GroupSums<group>::kWarps];
    const int index = threadIdx.x / group, thread = threadIdx.x % group;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * groups + index;
    const bool is_row = row < rows;
    if (group > kWarp && !is_row) return;
    const int slot = group > kWarp ? index : 0, end = is_row ? seen.end(row) : 0;
    const uint8_t* const mask = is_row ? seen.bytes(row) : nullptr;
    float value[packs][lanes], most = -INFINITY;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        const int column = (thread + k * group) * lanes;
        Pack<T, lanes> held{};
        if (column < end) held = load_once(x + row * seen.keys + column);
#pragma unroll
        for (int i = 0; i < lanes; ++i) {
            const bool is_seen = column + i < end && (!mask || mask[column + i]);
            value[k][i] = is_seen ? widen(held.at[i]) * scale : -INFINITY;
            most = fmaxf(most, value[k][i]);
        }
    }
    most = group_max<group>(most, largest[slot], index);
    const float shift = most == -INFINITY ? 0.0f : most * kLog2E;
    float total = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k)
#pragma unroll
        for (int i = 0; i < lanes; ++i) {
            value[k][i] = exp2f(fmaf(value[k][i], kLog2E, -shift));
            total += value[k][i];
        }
    total = GroupSums<group>(shared[slot], index)(total);
    const float factor = total == 0 ? 0.0f : 1.0f / total;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        const int column = (thread + k * group) * lanes;
        if (!is_row || column >= seen.keys) continue;
        Pack<T, lanes> out;
#pragma unroll
        for (int i = 0; i < lanes; ++i) out.at[i] = narrow<T>(value[k][i] * factor);
        store(y + row * seen.keys + column, out);
    }
}

template <class T>
__global__ void __launch_bounds__(kLoopThreads) forward_loop(const T* x, T* y, float scale, const Seen seen) {
    __shared__ typename GroupSums<kLoopThreads>::Shared shared;
    __shared__ float largest[kLoopThreads / kWarp];
    const int64_t row = blockIdx.x, first = row * seen.keys;
    const int end = seen.end(row);
    const uint8_t* const mask = seen.bytes(row);
    auto score = [&](int i) { return i < end && (!mask || mask[i]) ? widen(x[first + i]) * scale : -INFINITY; };
    float most = -INFINITY;
    for (int i = threadIdx.x; i < end; i += kLoopThreads) most = fmaxf(most, score(i));
    most = group_max<kLoopThreads>(most, largest, 0);
    const float shift = most == -INFINITY ? 0.0f : most * kLog2E;
    auto power = [&](int i) { return exp2f(fmaf(score(i), kLog2E, -shift)); };
    float total = 0;
    for (int i = threadIdx.x; i < end; i += kLoopThreads) total += power(i);
    total = GroupSums<kLoopThreads>(shared, 0)(total);
    const float factor = total == 0 ? 0.0f : 1.0f / total;
    for (int i = threadIdx.x; i < seen.keys; i += kLoopThreads) y[first + i] = narrow<T>(power(i) * factor);
}

template <class T, int group, int packs, int groups>
__global__ void __launch_bounds__(group* groups)
    backward_rows(const T* y, const T* dy, T* dx, int64_t rows, int keys, float scale) {
    constexpr int lanes = kLanes<T>;
    __shared__ typename GroupSums<group>::Shared shared[group > kWarp ? groups : 1];
    const int index = threadIdx.x / group, thread = threadIdx.x % group;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * groups + index;
    const bool is_row = row < rows;
    if (group > kWarp && !is_row) return;
    Pack<T, lanes> value[packs], given[packs];
    float total = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        const int column = (thread + k * group) * lanes;
        if (!is_row || column >= keys) continue;
        value[k] = load_once(y + row * keys + column);
        given[k] = load(dy + row * keys + column);
    }
#pragma unroll
    for (int k = 0; k < packs; ++k)
        if (is_row && (thread + k * group) * lanes < keys)
#pragma unroll
            for (int i = 0; i < lanes; ++i) total = fmaf(widen(value[k].at[i]), widen(given[k].at[i]), total);
    total = GroupSums<group>(shared[group > kWarp ? index : 0], index)(total);
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        const int column = (thread + k * group) * lanes;
        if (!is_row || column >= keys) continue;
#pragma unroll
        for (int i = 0; i < lanes; ++i)
            given[k].at[i] = narrow<T>(scale * widen(value[k].at[i]) * (widen(given[k].at[i]) - total));
        store(dx + row * keys + column, given[k]);
    }
}

template <class T>
__global__ void __launch_bounds__(kLoopThreads) backward_loop(const T* y, const T* dy, T* dx, int keys, float scale) {
    __shared__ typename GroupSums<kLoopThreads>::Shared shared;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * keys;
    float total = 0;
    for (int i = threadIdx.x; i < keys; i += kLoopThreads) total = fmaf(widen(y[first + i]), widen(dy[first + i]), total);
    total = GroupSums<kLoopThreads>(shared, 0)(total);
    for (int i = threadIdx.x; i < keys; i += kLoopThreads)
        dx[first + i] = narrow<T>(scale * widen(y[first + i]) * (widen(dy[first + i]) - total));
}

}  // namespace

void softmax_forward(int dtype, Address x, Address y, int64_t outer, int64_t heads, int64_t queries, int64_t keys, double scale,
                     bool causal, Address mask, int64_t mask_outer, int64_t mask_head, int64_t mask_query, Address stream) {
    const int64_t rows = outer * heads * queries;
    if (rows * keys == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        const Seen seen{(const uint8_t*)mask, mask_outer, mask_head, mask_query, heads, queries, static_cast<int>(keys), causal};
        with_row_plan<T, false>(keys, {x, y}, [&](auto group, auto packs, auto groups) {
            if constexpr (group() == 0)
                forward_loop<T><<<static_cast<unsigned>(rows), kLoopThreads, 0, on>>>((const T*)x, (T*)y,
                                                                                     static_cast<float>(scale), seen);
            else
                forward_rows<T, group(), packs(), groups()>
                    <<<static_cast<unsigned>(ceil_div(rows, groups())), group() * groups(), 0, on>>>(
                        (const T*)x, (T*)y, rows, static_cast<float>(scale), seen);
        });
        check_launch("softmax_forward");
    });
}

void softmax_backward(int dtype, Address y, Address dy, Address dx, int64_t rows, int64_t keys, double scale, Address stream) {
    if (rows * keys == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        with_row_plan<T, false>(keys, {y, dy, dx}, [&](auto group, auto packs, auto groups) {
            if constexpr (group() == 0)
                backward_loop<T><<<static_cast<unsigned>(rows), kLoopThreads, 0, on>>>(
                    (const T*)y, (const T*)dy, (T*)dx, static_cast<int>(keys), static_cast<float>(scale));
            else
                backward_rows<T, group(), packs(), groups()>
                    <<<static_cast<unsigned>(ceil_div(rows, groups())), group() * groups(), 0, on>>>(
                        (const T*)y, (const T*)dy, (T*)dx, rows, static_cast<int>(keys), static_cast<float>(scale));
        });
        check_launch("softmax_backward");
    });
}

}  // namespace trilith::cuda
