// LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang and Sennrich 2019), with the residual's sum fused both ways.
//
// Bytes, e to an element: forward 2 e a element of the tensor (4 e with the residual), backward 3 e (4 e with the gradient of
// the sum): every tensor is moved once. A row lies in the registers of a group of threads from its only read to its write, so
// that variance can be the mean of squared distances from the mean. In backward a block stays on its multiprocessor and takes
// row after row, asks for the next while it sums the present one, and keeps the columns' sums for weight and bias in registers;
// the blocks' partial sums (8 bytes a column and block, in the second cache) are added by a second, small kernel in one order:
// the same bits every time. Rows that are wider than the registers of a block, or not made of 16-byte packs, are looped over
// by a block: the first read fills the caches, later passes hit them.
#include "cuda/columns.h"
#include "cuda/ops.h"
#include "cuda/rows.h"

namespace trilith::cuda {

namespace {

template <class T>
struct Forward {
    const T *x, *residual, *weight, *bias;
    T *sum, *y;
    float *mean, *rstd;
    int64_t rows;
    int width;
    float eps;
};

template <class T, int group, int packs, int groups, bool is_rms>
__global__ void __launch_bounds__(group* groups) forward_rows(const Forward<T> op) {
    constexpr int lanes = kLanes<T>;
    using P = Pack<T, lanes>;
    __shared__ typename GroupSums<group>::Shared shared[group > kWarp ? groups : 1];
    const int index = threadIdx.x / group, thread = threadIdx.x % group, count = op.width / lanes;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * groups + index;
    const bool is_row = row < op.rows;
    if (group > kWarp && !is_row) return;  // parts of a warp stay, because the warp sums together
    GroupSums<group> sums(shared[group > kWarp ? index : 0], index);
    const int64_t first = row * op.width;

    P value[packs];
    bool here[packs];
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        here[k] = is_row && thread + k * group < count;
        if (here[k]) value[k] = load_once(op.x + first + (thread + k * group) * lanes);
    }
    if (op.residual) {
        P other[packs];
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (here[k]) other[k] = load_once(op.residual + first + (thread + k * group) * lanes);
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (here[k]) {
#pragma unroll
                for (int i = 0; i < lanes; ++i) value[k].at[i] = narrow<T>(widen(value[k].at[i]) + widen(other[k].at[i]));
                store(op.sum + first + (thread + k * group) * lanes, value[k]);
            }
    }
    const float scale = 1.0f / static_cast<float>(op.width);
    float mean = 0;
    if constexpr (!is_rms) {
        float total = 0;
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (here[k])
#pragma unroll
                for (int i = 0; i < lanes; ++i) total += widen(value[k].at[i]);
        mean = sums(total) * scale;
    }
    float squares = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k)
        if (here[k])
#pragma unroll
            for (int i = 0; i < lanes; ++i) {
                const float centred = widen(value[k].at[i]) - mean;
                squares = fmaf(centred, centred, squares);
            }
    const float rstd = 1.0f / sqrtf(sums(squares) * scale + op.eps);
    if (thread == 0 && is_row) {
        if constexpr (!is_rms) op.mean[row] = mean;
        op.rstd[row] = rstd;
    }
#pragma unroll
    for (int k = 0; k < packs; ++k)
        if (here[k]) {
            const int column = (thread + k * group) * lanes;
            const P weight = load(op.weight + column);
            P bias{}, y;
            if (op.bias) bias = load(op.bias + column);
#pragma unroll
            for (int i = 0; i < lanes; ++i) {
                const float normal = (widen(value[k].at[i]) - mean) * rstd;
                y.at[i] = narrow<T>(op.bias ? fmaf(normal, widen(weight.at[i]), widen(bias.at[i])) : normal * widen(weight.at[i]));
            }
            store(op.y + first + column, y);
        }
}

