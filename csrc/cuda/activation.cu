// GELU (Hendrycks and Gimpel 2016), exact and by its tanh form, with the bias before it; SwiGLU and GeGLU (Shazeer 2020); dropout
// with the bias before and the residual behind it, from the stream that belongs to the model and not to the layout.
//
// Bytes, e to an element: activation 2 e forward, 3 e backward; a gated unit 3 e and 5 e; dropout 2 e (3 e with a residual). Only
// inputs are kept: backward computes the function again. A thread has packs of 16 bytes; several are under way before the first
// is used. Where the gradient of a bias is wanted, threads keep columns and go down rows (columns.h). A Philox call decides for
// eight neighbours, which is one pack of a 16-bit format or two of fp32.
#include "common/kinds.h"
#include "cuda/columns.h"
#include "cuda/ops.h"
#include "cuda/philox.h"

namespace trilith::cuda {

namespace {

struct ValueAndSlope {
    float value, slope;
};

template <int kind>
__device__ __forceinline__ ValueAndSlope evaluate(float x) {
    if constexpr (kind == kGelu) {
        const float cumulative = 0.5f * erfcf(x * -0.7071067811865476f);
        const float density = 0.3989422804014327f * exp2f(x * x * -0.7213475204444817f);
        return {x * cumulative, fmaf(x, density, cumulative)};
    } else {
        // SiLU is x sigmoid(x); the tanh form x sigmoid(a x + b x^3), because (1 + tanh(u)) / 2 = sigmoid(2u). Beyond `far` the
        // sigmoid is 0 or 1 beside x.
        constexpr bool is_tanh = kind == kGeluTanh;
        constexpr float far = is_tanh ? 10.0f : 87.0f, a = 1.5957691216057308f, b = a * 0.044715f;
        const float near = fminf(fmaxf(x, -far), far), square = near * near;
        const float inner = is_tanh ? near * fmaf(square, b, a) : near;
        const float power = exp2f(inner * -1.4426950408889634f), sigmoid = 1.0f / (1.0f + power), rest = power * sigmoid;
        const float reached = x < -far ? 0.0f : sigmoid, value = x * reached;
        const float steepness = is_tanh ? fmaf(square, 3.0f * b, a) : 1.0f;
        return {value, fmaf(value * rest, steepness, reached)};
    }
}

template <class T, int lanes>
__device__ __forceinline__ Pack<T, lanes> read(const T* from) {
    return *reinterpret_cast<const Pack<T, lanes>*>(from);
}
template <class T, int lanes>
__device__ __forceinline__ void write(T* to, const Pack<T, lanes>& pack) {
    *reinterpret_cast<Pack<T, lanes>*>(to) = pack;
}

// Calls f(lanes) with packs where every tensor and row begins at a multiple of 16 bytes, else with single elements.
template <class T, class F>
void with_lanes(int64_t row, std::initializer_list<Address> tensors, F&& f) {
    bool packed = row % kLanes<T> == 0;
    for (Address tensor : tensors) packed = packed && is_aligned(tensor);
    packed ? f(std::integral_constant<int, kLanes<T>>()) : f(std::integral_constant<int, 1>());
}

// --- flat tensors: every thread has kUnroll packs, a block apart ---------------------------------------------------------

constexpr int kFlatThreads = 256, kUnroll = 4;

inline unsigned flat_blocks(int64_t packs) { return static_cast<unsigned>(ceil_div(packs, int64_t(kFlatThreads) * kUnroll)); }

// The number of this thread's k-th pack.
__device__ __forceinline__ int64_t flat_pack(int k) {
    return (static_cast<int64_t>(blockIdx.x) * kUnroll + k) * kFlatThreads + threadIdx.x;
}

template <class T, int lanes, int kind>
__global__ void __launch_bounds__(kFlatThreads) forward_flat(const T* x, T* y, int64_t packs) {
    Pack<T, lanes> held[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
        if (flat_pack(k) < packs) held[k] = read<T, lanes>(x + flat_pack(k) * lanes);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
        if (flat_pack(k) < packs) {
#pragma unroll
            for (int i = 0; i < lanes; ++i) held[k].at[i] = narrow<T>(evaluate<kind>(widen(held[k].at[i])).value);
            write(y + flat_pack(k) * lanes, held[k]);
        }
}

template <class T, int lanes, int kind>
__global__ void __launch_bounds__(kFlatThreads) backward_flat(const T* dy, const T* x, T* dx, int64_t packs) {
    Pack<T, lanes> given[kUnroll], held[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
        if (flat_pack(k) < packs) {
            given[k] = read<T, lanes>(dy + flat_pack(k) * lanes);
            held[k] = read<T, lanes>(x + flat_pack(k) * lanes);
        }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
        if (flat_pack(k) < packs) {
#pragma unroll
            for (int i = 0; i < lanes; ++i)
                held[k].at[i] = narrow<T>(widen(given[k].at[i]) * evaluate<kind>(widen(held[k].at[i])).slope);
            write(dx + flat_pack(k) * lanes, held[k]);
        }
}

// --- tables: columns stay with a thread, rows pass by --------------------------------------------------------------------

// The columns of a thread and the rows of its block; none where the table is narrower.
struct Place {
    int column;
    int64_t begin, end;
};
template <int lanes>
__device__ __forceinline__ Place place_of(int64_t rows, int width, int64_t rows_per_block) {
    const int column = (blockIdx.x * kTableThreads + threadIdx.x) * lanes;
    const int64_t begin = blockIdx.y * rows_per_block, end = begin + rows_per_block;
    return {column, begin, column < width ? (end < rows ? end : rows) : begin};
}
template <int lanes>
__device__ __forceinline__ void leave_sums(const float (&sums)[lanes], const Place& place, int width, float* partial) {
    if (place.column < width)
#pragma unroll
        for (int i = 0; i < lanes; ++i) partial[static_cast<int64_t>(blockIdx.y) * width + place.column + i] = sums[i];
}

// load(k, row) then use(k, row) for the rows of a place, `ahead` of them under way; k is a constant where loops are unrolled.
constexpr int kAhead = 4;
template <int ahead = kAhead, class Load, class Use>
__device__ __forceinline__ void each_row(const Place& place, Load&& load, Use&& use) {
    int64_t row = place.begin;
    for (; row + ahead <= place.end; row += ahead) {
#pragma unroll
        for (int k = 0; k < ahead; ++k) load(k, row + k);
#pragma unroll
        for (int k = 0; k < ahead; ++k) use(k, row + k);
    }
    for (; row < place.end; ++row) load(0, row), use(0, row);
}

template <class T, int lanes, int kind>
__global__ void __launch_bounds__(kTableThreads, 2)
    forward_bias(const T* x, const T* bias, T* y, int64_t rows, int width, int64_t rows_per_block) {
    const Place place = place_of<lanes>(rows, width, rows_per_block);
    Pack<T, lanes> added{};
    if (place.begin < place.end) added = read<T, lanes>(bias + place.column);
    Pack<T, lanes> held[kAhead];
    each_row(
        place, [&](int k, int64_t row) { held[k] = read<T, lanes>(x + row * width + place.column); },
        [&](int k, int64_t row) {
#pragma unroll
            for (int i = 0; i < lanes; ++i)
                held[k].at[i] = narrow<T>(evaluate<kind>(widen(held[k].at[i]) + widen(added.at[i])).value);
            write(y + row * width + place.column, held[k]);
        });
}

template <class T, int lanes, int kind>
__global__ void __launch_bounds__(kTableThreads, 2) backward_bias(const T* dy, const T* x, const T* bias, T* dx, float* partial,
                                                               int64_t rows, int width, int64_t rows_per_block) {
    const Place place = place_of<lanes>(rows, width, rows_per_block);
    Pack<T, lanes> added{};
    float sums[lanes] = {};
    if (place.begin < place.end) added = read<T, lanes>(bias + place.column);
    Pack<T, lanes> given[kAhead], held[kAhead];
    each_row(
        place,
        [&](int k, int64_t row) {
            given[k] = read<T, lanes>(dy + row * width + place.column);
            held[k] = read<T, lanes>(x + row * width + place.column);
        },
        [&](int k, int64_t row) {
#pragma unroll
            for (int i = 0; i < lanes; ++i) {
                const float gradient = widen(given[k].at[i]) * evaluate<kind>(widen(held[k].at[i]) + widen(added.at[i])).slope;
                held[k].at[i] = narrow<T>(gradient);
                sums[i] += gradient;
            }
            write(dx + row * width + place.column, held[k]);
        });
    leave_sums(sums, place, width, partial);
}

// --- gated units: rows of gate and up may be the halves of one product ----------------------------------------------------

template <class T, int lanes, int kind>
__global__ void __launch_bounds__(kTableThreads, 2) gated_forward(const T* gate, const T* up, T* y, int64_t rows, int width,
                                                               int64_t gate_stride, int64_t up_stride, int64_t rows_per_block) {
    const Place place = place_of<lanes>(rows, width, rows_per_block);
    Pack<T, lanes> g[kAhead], u[kAhead];
    each_row(
        place,
        [&](int k, int64_t row) {
            g[k] = read<T, lanes>(gate + row * gate_stride + place.column);
            u[k] = read<T, lanes>(up + row * up_stride + place.column);
        },
        [&](int k, int64_t row) {
#pragma unroll
            for (int i = 0; i < lanes; ++i)
                g[k].at[i] = narrow<T>(evaluate<kind>(widen(g[k].at[i])).value * widen(u[k].at[i]));
            write(y + row * width + place.column, g[k]);
        });
}

template <class T, int lanes, int kind>
__global__ void __launch_bounds__(kTableThreads, 2)
    gated_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t rows, int width, int64_t gate_stride,
                   int64_t up_stride, int64_t gradient_stride, int64_t rows_per_block) {
    const Place place = place_of<lanes>(rows, width, rows_per_block);
    constexpr int ahead = kAhead / 2;  // of three tensors
    Pack<T, lanes> given[ahead], g[ahead], u[ahead];
    each_row<ahead>(
        place,
        [&](int k, int64_t row) {
            given[k] = read<T, lanes>(dy + row * width + place.column);
            g[k] = read<T, lanes>(gate + row * gate_stride + place.column);
            u[k] = read<T, lanes>(up + row * up_stride + place.column);
        },
        [&](int k, int64_t row) {
#pragma unroll
            for (int i = 0; i < lanes; ++i) {
                const float d = widen(given[k].at[i]);
                const ValueAndSlope at = evaluate<kind>(widen(g[k].at[i]));
                g[k].at[i] = narrow<T>(d * widen(u[k].at[i]) * at.slope);
                u[k].at[i] = narrow<T>(d * at.value);
            }
            write(dgate + row * gradient_stride + place.column, g[k]);
            write(dup + row * gradient_stride + place.column, u[k]);
        });
}

// --- dropout --------------------------------------------------------------------------------------------------------------

// Which decision belongs to which element: rows are (sample, position), batch major.
struct Decisions {
    const int64_t *sample_ids, *positions;
    int64_t position_stride, length, first_feature;
    uint32_t key_first, key_second, threshold;
    float scale;

    // Those of the eight features from 8 * block on, of a row.
    __device__ __forceinline__ Words of(int64_t row, int64_t block) const {
        const int64_t sample = row / length, position = positions[sample * position_stride + row % length];
        return philox(feature_counter(sample_ids[sample], position, block), key_first, key_second);
    }
    // An element is multiplied by the scale or by zero, so that what is not finite stays so. Never fused with a sum: the bits are
    // the CPU's.
    __device__ __forceinline__ float dropped(float x, const Words& words, int i) const {
        return __fmul_rn(x, is_kept(words, i, threshold) ? scale : 0.0f);
    }
};

// The `lanes` columns of a thread have their decisions in one call. With `partial` the results are summed, as gradients of a bias.
template <class T, int lanes>
__global__ void __launch_bounds__(kTableThreads, 2) dropout_rows(const Decisions decide, const T* x, const T* bias, const T* residual,
                                                              T* y, float* partial, int64_t rows, int width, int64_t rows_per_block) {
    const Place place = place_of<lanes>(rows, width, rows_per_block);
    const int64_t feature = decide.first_feature + place.column;
    const int skipped = static_cast<int>(feature % kDecisionsPerCall);
    Pack<T, lanes> added{};
    float sums[lanes] = {};
    if (bias && place.begin < place.end) added = read<T, lanes>(bias + place.column);
    Pack<T, lanes> held[kAhead], more[kAhead] = {};
    each_row(
        place,
        [&](int k, int64_t row) {
            held[k] = read<T, lanes>(x + row * width + place.column);
            if (residual) more[k] = read<T, lanes>(residual + row * width + place.column);
        },
        [&](int k, int64_t row) {
            const Words words = from_decision<lanes>(decide.of(row, feature / kDecisionsPerCall), skipped);
#pragma unroll
            for (int i = 0; i < lanes; ++i) {
                float value = widen(held[k].at[i]);
                if (bias) value = __fadd_rn(value, widen(added.at[i]));
                value = decide.dropped(value, words, i);
                if (residual) value = __fadd_rn(value, widen(more[k].at[i]));
                held[k].at[i] = narrow<T>(value);
                sums[i] += value;
            }
            write(y + row * width + place.column, held[k]);
        });
    if (partial) leave_sums(sums, place, width, partial);
}

// keep (rows, width) bytes, a thread for each call.
__global__ void __launch_bounds__(kFlatThreads) keep_rows(const Decisions decide, uint8_t* keep, int64_t rows, int width) {
    const int64_t skipped = decide.first_feature % kDecisionsPerCall, first_block = decide.first_feature / kDecisionsPerCall;
    const int64_t calls = ceil_div(skipped + width, kDecisionsPerCall);
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x; n < rows * calls;
         n += static_cast<int64_t>(gridDim.x) * kFlatThreads) {
        const int64_t row = n / calls, block = n % calls;
        const Words words = decide.of(row, first_block + block);
#pragma unroll
        for (int i = 0; i < kDecisionsPerCall; ++i) {
            const int64_t column = block * kDecisionsPerCall + i - skipped;
            if (column >= 0 && column < width) keep[row * width + column] = is_kept(words, i, decide.threshold);
        }
    }
}

inline float kept_scale(uint32_t threshold) { return static_cast<float>(65536.0 / (65536.0 - threshold)); }

// Columns of a thread must have their decisions in one call: packs do where features begin at multiples of their size.
template <class T, class F>
void with_decisions(int64_t first_feature, int64_t width, std::initializer_list<Address> tensors, F&& f) {
    first_feature % kLanes<T> == 0 ? with_lanes<T>(width, tensors, f) : f(std::integral_constant<int, 1>());
}

}  // namespace

void activation_forward(int dtype, int kind, Address x, Address bias, Address y, int64_t rows, int64_t width, Address stream) {
    const int64_t total = rows * width;
    if (total == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        with_lanes<T>(bias ? width : total, {x, bias, y}, [&](auto lanes) {
            with_kind(kind, [&](auto k) {
                if (!bias) {
                    forward_flat<T, lanes(), k()>
                        <<<flat_blocks(total / lanes()), kFlatThreads, 0, on>>>((const T*)x, (T*)y, total / lanes());
                    return;
                }
                const TablePlan plan = table_plan(rows, width, lanes(), multiprocessors());
                forward_bias<T, lanes(), k()><<<dim3(plan.column_blocks, plan.row_blocks), kTableThreads, 0, on>>>(
                    (const T*)x, (const T*)bias, (T*)y, rows, static_cast<int>(width), plan.rows_per_block);
            });
        });
        check_launch("activation_forward");
    });
}

