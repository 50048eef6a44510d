// Groups of threads that hold a row (plan.h), and their sums.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/plan.h"

namespace trilith::cuda {

// Waits for the `group` threads of a group of whole warps; groups of a block do not wait for each other.
template <int group>
__device__ __forceinline__ void wait_for_group(int index) {
#ifdef __CUDA_ARCH__
    asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "n"(group) : "memory");
#elif !defined(__CUDACC__)
    emulated::wait(index + 1, group);  // csrc/tests/device
#endif
}

// Sums of two numbers over a group, in the order of warps. One wait each: two places in shared memory are used in turn, and
// who writes to one has seen, at the wait in between, that all have read it.
template <int group>
class GroupSums {
public:
    static constexpr int kWarps = group > kWarp ? group / kWarp : 1;
    struct Shared {
        float2 place[2][kWarps];
    };

    __device__ GroupSums(Shared& shared, int index) : shared_(shared), index_(index) {}

    __device__ __forceinline__ float2 operator()(float a, float b) {
        constexpr int lanes = group < kWarp ? group : kWarp;
        a = warp_sum<lanes>(a), b = warp_sum<lanes>(b);
        if constexpr (group <= kWarp) return {a, b};
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x % group / kWarp;
        if (lane == 0) shared_.place[turn_][warp] = {a, b};
        wait_for_group<group>(index_);
        float2 total{0, 0};
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            const float2 part = shared_.place[turn_][i];
            total.x += part.x, total.y += part.y;
        }
        turn_ ^= 1;
        return total;
    }
    __device__ __forceinline__ float operator()(float a) { return (*this)(a, 0.0f).x; }

private:
    Shared& shared_;
    int index_, turn_ = 0;
};

// Calls f(group, packs, groups), the numbers of the plan of rows of `width` elements as constants. All zero: rows are looped over,
// also where a tensor does not begin at a multiple of 16 bytes.
template <class T, bool is_backward, class F>
void with_row_plan(int64_t width, std::initializer_list<Address> tensors, F&& f) {
    using std::integral_constant;
    RowPlan plan = row_plan(width, kLanes<T>, is_backward);
    for (Address tensor : tensors)
        if (!is_aligned(tensor)) plan = {0, 0, 0};
    auto with = [&](auto group, auto packs) {
        constexpr RowPlan made = row_plan(int64_t(group()) * packs() * kLanes<T>, kLanes<T>, is_backward);
        static_assert(made.group == group() && made.packs == packs());
        f(group, packs, integral_constant<int, made.groups>());
    };
    switch (plan.group) {
        case 0: f(integral_constant<int, 0>(), integral_constant<int, 0>(), integral_constant<int, 0>()); break;
        case 8: with(integral_constant<int, 8>(), integral_constant<int, 2>()); break;
        case 32: with(integral_constant<int, 32>(), integral_constant<int, 2>()); break;
        case 128: with(integral_constant<int, 128>(), integral_constant<int, 2>()); break;
        case 256: with(integral_constant<int, 256>(), integral_constant<int, 2>()); break;
        case 512:
            if (plan.packs == 2)
                with(integral_constant<int, 512>(), integral_constant<int, 2>());
            else if constexpr (is_backward)
                with(integral_constant<int, 512>(), integral_constant<int, 4>());
            break;
        default:
            if constexpr (!is_backward) with(integral_constant<int, 1024>(), integral_constant<int, 2>());
    }
}

}  // namespace trilith::cuda