// A block for each row, of any width and alignment.
template <class T, bool is_rms>
__global__ void __launch_bounds__(kLoopThreads) forward_loop(const Forward<T> op) {
    __shared__ typename GroupSums<kLoopThreads>::Shared shared;
    GroupSums<kLoopThreads> sums(shared, 0);
    const int64_t row = blockIdx.x, first = row * op.width;
    const T* x = op.x + first;
    if (op.residual) {
        T* sum = op.sum + first;
        for (int i = threadIdx.x; i < op.width; i += kLoopThreads) sum[i] = narrow<T>(widen(x[i]) + widen(op.residual[first + i]));
        x = sum;  // each thread reads what it wrote
    }
    const float scale = 1.0f / static_cast<float>(op.width);
    float mean = 0;
    if constexpr (!is_rms) {
        float total = 0;
        for (int i = threadIdx.x; i < op.width; i += kLoopThreads) total += widen(x[i]);
        mean = sums(total) * scale;
    }
    float squares = 0;
    for (int i = threadIdx.x; i < op.width; i += kLoopThreads) {
        const float centred = widen(x[i]) - mean;
        squares = fmaf(centred, centred, squares);
    }
    const float rstd = 1.0f / sqrtf(sums(squares) * scale + op.eps);
    if (threadIdx.x == 0) {
        if constexpr (!is_rms) op.mean[row] = mean;
        op.rstd[row] = rstd;
    }
    for (int i = threadIdx.x; i < op.width; i += kLoopThreads) {
        const float normal = (widen(x[i]) - mean) * rstd;
        op.y[first + i] = narrow<T>(op.bias ? fmaf(normal, widen(op.weight[i]), widen(op.bias[i])) : normal * widen(op.weight[i]));
    }
}

template <class T>
struct Backward {
    const T *dy, *dsum, *x, *weight;
    const float *mean, *rstd;
    T* dx;
    float* partial;  // (block, line, column): sums for the weight, then, with a bias, for the bias
    int64_t rows;
    int width, lines;
};

// A row's own sums, and the gradient of an element from them.
struct RowTerms {
    float mean, rstd, mean_g, mean_gx;
    __device__ float normal(float x) const { return (x - mean) * rstd; }
    __device__ float gradient(float g, float x) const { return (g - mean_g - normal(x) * mean_gx) * rstd; }
};

