// What the CUDA kernels share: element types, 16-byte accesses, sums over warps and groups of threads, launches.
//
// A thread reads and writes packs of 16 bytes, several of them before it uses the first, and computes in float. Sums are made
// in an order that the sizes alone determine. Everything runs on the caller's stream and waits for nothing, so that calls can
// be captured in a graph; errors of a launch are thrown.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/attention.h"
#include "common/types.h"

namespace trilith::cuda {

constexpr int kWarp = 32;
constexpr int kPackBytes = 16;

// n neighbours that are read and written as one.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
    T at[n];
};
// Elements of a 16-byte access.
template <class T>
constexpr int kLanes = kPackBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }

// Reads of what is needed once and written by nobody: past the first cache, which keeps what is read again (weights).
template <class T>
__device__ __forceinline__ Pack<T, kLanes<T>> load_once(const T* from) {
#ifdef __CUDA_ARCH__
    uint4 bits;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
        : "l"(from));
    return reinterpret_cast<const Pack<T, kLanes<T>>&>(bits);
#else
    return *reinterpret_cast<const Pack<T, kLanes<T>>*>(from);
#endif
}
template <class T>
__device__ __forceinline__ Pack<T, kLanes<T>> load(const T* from) {
    return *reinterpret_cast<const Pack<T, kLanes<T>>*>(from);
}
template <class T>
__device__ __forceinline__ void store(T* to, const Pack<T, kLanes<T>>& pack) {
    *reinterpret_cast<Pack<T, kLanes<T>>*>(to) = pack;
}

// A sum over the lanes of a warp, or of aligned parts of it of `width` lanes: every lane has it.
template <int width = kWarp>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step, width);
    return x;
}
template <int width = kWarp>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step, width));
    return x;
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors of the device");
    return count;
}

// Calls f(Tag<T>()) for the device's type of a dtype; fp64 does not come here.
template <class F>
void with_device_dtype(int dtype, F&& f) {
    switch (static_cast<DType>(dtype)) {
        case DType::f32: f(Tag<float>()); break;
        case DType::bf16: f(Tag<__nv_bfloat16>()); break;
#ifndef TRILITH_NO_F16  // a build that looks at registers only
        case DType::f16: f(Tag<__half>()); break;
#endif
        default: throw std::invalid_argument("a CUDA kernel takes fp32, bf16 and fp16");
    }
}

inline bool is_aligned(Address address) { return address % kPackBytes == 0; }

}  // namespace trilith::cuda
