// The part of CUDA that csrc/cuda uses, run by the processor, so that its kernels are tested where there is no GPU.
//
// A block is a set of fibers in one thread of the processor, which change hands where CUDA's threads wait for each other; blocks
// run one after the other. Which fiber goes on is drawn anew at every wait: what would be a race gives other bits from launch to
// launch. A wait that cannot end is an error, not a standstill. csrc/build.py translates launches (<<< >>>) into calls of `launch`.
#pragma once

#define TRILITH_EMULATED

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time, in one thread
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {};
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// Three multiprocessors, of the generation that the environment names.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const char* generation = std::getenv("TRILITH_EMULATED_GENERATION");
    *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : generation ? std::atoi(generation) : 8;
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return cudaSuccess; }

namespace trilith::emulated {

struct Place {
    dim3 thread, block, block_dim, grid_dim;
};
// Of the fiber that runs.
extern Place now;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, void (*kernel)(Parameters...), Arguments... arguments) {
    run(grid, block, shared_bytes, [&] { kernel(Parameters(arguments)...); });
}

// Waits until `count` threads of the block wait at barrier `id`, or, with a count of 0, all that have not ended.
void wait(int id, int count);
// `bits` of the lane whose number differs by xor with `step`, within aligned parts of `width` lanes; all lanes of a warp call it.
uint32_t exchange(uint32_t bits, int step, int width);
uint64_t exchange(uint64_t bits, int step, int width);
// The bit of each lane of the warp, all of which call it.
uint32_t ballot(bool bit);

// What csrc/cuda/mma.h has. A copy is made when it is waited for, not before.
unsigned char* dynamic_shared();
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_half);
void load_matrices(uint32_t (&out)[4], const void* row, bool transposed);
void copy_begin(void* shared, const void* global, bool wanted);
void copies_close();
void copies_wait(int left);

}  // namespace trilith::emulated

#define threadIdx (::trilith::emulated::now.thread)
#define blockIdx (::trilith::emulated::now.block)
#define blockDim (::trilith::emulated::now.block_dim)
#define gridDim (::trilith::emulated::now.grid_dim)

inline void __syncthreads() { trilith::emulated::wait(0, 0); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    return std::memcpy(&bits, &x, sizeof bits), bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    return std::memcpy(&x, &bits, sizeof x), x;
}
inline float __shfl_xor_sync(uint32_t, float x, int step, int width = 32) {
    return __uint_as_float(trilith::emulated::exchange(__float_as_uint(x), step, width));
}
inline double __shfl_xor_sync(uint32_t, double x, int step, int width = 32) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = trilith::emulated::exchange(bits, step, width);
    return std::memcpy(&x, &bits, sizeof x), x;
}
inline int __shfl_xor_sync(uint32_t, int x, int step, int width = 32) {
    return static_cast<int>(trilith::emulated::exchange(static_cast<uint32_t>(x), step, width));
}
inline uint32_t __ballot_sync(uint32_t, bool bit) { return trilith::emulated::ballot(bit); }
inline void __syncwarp() { trilith::emulated::ballot(true); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
    return cudaSuccess;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
