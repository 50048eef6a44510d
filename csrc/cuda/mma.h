// Products of 16 x 8 x 16 by a warp, the loads of their factors from shared memory, and copies into it that do not wait: what
// attention is made of on Ampere and later (PTX ISA, "Matrix multiply-accumulate operation using mma instruction", m16n8k16).
//
// Lane l = 4 g + t holds of the left factor A (16 x 16) the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), of the right
// factor B (16 x 8) the pairs (2t, g), (2t + 8, g), which are neighbours along the depth, and of the result (16 x 8) the numbers
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). So two results side by side, rounded, are a left factor.
#pragma once

#include <type_traits>

#include "cuda/device.h"

#ifdef TRILITH_EMULATED
#define TRILITH_DYNAMIC_SHARED(name) unsigned char* const name = ::trilith::emulated::dynamic_shared()
#else
#define TRILITH_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace trilith::cuda {

// c += A B.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::multiply(c, a, b0, b1, std::is_same<T, __half>::value);
#elif defined(__CUDA_ARCH__)
    if constexpr (std::is_same<T, __half>::value)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8 i + r names row r of matrix i, 16 bytes; of each, lane 4 g + t
// gets the pair (g, 2t), or (2t, g) where they are `transposed`.
template <bool transposed, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const T* row) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::load_matrices(out, row, transposed);
#elif defined(__CUDA_ARCH__)
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address));
#endif
}

// Two numbers rounded, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t pair = 0;
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same<T, __half>::value)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#elif defined(TRILITH_EMULATED)
    const T two[2] = {narrow<T>(low), narrow<T>(high)};
    std::memcpy(&pair, two, sizeof pair);
#endif
    return pair;
}

// 2^x.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Begins to copy 16 bytes into shared memory, or zeros where they are not `wanted`.
__device__ __forceinline__ void copy_begin(void* shared, const void* global, bool wanted) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::copy_begin(shared, global, wanted);
#elif defined(__CUDA_ARCH__)
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(wanted ? 16 : 0));
#endif
}
// What this thread has begun since the last call is a group.
__device__ __forceinline__ void copies_close() {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::copies_close();
#elif defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::);
#endif
}
// Waits until all but the last `left` groups of this thread are there; what others copied is there after a barrier.
template <int left>
__device__ __forceinline__ void copies_wait() {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::copies_wait(left);
#elif defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(left));
#endif
}

}  // namespace trilith::cuda
