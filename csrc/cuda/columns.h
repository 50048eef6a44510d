// Sums of columns, in two steps: blocks leave a partial sum of each column each, and a small kernel adds them in one order, so
// that the bits are the same every time.
#pragma once

#include "cuda/device.h"
#include "cuda/plan.h"

namespace trilith::cuda {

// kColumns columns a block, the partial sums of each in kSlices slices, which are added in their order.
constexpr int kColumns = 32, kSlices = 16;

template <class T>
__global__ void __launch_bounds__(kColumns* kSlices)
    add_partials_kernel(const float* partial, int blocks, int width, T* first, T* second) {
    __shared__ float slices[kSlices][kColumns];
    const int column = blockIdx.x * kColumns + threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
    const int64_t stride = static_cast<int64_t>(gridDim.y) * width;
    const float* const from = partial + static_cast<int64_t>(blockIdx.y) * width + column;
    float total = 0;
    if (column < width)
#pragma unroll 8
        for (int block = slice; block < blocks; block += kSlices) total += from[block * stride];
    slices[slice][threadIdx.x % kColumns] = total;
    __syncthreads();
    if (slice == 0 && column < width) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kSlices; ++i) sum += slices[i][threadIdx.x];
        (blockIdx.y ? second : first)[column] = narrow<T>(sum);
    }
}

// first (width), and second where there is one = the sums of partial (blocks, 1 or 2 lines, width).
template <class T>
void add_partials(const float* partial, int blocks, int width, T* first, T* second, cudaStream_t on) {
    const dim3 grid(static_cast<unsigned>(ceil_div(width, kColumns)), second ? 2 : 1);
    add_partials_kernel<T><<<grid, kColumns * kSlices, 0, on>>>(partial, blocks, width, first, second);
}

// Bytes of the partial sums of a table: for packs or single elements, whichever needs more.
inline int64_t table_workspace(int64_t rows, int64_t width) {
    const int count = multiprocessors();
    int64_t most = 0;
    for (int lanes : {1, 4, 8}) {
        const int64_t runs = table_plan(rows, width, lanes, count).row_blocks;
        most = runs > most ? runs : most;
    }
    return most * width * static_cast<int64_t>(sizeof(float));
}

}  // namespace trilith::cuda