int64_t activation_backward_workspace(int64_t rows, int64_t width) { return table_workspace(rows, width); }

void activation_backward(int dtype, int kind, Address dy, Address x, Address bias, Address dx, Address dbias, int64_t rows,
                         int64_t width, Address workspace, Address stream) {
    const int64_t total = rows * width;
    if (width == 0 || (total == 0 && !bias)) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        with_lanes<T>(bias ? width : total, {dy, x, bias, dx}, [&](auto lanes) {
            with_kind(kind, [&](auto k) {
                if (!bias) {
                    backward_flat<T, lanes(), k()><<<flat_blocks(total / lanes()), kFlatThreads, 0, on>>>(
                        (const T*)dy, (const T*)x, (T*)dx, total / lanes());
                    return;
                }
                const TablePlan plan = table_plan(rows, width, lanes(), multiprocessors());
                backward_bias<T, lanes(), k()><<<dim3(plan.column_blocks, plan.row_blocks), kTableThreads, 0, on>>>(
                    (const T*)dy, (const T*)x, (const T*)bias, (T*)dx, (float*)workspace, rows, static_cast<int>(width),
                    plan.rows_per_block);
                add_partials<T>((const float*)workspace, plan.row_blocks, static_cast<int>(width), (T*)dbias, nullptr, on);
            });
        });
        check_launch("activation_backward");
    });
}