template <class T, int group, int packs, int groups, bool is_rms>
__global__ void __launch_bounds__(group* groups, 1) backward_rows(const Backward<T> op) {
    constexpr int lanes = kLanes<T>;
    // Two packs a thread leave registers for the next row. With four even this one is read again, from the second cache.
    constexpr bool keeps_row = packs <= 2;
    using P = Pack<T, lanes>;
    __shared__ typename GroupSums<group>::Shared shared[group > kWarp ? groups : 1];
    const int index = threadIdx.x / group, thread = threadIdx.x % group, count = op.width / lanes;
    GroupSums<group> sums(shared[group > kWarp ? index : 0], index);
    const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
    const float scale = 1.0f / static_cast<float>(op.width);

    float dweight[packs][lanes] = {}, dbias[packs][lanes] = {};
    constexpr int kept = keeps_row ? packs : 1;
    P dy[kept], x[kept], next_dy[kept], next_x[kept];
    auto read = [&](int64_t row, P* to_dy, P* to_x) {
#pragma unroll
        for (int k = 0; k < kept; ++k)
            if (row < op.rows && thread + k * group < count) {
                const int64_t at = row * op.width + (thread + k * group) * lanes;
                to_dy[k] = load_once(op.dy + at);
                to_x[k] = load_once(op.x + at);
            }
    };
    // Rows come in turns of all groups; a warp's parts go on until the last of them has none.
    const int64_t turns = ceil_div(op.rows, step);
    int64_t row = static_cast<int64_t>(blockIdx.x) * groups + index;
    if constexpr (keeps_row) read(row, dy, x);
    for (int64_t turn = 0; turn < turns; ++turn, row += step) {
        const bool is_row = row < op.rows;
        if (group > kWarp && !is_row) break;
        if constexpr (keeps_row) read(row + step, next_dy, next_x);
        RowTerms terms{0, 0, 0, 0};
        if (is_row) {
            if constexpr (!is_rms) terms.mean = op.mean[row];
            terms.rstd = op.rstd[row];
        }
        float sum_g = 0, sum_gx = 0;
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (is_row && thread + k * group < count) {
                const int column = (thread + k * group) * lanes;
                const P weight = load(op.weight + column);
                if constexpr (!keeps_row) dy[0] = load(op.dy + row * op.width + column), x[0] = load(op.x + row * op.width + column);
                const P &dy_k = dy[keeps_row ? k : 0], &x_k = x[keeps_row ? k : 0];
#pragma unroll
                for (int i = 0; i < lanes; ++i) {
                    const float d = widen(dy_k.at[i]), normal = terms.normal(widen(x_k.at[i])), g = d * widen(weight.at[i]);
                    if constexpr (!is_rms) sum_g += g;
                    sum_gx = fmaf(g, normal, sum_gx);
                    dweight[k][i] = fmaf(d, normal, dweight[k][i]);
                    dbias[k][i] += d;
                }
            }
        const float2 total = sums(sum_g, sum_gx);
        terms.mean_g = total.x * scale, terms.mean_gx = total.y * scale;
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (is_row && thread + k * group < count) {
                const int column = (thread + k * group) * lanes;
                const int64_t at = row * op.width + column;
                const P weight = load(op.weight + column);
                P dsum{}, dx;
                if (op.dsum) dsum = load_once(op.dsum + at);
                if constexpr (!keeps_row) dy[0] = load_once(op.dy + at), x[0] = load_once(op.x + at);
                const P &dy_k = dy[keeps_row ? k : 0], &x_k = x[keeps_row ? k : 0];
#pragma unroll
                for (int i = 0; i < lanes; ++i) {
                    const float g = widen(dy_k.at[i]) * widen(weight.at[i]);
                    dx.at[i] = narrow<T>(terms.gradient(g, widen(x_k.at[i])) + widen(dsum.at[i]));
                }
                store(op.dx + at, dx);
            }
        if constexpr (keeps_row)
#pragma unroll
            for (int k = 0; k < packs; ++k) dy[k] = next_dy[k], x[k] = next_x[k];
    }

    // The groups of the block add up in their order, in shared memory; then the block has one sum a column.
    float* const partial = op.partial + static_cast<int64_t>(blockIdx.x) * op.lines * op.width;
    if constexpr (groups == 1) {
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (thread + k * group < count)
#pragma unroll
                for (int i = 0; i < lanes; ++i) {
                    const int column = (thread + k * group) * lanes + i;
                    partial[column] = dweight[k][i];
                    if (op.lines == 2) partial[op.width + column] = dbias[k][i];
                }
    } else {
        __shared__ float columns[2][group * packs * lanes];
        for (int turn = 0; turn < groups; ++turn) {
            if (index == turn)
#pragma unroll
                for (int k = 0; k < packs; ++k)
#pragma unroll
                    for (int i = 0; i < lanes; ++i) {
                        const int column = (thread + k * group) * lanes + i;
                        columns[0][column] = turn ? columns[0][column] + dweight[k][i] : dweight[k][i];
                        columns[1][column] = turn ? columns[1][column] + dbias[k][i] : dbias[k][i];
                    }
            __syncthreads();
        }
        for (int column = threadIdx.x; column < op.width; column += group * groups) {
            partial[column] = columns[0][column];
            if (op.lines == 2) partial[op.width + column] = columns[1][column];
        }
    }
}

// A block takes kLoopRows rows at a time, so that the partial sums in memory are read and written once for as many.
constexpr int kLoopRows = 4;

template <class T, bool is_rms>
__global__ void __launch_bounds__(kLoopThreads) backward_loop(const Backward<T> op) {
    __shared__ typename GroupSums<kLoopThreads>::Shared shared;
    GroupSums<kLoopThreads> sums(shared, 0);
    float* const partial = op.partial + static_cast<int64_t>(blockIdx.x) * op.lines * op.width;
    for (int column = threadIdx.x; column < op.lines * op.width; column += kLoopThreads) partial[column] = 0;
    __syncthreads();  // others than the writer add to it
    const float scale = 1.0f / static_cast<float>(op.width);
    for (int64_t from = static_cast<int64_t>(blockIdx.x) * kLoopRows; from < op.rows;
         from += static_cast<int64_t>(gridDim.x) * kLoopRows) {
        const int held = static_cast<int>(op.rows - from < kLoopRows ? op.rows - from : kLoopRows);
        RowTerms terms[kLoopRows];
#pragma unroll
        for (int r = 0; r < kLoopRows; ++r) {
            if (r >= held) break;
            const int64_t first = (from + r) * op.width;
            terms[r] = {is_rms ? 0.0f : op.mean[from + r], op.rstd[from + r], 0, 0};
            float sum_g = 0, sum_gx = 0;
            for (int i = threadIdx.x; i < op.width; i += kLoopThreads) {
                const float g = widen(op.dy[first + i]) * widen(op.weight[i]);
                if constexpr (!is_rms) sum_g += g;
                sum_gx = fmaf(g, terms[r].normal(widen(op.x[first + i])), sum_gx);
            }
            const float2 total = sums(sum_g, sum_gx);
            terms[r].mean_g = total.x * scale, terms[r].mean_gx = total.y * scale;
        }
        for (int i = threadIdx.x; i < op.width; i += kLoopThreads) {
            const float weight = widen(op.weight[i]);
            float dweight = 0, dbias = 0;
#pragma unroll
            for (int r = 0; r < kLoopRows; ++r) {
                if (r >= held) break;
                const int64_t at = (from + r) * op.width + i;
                const float d = widen(op.dy[at]), x = widen(op.x[at]);
                dweight = fmaf(d, terms[r].normal(x), dweight);
                dbias += d;
                op.dx[at] = narrow<T>(terms[r].gradient(d * weight, x) + (op.dsum ? widen(op.dsum[at]) : 0.0f));
            }
            partial[i] += dweight;
            if (op.lines == 2) partial[op.width + i] += dbias;
        }
    }
}

}  // namespace

