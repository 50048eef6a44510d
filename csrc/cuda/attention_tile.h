// What the attention kernels of the Ampere path share: tiles in shared memory, factors of products, the tiles that are visited, and
// what the rule does to a score. Rows of a warp are queries here; the backward of keys has its own (attention_backward_keys.cu).
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/mma.h"
#include "cuda/philox.h"
#include "cuda/plan.h"

namespace trilith::cuda {

constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A tensor (batch, sequence, head, D).
template <class T>
struct HeadTensor {
    T* base;
    HeadStrides strides;
    __device__ __forceinline__ T* at(int64_t batch, int64_t head) const { return base + batch * strides.batch + head * strides.head; }
};

// --- tiles --------------------------------------------------------------------------------------------------------------

// Begins to copy rows [from, from + rows) of a head into shared memory, zeros behind row `end` and behind the last feature.
template <int kFeatures, int rows, class T>
__device__ __forceinline__ void begin_tile(T* shared, const T* base, int64_t stride, int from, int end, int features) {
    constexpr int kPacks = kFeatures / 8;
#pragma unroll
    for (int i = threadIdx.x; i < rows * kPacks; i += kAttentionThreads) {
        const int row = i / kPacks, pack = i % kPacks;
        const bool wanted = from + row < end && pack * 8 < features;
        copy_begin(shared + row * (kFeatures + 8) + pack * 8, base + (wanted ? (from + row) * stride + pack * 8 : 0), wanted);
    }
}

// The left factor of depth [16 step, 16 step + 16) from sixteen rows.
template <int stride, class T>
__device__ __forceinline__ void left_factor(uint32_t (&a)[4], const T* rows, int step) {
    const int lane = threadIdx.x % kWarp;
    load_matrices<false>(a, rows + (lane / 8 % 2 * 8 + lane % 8) * stride + step * 16 + lane / 16 * 8);
}
// Right factors of sixteen columns, which are rows in memory: those of the first eight, then of the others.
template <int stride, class T>
__device__ __forceinline__ void right_factors(uint32_t (&b)[4], const T* rows, int step) {
    const int lane = threadIdx.x % kWarp;
    load_matrices<false>(b, rows + (lane / 16 * 8 + lane % 8) * stride + step * 16 + lane / 8 % 2 * 8);
}
// The same of sixteen columns [column, column + 16), whose depth is sixteen rows in memory.
template <int stride, class T>
__device__ __forceinline__ void right_factors_across(uint32_t (&b)[4], const T* rows, int column) {
    const int lane = threadIdx.x % kWarp;
    load_matrices<true>(b, rows + (lane / 8 % 2 * 8 + lane % 8) * stride + column + lane / 16 * 8);
}

// s += A B over one step of the depth, B's columns being the rows of a tile.
template <int stride, int groups, class T>
__device__ __forceinline__ void multiply_rows(float (&s)[groups][4], const uint32_t (&a)[4], const T* tile, int step) {
#pragma unroll
    for (int j = 0; j < groups; j += 2) {
        uint32_t b[4];
        right_factors<stride>(b, tile + j * 8 * stride, step);
        multiply<T>(s[j], a, b[0], b[1]);
        multiply<T>(s[j + 1], a, b[2], b[3]);
    }
}

// o += P V for the features from `first` on: P's columns, rounded, are the depth, V's rows a tile.
template <int stride, int depth, int groups, class T>
__device__ __forceinline__ void multiply_columns(float (&o)[groups][4], const float (&p)[depth][4], const T* tile, int first) {
#pragma unroll
    for (int k = 0; k < depth; k += 2) {
        const uint32_t a[4] = {pack_pair<T>(p[k][0], p[k][1]), pack_pair<T>(p[k][2], p[k][3]), pack_pair<T>(p[k + 1][0], p[k + 1][1]),
                               pack_pair<T>(p[k + 1][2], p[k + 1][3])};
#pragma unroll
        for (int j = 0; j < groups; j += 2) {
            uint32_t b[4];
            right_factors_across<stride>(b, tile + k * 8 * stride, first + j * 8);
            multiply<T>(o[j], a, b[0], b[1]);
            multiply<T>(o[j + 1], a, b[2], b[3]);
        }
    }
}

template <int groups>
__device__ __forceinline__ void clear(float (&x)[groups][4]) {
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[j][i] = 0.0f;
}

// Writes one row's share of a result, times `factor`: pairs of neighbours from feature `first` on.
template <int groups, class T>
__device__ __forceinline__ void write_row(T* to, const float (&x)[groups][4], int half, float factor, int first, int features) {
#pragma unroll
    for (int j = 0; j < groups; ++j) {
        const int at = first + j * 8 + threadIdx.x % 4 * 2;
        if (at < features) *reinterpret_cast<uint32_t*>(to + at) = pack_pair<T>(x[j][2 * half] * factor, x[j][2 * half + 1] * factor);
    }
}

// --- what is visited ----------------------------------------------------------------------------------------------------

// The tiles of [0, count) that a block visits, in order. Each warp finds them for itself, one lane a tile.
struct Scan {
    int base, count;
    uint32_t found;
    __device__ explicit Scan(int count) : base(-kWarp), count(count), found(0) {}
    // The next tile for which f is true, `count` where there is none.
    template <class F>
    __device__ __forceinline__ int next(F&& is_visited) {
        while (!found) {
            base += kWarp;
            if (base >= count) return count;
            const int tile = base + threadIdx.x % kWarp;
            found = __ballot_sync(0xFFFFFFFFu, tile < count && is_visited(tile));
        }
        const int bit = __ffs(static_cast<int>(found)) - 1;
        found &= found - 1;
        return base + bit;
    }
};

// Which tiles of `width` keys a block of queries [first, end) visits.
struct KeyTiles {
    const AttentionRule& rule;
    const Hull& hull;  // of the queries
    int64_t batch, head;
    int first, end, num_keys, width;

