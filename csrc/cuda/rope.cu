// Rotary position embedding (Su et al. 2021): each pair (i, i + half) of a head is turned by its position's angle.
//
// x and the result have strides of their own: heads are read where the product of queries, keys and values wrote them, and may be
// written in place. Bytes, e to an element: 2 e; the angles of a position stay in the caches for all its heads. A thread has a
// pack of the first half and the pack of the second half that belongs to it. Backward turns back: the same with -sin.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/ops.h"
#include "cuda/plan.h"

namespace trilith::cuda {

namespace {

constexpr int kThreads = 256, kUnroll = 2;

struct Strides {
    int64_t sample, position, head;
};
struct Sizes {
    int64_t batch, length, heads, half;
};

template <class T, int lanes>
__global__ void __launch_bounds__(kThreads) turn(const T* x, T* y, const float* cosines, const float* sines, const Sizes sizes,
                                                 const Strides from, const Strides to, int64_t table_stride, float sign) {
    const int packs = static_cast<int>(sizes.half) / lanes;
    const int64_t total = sizes.batch * sizes.length * sizes.heads * packs;
    Pack<T, lanes> first[kUnroll], second[kUnroll];
    int64_t source[kUnroll], target[kUnroll], angle[kUnroll];
    bool here[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
        const int64_t n = (static_cast<int64_t>(blockIdx.x) * kUnroll + k) * kThreads + threadIdx.x;
        here[k] = n < total;
        if (!here[k]) continue;
        const int64_t pack = n % packs * lanes, head = n / packs % sizes.heads, token = n / packs / sizes.heads;
        const int64_t sample = token / sizes.length, position = token % sizes.length;
        source[k] = sample * from.sample + position * from.position + head * from.head + pack;
        target[k] = sample * to.sample + position * to.position + head * to.head + pack;
        angle[k] = sample * table_stride + position * sizes.half + pack;
        first[k] = *reinterpret_cast<const Pack<T, lanes>*>(x + source[k]);
        second[k] = *reinterpret_cast<const Pack<T, lanes>*>(x + source[k] + sizes.half);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
        if (!here[k]) continue;
#pragma unroll
        for (int i = 0; i < lanes; ++i) {
            const float c = cosines[angle[k] + i], s = sines[angle[k] + i] * sign;
            const float a = widen(first[k].at[i]), b = widen(second[k].at[i]);
            first[k].at[i] = narrow<T>(a * c - b * s);
            second[k].at[i] = narrow<T>(b * c + a * s);
        }
        *reinterpret_cast<Pack<T, lanes>*>(y + target[k]) = first[k];
        *reinterpret_cast<Pack<T, lanes>*>(y + target[k] + sizes.half) = second[k];
    }
}

}  // namespace

void rotary(int dtype, Address x, Address y, Address cos, Address sin, int64_t batch, int64_t length, int64_t heads, int64_t half,
            int64_t x_sample, int64_t x_position, int64_t x_head, int64_t y_sample, int64_t y_position, int64_t y_head,
            int64_t table_stride, bool inverse, Address stream) {
    const int64_t pairs = batch * length * heads * half;
    if (pairs == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        bool packed = is_aligned(x) && is_aligned(y);
        for (int64_t stride : {half, x_sample, x_position, x_head, y_sample, y_position, y_head})
            packed = packed && stride % kLanes<T> == 0;
        auto run = [&](auto lanes) {
            const auto blocks = static_cast<unsigned>(ceil_div(pairs / lanes(), kThreads * kUnroll));
            turn<T, lanes()><<<blocks, kThreads, 0, (cudaStream_t)stream>>>(
                (const T*)x, (T*)y, (const float*)cos, (const float*)sin, Sizes{batch, length, heads, half},
                Strides{x_sample, x_position, x_head}, Strides{y_sample, y_position, y_head}, table_stride,
                inverse ? -1.0f : 1.0f);
        };
        packed ? run(std::integral_constant<int, kLanes<T>>()) : run(std::integral_constant<int, 1>());
        check_launch("rotary");
    });
}

}  // namespace trilith::cuda
