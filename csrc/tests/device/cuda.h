// The part of the driver's interface that csrc/cuda uses: how the copy engine sees a tensor.
#pragma once

#include "cuda_runtime.h"

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// Of numbers of two bytes; the strides are in bytes, that of the first dimension left out.
struct CUtensorMap {
    const void* base;
    cuuint64_t sizes[4], strides[3];
    cuuint32_t box[4];
};
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* status) {
    *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
    *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

namespace trilith::emulated {

// What csrc/cuda/hopper.h has. Boxes arrive at some time while their barrier is waited for.
uint32_t shared_address(const void* at);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);
void copy_box(void* to, const CUtensorMap& tensor, uint64_t* barrier, int feature, int head, int place, int sample);
void multiply_shared(float* d, int groups, uint64_t a, uint64_t b, int adds, bool is_half);
void multiply_held(float* d, int groups, const uint32_t (&a)[4], uint64_t b, bool is_half);
void products_close();
void products_wait(int left);

}  // namespace trilith::emulated