    __device__ __forceinline__ int count() const { return static_cast<int>(ceil_div(num_keys, width)); }
    __device__ __forceinline__ bool operator()(int tile) const {
        const int from = tile * width, to = lesser(from + width, num_keys);
        return is_seen(hull, keys_of(rule, batch, from, to)) && is_live(rule, head, first, end, from, to);
    }
};

// The hull over the lanes of a warp.
__device__ __forceinline__ Hull warp_hull(Hull h) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const Hull other{__shfl_xor_sync(0xFFFFFFFFu, h.first_min, step), __shfl_xor_sync(0xFFFFFFFFu, h.first_max, step),
                         __shfl_xor_sync(0xFFFFFFFFu, h.last_min, step),  __shfl_xor_sync(0xFFFFFFFFu, h.last_max, step),
                         __shfl_xor_sync(0xFFFFFFFFu, h.begin_min, step), __shfl_xor_sync(0xFFFFFFFFu, h.begin_max, step),
                         __shfl_xor_sync(0xFFFFFFFFu, h.end_min, step),   __shfl_xor_sync(0xFFFFFFFFu, h.end_max, step)};
        h = join(h, other);
    }
    return h;
}

// The hull of a block, from those of its warps, which meet in shared memory: all threads call it.
__device__ __forceinline__ Hull block_hull(const Hull& of_warp, Hull (&hulls)[kAttentionWarps]) {
    if (threadIdx.x % kWarp == 0) hulls[threadIdx.x / kWarp] = of_warp;
    __syncthreads();
    Hull hull = hulls[0];
    for (int i = 1; i < kAttentionWarps; ++i) hull = join(hull, hulls[i]);
    return hull;
}

// --- the rule -----------------------------------------------------------------------------------------------------------

// Bit j: whether the eight keys from `from` + 8 j on are in live blocks of a strip of queries.
__device__ __forceinline__ uint32_t live_groups(const AttentionRule& rule, int64_t head, int row, int from, int groups, int num_keys) {
    if (!rule.live) return 0xFFFFFFFFu;
    const auto* live = (const uint8_t*)rule.live + head * rule.live_head_stride + row / rule.block * rule.live_columns;
    uint32_t bits = 0;
    for (int j = 0; j < groups; ++j)
        if (from + 8 * j < num_keys && live[(from + 8 * j) / rule.block]) bits |= 1u << j;
    return bits;
}

// Whether a strip of queries sees all of the groups of keys from `from` on, of which `live` are.
template <int groups>
__device__ __forceinline__ bool sees_whole(const AttentionRule& rule, const Hull& strip, int from, uint32_t live) {
    const Keys keys{from, from + 8 * groups, from, from + 8 * groups - 1};
    return !rule.key_positions && is_seen_whole(strip, keys) && (!rule.live || live == (1u << groups) - 1);
}

__device__ __forceinline__ bool sees(const Row& row, int position, int place) {
    return position >= row.first && position <= row.last && place >= row.begin && place < row.end;
}

