// What attention's kernels for Hopper share: three warpgroups, of which the first brings tiles and the others have 64 rows each,
// products of a whole tile, rings of stages, and how the copy engine sees a tensor.
#pragma once

#include "cuda/attention_tile.h"
#include "cuda/hopper.h"

namespace trilith::cuda {

constexpr int kWarpgroup = 128, kHopperThreads = 3 * kWarpgroup, kStages = 2, kConsumerWarps = 8;
// Registers of a thread of the first warpgroup and of the others: 65,536 of a multiprocessor.
constexpr int kProducerRegisters = 48, kConsumerRegisters = 232;

// A ring of stages: where the next tile lies, and the parity of its phase.
struct Ring {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// The queries of a block, and the hulls of its strips: in shared memory, for registers have no room for them.
struct BlockRows {
    static constexpr int kRows = 128;
    Row rows[kRows];
    Hull strips[kRows / kStrip];

    // All threads of the block call it, and wait for each other.
    __device__ __forceinline__ void fill(const AttentionRule& rule, int64_t batch, int first, int num_queries, int num_keys) {
        for (int i = threadIdx.x; i < kRows; i += kHopperThreads)
            rows[i] = row_of(rule, batch, lesser(first + i, num_queries - 1), num_keys);
        __syncthreads();
        if (threadIdx.x < kRows / kStrip) {
            Hull strip = no_hull();
            for (int i = 0; i < kStrip; ++i) strip = join(strip, hull_of(rows[threadIdx.x * kStrip + i]));
            strips[threadIdx.x] = strip;
        }
        __syncthreads();
    }
    __device__ __forceinline__ Hull hull() const {
        Hull found = strips[0];
        for (int i = 1; i < kRows / kStrip; ++i) found = join(found, strips[i]);
        return found;
    }
};

// s = A B^T: 64 rows at `left` and the rows of a tile at `right`, in slabs so far apart.
template <int steps, int left_slab, int right_slab, class T, int groups>
__device__ __forceinline__ void begin_rows(float (&s)[groups][4], uint32_t left, uint32_t right) {
    products_open();
#pragma unroll
    for (int step = 0; step < steps; ++step) {
        const int slab = step / 4, column = step % 4 * 32;
        const uint64_t a = descriptor(left + slab * left_slab + column, 16, kSwizzleBytes);
        const uint64_t b = descriptor(right + slab * right_slab + column, 16, kSwizzleBytes);
        step == 0 ? multiply_shared<false, T>(s, a, b) : multiply_shared<true, T>(s, a, b);
    }
    products_close();
}
// out += P V: left factors in registers, a tile's rows as the depth.
template <int steps, int right_slab, class T, int groups>
__device__ __forceinline__ void add_columns(float (&out)[groups][4], const uint32_t (&left)[steps][4], uint32_t right) {
#pragma unroll
    for (int step = 0; step < steps; ++step)
        multiply_held<T>(out, left[step], descriptor(right + step * 16 * kSlabRowBytes, right_slab, kSwizzleBytes));
}
template <int steps, int right_slab, class T, int groups>
__device__ __forceinline__ void begin_columns(float (&out)[groups][4], const uint32_t (&left)[steps][4], uint32_t right) {
    products_open();
    add_columns<steps, right_slab, T>(out, left, right);
    products_close();
}

// A strip of numbers, rounded, as left factors.
template <class T, int groups>
__device__ __forceinline__ void round_factors(uint32_t (&factors)[groups / 2][4], const float (&s)[groups][4]) {
#pragma unroll
    for (int k = 0; k < groups; k += 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) factors[k / 2][i] = pack_pair<T>(s[k + i / 2][i % 2 * 2], s[k + i / 2][i % 2 * 2 + 1]);
}

// Has the copy engine bring rows [from, from + rows) of a head, `slabs` slabs `slab_bytes` apart.
__device__ __forceinline__ void bring_rows(unsigned char* to, int slabs, int slab_bytes, const CUtensorMap& tensor, uint64_t* barrier,
                                           int head, int from, int batch) {
    for (int slab = 0; slab < slabs; ++slab) copy_box(to + slab * slab_bytes, tensor, barrier, slab * kSlab, head, from, batch);
}

// How the copy engine sees a tensor (batch, sequence, head, D), in boxes of 64 features of one head of `rows` places.
template <class T>
inline CUtensorMap tensor_map(const HeadTensor<const T>& x, int64_t batch, int64_t length, int64_t heads, int64_t features, int rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult status;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status), "the driver");
        if (status != cudaDriverEntryPointSuccess || !found) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(found);
    }();
    const auto bytes_of = [&](int64_t size, int64_t stride) {  // of one that is not stepped over, any
        return static_cast<cuuint64_t>(size > 1 ? stride : features) * sizeof(T);
    };
    const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(features), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(length),
                                 static_cast<cuuint64_t>(batch)};
    const cuuint64_t strides[3] = {bytes_of(heads, x.strides.head), bytes_of(length, x.strides.row), bytes_of(batch, x.strides.batch)};
    const cuuint32_t box[4] = {kSlab, 1, static_cast<cuuint32_t>(rows), 1}, steps[4] = {1, 1, 1, 1};
    const auto dtype = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap map;
    const CUresult result =
        encode(&map, dtype, 4, const_cast<T*>(x.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw std::runtime_error("a tensor that the copy engine cannot read: " + std::to_string(result));
    return map;
}

inline bool is_hopper() {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability of the device");
    return major == 9;
}

}  // namespace trilith::cuda