void norm_forward(int dtype, Address x, Address residual, Address weight, Address bias, Address sum, Address y, Address mean,
                  Address rstd, int64_t rows, int64_t width, double eps, Address stream) {
    if (rows == 0 || width == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        const Forward<T> op{(const T*)x, (const T*)residual, (const T*)weight, (const T*)bias, (T*)sum, (T*)y,
                            (float*)mean, (float*)rstd,     rows,             static_cast<int>(width), static_cast<float>(eps)};
        with_row_plan<T, false>(width, {x, residual, weight, bias, sum, y}, [&](auto group, auto packs, auto groups) {
            if constexpr (group() == 0) {
                const auto blocks = static_cast<unsigned>(rows);
                mean ? forward_loop<T, false><<<blocks, kLoopThreads, 0, on>>>(op)
                     : forward_loop<T, true><<<blocks, kLoopThreads, 0, on>>>(op);
            } else {
                const auto blocks = static_cast<unsigned>(ceil_div(rows, groups()));
                constexpr int threads = group() * groups();
                mean ? forward_rows<T, group(), packs(), groups(), false><<<blocks, threads, 0, on>>>(op)
                     : forward_rows<T, group(), packs(), groups(), true><<<blocks, threads, 0, on>>>(op);
            }
        });
        check_launch("norm_forward");
    });
}

int64_t norm_backward_workspace(int64_t rows, int64_t width) {
    const int64_t blocks = std::min<int64_t>(std::max<int64_t>(rows, 1), multiprocessors());
    return blocks * 2 * width * static_cast<int64_t>(sizeof(float));
}

void norm_backward(int dtype, Address dy, Address dsum, Address x, Address weight, Address mean, Address rstd, Address dx,
                   Address dweight, Address dbias, int64_t rows, int64_t width, Address workspace, Address stream) {
    if (width == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        const Backward<T> op{(const T*)dy,  (const T*)dsum,    (const T*)x, (const T*)weight,        (const float*)mean,
                             (const float*)rstd, (T*)dx, (float*)workspace, rows, static_cast<int>(width), dbias ? 2 : 1};
        int blocks = 0;
        with_row_plan<T, true>(width, {dy, dsum, x, weight, dx}, [&](auto group, auto packs, auto groups) {
            blocks = static_cast<int>(staying_blocks(rows, groups(), multiprocessors()));
            if constexpr (group() == 0) {
                mean ? backward_loop<T, false><<<blocks, kLoopThreads, 0, on>>>(op)
                     : backward_loop<T, true><<<blocks, kLoopThreads, 0, on>>>(op);
            } else {
                constexpr int threads = group() * groups();
                mean ? backward_rows<T, group(), packs(), groups(), false><<<blocks, threads, 0, on>>>(op)
                     : backward_rows<T, group(), packs(), groups(), true><<<blocks, threads, 0, on>>>(op);
            }
        });
        add_partials<T>(op.partial, blocks, op.width, (T*)dweight, (T*)dbias, on);
        check_launch("norm_backward");
    });
}

}  // namespace trilith::cuda