// ALiBi's slope of a head, in units of the scores before their scale.
__device__ __forceinline__ float slope_of(const AttentionRule& rule, int64_t head, float scale) {
    return rule.slopes ? static_cast<float>(((const double*)rule.slopes)[head]) / scale : 0.0f;
}

// Adds ALiBi's part, in units of the scores before their scale, and hides what is not seen, in a strip of scores. `live`: which
// groups of eight keys are. Nothing is hidden where the strip sees the tile `whole`.
template <int groups>
__device__ __forceinline__ void rule_scores(float (&s)[groups][4], const AttentionRule& rule, int64_t batch, const Row (&rows)[2],
                                            int from, int num_keys, float slope, bool whole, uint32_t live) {
    if (whole && slope == 0.0f) return;
#pragma unroll
    for (int j = 0; j < groups; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = from + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
            const int position =
                place < num_keys ? position_of(rule.key_positions, rule.key_position_stride, batch, place) : kLastPlace;
            const Row& row = rows[i / 2];
            s[j][i] += slope * static_cast<float>(position - row.position);
            if (!whole && !((live >> j & 1u) && sees(row, position, place))) s[j][i] = -INFINITY;
        }
    }
}

// Scores of a strip become weights relative to its rows' largest scores so far, which may grow; `factor`: by what sums and outputs
// so far shrink then. The totals are those of the thread's own columns.
template <int groups>
__device__ __forceinline__ void soften(float (&s)[groups][4], float (&most)[2], float (&total)[2], float scale, float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float now = most[half];
#pragma unroll
        for (int j = 0; j < groups; ++j) now = fmaxf(now, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFFu, now, 1));
        now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFFu, now, 2));
        const float shift = now == -INFINITY ? 0.0f : now * scale;  // nothing was seen: all weights are zero
        factor[half] = exp2_fast(most[half] * scale - shift);
        most[half] = now;
        total[half] *= factor[half];
#pragma unroll
        for (int j = 0; j < groups; ++j)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                s[j][i] = exp2_fast(s[j][i] * scale - shift);
                total[half] += s[j][i];
            }
    }
}
template <int groups>
__device__ __forceinline__ void shrink(float (&out)[groups][4], const float (&factor)[2]) {
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[j][i] *= factor[i / 2];
}

// Multiplies what dropout keeps of a strip of weights (or gradients of weights) by its factor, and takes the rest out.
template <int groups>
__device__ __forceinline__ void drop(float (&p)[groups][4], const AttentionRule& rule, int64_t batch, int64_t head,
                                     const Row (&rows)[2], int from, int num_keys) {
    const int64_t sample = ((const int64_t*)rule.sample_ids)[batch];
    const float factor = 65536.0f / static_cast<float>(65536 - rule.dropout_threshold);
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = from + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
            const int position = place < num_keys ? position_of(rule.key_positions, rule.key_position_stride, batch, place) : 0;
            const Words words = philox(key_counter(sample, rule.first_head + head, rows[i / 2].position, position / kDecisionsPerCall),
                                       rule.key_first, rule.key_second);
            const bool kept = is_kept(from_decision<1>(words, position % kDecisionsPerCall), 0, rule.dropout_threshold);
            p[j][i] = kept ? p[j][i] * factor : 0.0f;
        }
}

// --- launches -----------------------------------------------------------------------------------------------------------

// Calls f(Tag<T>(), constant of the padded features).
template <class F>
void with_attention_kernel(int dtype, int64_t features, F&& f) {
    const auto of_type = [&](auto tag) {
        switch (padded_features(features)) {
            case 64: f(tag, std::integral_constant<int, 64>()); break;
            case 96: f(tag, std::integral_constant<int, 96>()); break;
            case 128: f(tag, std::integral_constant<int, 128>()); break;
            case 256: f(tag, std::integral_constant<int, 256>()); break;
            default: throw std::invalid_argument("attention on CUDA takes heads of a multiple of 8 features, 256 at most");
        }
    };
    switch (static_cast<DType>(dtype)) {
        case DType::bf16: of_type(Tag<__nv_bfloat16>()); break;
#ifndef TRILITH_NO_F16
        case DType::f16: of_type(Tag<__half>()); break;
#endif
        default: throw std::invalid_argument("attention on CUDA takes bf16 and fp16");
    }
}

template <class... Parameters, class... Arguments>
void launch_attention(void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, Address stream, const char* what,
                      const Arguments&... arguments) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
    kernel<<<grid, threads, static_cast<size_t>(bytes), (cudaStream_t)stream>>>(arguments...);
    check_launch(what);
}

}  // namespace trilith::cuda