void glu_forward(int dtype, int kind, Address gate, Address up, Address y, int64_t rows, int64_t width, int64_t gate_stride,
                 int64_t up_stride, Address stream) {
    if (rows * width == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool strides_fit = gate_stride % kLanes<T> == 0 && up_stride % kLanes<T> == 0;
        with_lanes<T>(strides_fit ? width : 1, {gate, up, y}, [&](auto lanes) {
            const TablePlan plan = table_plan(rows, width, lanes(), multiprocessors());
            with_kind(kind, [&](auto k) {
                gated_forward<T, lanes(), k()>
                    <<<dim3(plan.column_blocks, plan.row_blocks), kTableThreads, 0, (cudaStream_t)stream>>>(
                        (const T*)gate, (const T*)up, (T*)y, rows, static_cast<int>(width), gate_stride, up_stride,
                        plan.rows_per_block);
            });
        });
        check_launch("glu_forward");
    });
}

void glu_backward(int dtype, int kind, Address dy, Address gate, Address up, Address dgate, Address dup, int64_t rows,
                  int64_t width, int64_t gate_stride, int64_t up_stride, int64_t gradient_stride, Address stream) {
    if (rows * width == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool strides_fit = gate_stride % kLanes<T> == 0 && up_stride % kLanes<T> == 0 && gradient_stride % kLanes<T> == 0;
        with_lanes<T>(strides_fit ? width : 1, {dy, gate, up, dgate, dup}, [&](auto lanes) {
            const TablePlan plan = table_plan(rows, width, lanes(), multiprocessors());
            with_kind(kind, [&](auto k) {
                gated_backward<T, lanes(), k()>
                    <<<dim3(plan.column_blocks, plan.row_blocks), kTableThreads, 0, (cudaStream_t)stream>>>(
                        (const T*)dy, (const T*)gate, (const T*)up, (T*)dgate, (T*)dup, rows, static_cast<int>(width),
                        gate_stride, up_stride, gradient_stride, plan.rows_per_block);
            });
        });
        check_launch("glu_backward");
    });
}

void dropout_forward(int dtype, Address x, Address bias, Address residual, Address y, Address sample_ids, Address positions,
                     int64_t position_stride, int64_t batch, int64_t length, int64_t width, int64_t first_feature,
                     uint32_t key_first, uint32_t key_second, uint32_t threshold, Address stream) {
    const int64_t rows = batch * length;
    if (rows * width == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const Decisions decide{(const int64_t*)sample_ids, (const int64_t*)positions, position_stride, length, first_feature,
                               key_first, key_second, threshold, kept_scale(threshold)};
        with_decisions<T>(first_feature, width, {x, bias, residual, y}, [&](auto lanes) {
            const TablePlan plan = table_plan(rows, width, lanes(), multiprocessors());
            dropout_rows<T, lanes()><<<dim3(plan.column_blocks, plan.row_blocks), kTableThreads, 0, (cudaStream_t)stream>>>(
                decide, (const T*)x, (const T*)bias, (const T*)residual, (T*)y, nullptr, rows, static_cast<int>(width),
                plan.rows_per_block);
        });
        check_launch("dropout_forward");
    });
}

int64_t dropout_bias_backward_workspace(int64_t rows, int64_t width) { return table_workspace(rows, width); }

void dropout_bias_backward(int dtype, Address dy, Address dx, Address dbias, Address sample_ids, Address positions,
                           int64_t position_stride, int64_t batch, int64_t length, int64_t width, int64_t first_feature,
                           uint32_t key_first, uint32_t key_second, uint32_t threshold, Address workspace, Address stream) {
    const int64_t rows = batch * length;
    if (width == 0) return;
    with_device_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto on = (cudaStream_t)stream;
        const Decisions decide{(const int64_t*)sample_ids, (const int64_t*)positions, position_stride, length, first_feature,
                               key_first, key_second, threshold, kept_scale(threshold)};
        with_decisions<T>(first_feature, width, {dy, dx}, [&](auto lanes) {
            const TablePlan plan = table_plan(rows, width, lanes(), multiprocessors());
            dropout_rows<T, lanes()><<<dim3(plan.column_blocks, plan.row_blocks), kTableThreads, 0, on>>>(
                decide, (const T*)dy, nullptr, nullptr, (T*)dx, (float*)workspace, rows, static_cast<int>(width),
                plan.rows_per_block);
            add_partials<T>((const float*)workspace, plan.row_blocks, static_cast<int>(width), (T*)dbias, nullptr, on);
        });
        check_launch("dropout_bias_backward");
    });
}

void dropout_keep(Address keep, Address sample_ids, Address positions, int64_t position_stride, int64_t batch, int64_t length,
                  int64_t width, int64_t first_feature, uint32_t key_first, uint32_t key_second, uint32_t threshold,
                  Address stream) {
    const int64_t rows = batch * length;
    if (rows * width == 0) return;
    const Decisions decide{(const int64_t*)sample_ids, (const int64_t*)positions, position_stride, length, first_feature,
                           key_first, key_second, threshold, 1.0f};
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(rows * ceil_div(width + 7, 8), kFlatThreads), 1 << 16));
    keep_rows<<<blocks, kFlatThreads, 0, (cudaStream_t)stream>>>(decide, (uint8_t*)keep, rows, static_cast<int>(width));
    check_launch("dropout_keep");
}

}  // namespace trilith::cuda
