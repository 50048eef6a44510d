// Dropout from the layout-invariant stream, alone or with a bias before it and the residual's sum behind it.
//
// No mask exists: the numbers of a row are made in the cache, a thousand at a time, and backward makes them again. So
// forward moves one row in (two with a residual) and one out, backward one in and one out. An element is multiplied by the
// scale or by zero, as torch does, so that what is not finite stays so. Compiled without fused multiply-adds: the results are
// the same bits on every instruction set.
#include <cstdlib>
#include <memory>

#include "common/parallel.h"
#include "common/philox.h"
#include "common/rows.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

namespace {

constexpr int64_t kChunk = 1024;            // decisions at once

// Which decision belongs to which element: rows are (sample, position), batch major.
struct Tokens {
    const int64_t *sample_ids, *positions;
    int64_t position_stride, length, width, first_feature;
};

// Calls f(first element, numbers, elements) for pieces of row `row`; numbers is readable up to a whole register.
template <class F>
void for_decisions(const PhiloxRow& counters, const PhiloxKey& key, int64_t first, int64_t width, F&& f) {
    alignas(64) uint16_t numbers[kChunk + kDecisionStep];
    constexpr int64_t most_lanes = kLanes<uint16_t>;  // a whole register can be read at the end
    static_assert(kDecisionsPerCall - 1 + most_lanes <= kDecisionStep);
    for (int64_t i = 0; i < width; i += kChunk) {
        const int64_t count = std::min(kChunk, width - i), skipped = (first + i) % kDecisionsPerCall;
        const int64_t whole = (count + most_lanes - 1) / most_lanes * most_lanes;
        decision_numbers(counters, key, (first + i) / kDecisionsPerCall, skipped + whole, numbers);
        f(i, numbers + skipped, count);
    }
}
template <class F>
void for_decisions(const Tokens& tokens, const PhiloxKey& key, int64_t row, F&& f) {
    const int64_t sample = row / tokens.length, place = row % tokens.length;
    const PhiloxRow counters = feature_decisions(
        tokens.sample_ids[sample], tokens.positions[sample * tokens.position_stride + place], key);
    for_decisions(counters, key, tokens.first_feature, tokens.width, f);
}

// The factors of a register's elements: the scale where kept, zero elsewhere.
template <class A>
inline Vec<A> factors(const uint16_t* numbers, uint32_t threshold, A scale) {
    return kept<A>(numbers, threshold) ? fill(scale) : Vec<A>{};
}

// A row of bytes: 1 where kept.
void keep_row(const uint16_t* numbers, uint32_t threshold, int64_t count, uint8_t* keep) {
    using shorts = Vec<uint16_t>;
    using bytes = VecOf<uint8_t, kBytes / 2>::type;
    constexpr int64_t step = kLanes<uint16_t>;
    for (int64_t i = 0; i < count; i += step) {
        shorts x;
        std::memcpy(&x, numbers + i, sizeof x);
        bytes result = __builtin_convertvector((shorts)(x >= static_cast<uint16_t>(threshold)), bytes) & uint8_t(1);
        std::memcpy(keep + i, &result, static_cast<size_t>(std::min(step, count - i)));
    }
}

// Fewer decisions than this are faster on one thread.
int threads_for(int threads, int64_t decisions) { return useful_threads(threads, decisions * 4); }

}  // namespace

void dropout_forward(int dtype, Address x, Address bias, Address residual, Address y, Address sample_ids,
                     Address positions, int64_t position_stride, int64_t batch, int64_t length, int64_t width,
                     int64_t first_feature, uint32_t key_first, uint32_t key_second, uint32_t threshold, int threads) {
    const Tokens tokens{(const int64_t*)sample_ids, (const int64_t*)positions, position_stride, length, width, first_feature};
    const DropoutStream stream_of = dropout_stream(key_first, key_second, threshold);
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const A scale = static_cast<A>(stream_of.scale);
        const int64_t rows = batch * length;
        const bool streamed = is_streamed((T*)y, rows * width, width);
        auto row_of = [&](int64_t row, auto&& put) {
            const T* from = (const T*)x + row * width;
            const T* sum = residual ? (const T*)residual + row * width : nullptr;
            T* to = (T*)y + row * width;
            for_decisions(tokens, stream_of.key, row, [&](int64_t at, const uint16_t* numbers, int64_t count) {
                auto value = [&](int64_t i, int64_t lanes) {
                    Vec<A> v = load_some(from + at + i, lanes);
                    if (bias) v += load_some((const T*)bias + at + i, lanes);
                    return v * factors(numbers + i, threshold, scale);
                };
                if (sum)
                    each_register<A>(count, [&](int64_t i, int64_t lanes) {
                        put(to + at + i, value(i, lanes) + load_some(sum + at + i, lanes), lanes);
                    });
                else
                    each_register<A>(count, [&](int64_t i, int64_t lanes) { put(to + at + i, value(i, lanes), lanes); });
            });
        };
        for_each_piece(rows, threads_for(threads, rows * width), 1, [&](int64_t begin, int64_t end) {
            with_store<T>(streamed, [&](auto put) {
                for (int64_t row = begin; row < end; ++row) row_of(row, put);
            });
        });
    });
}

void dropout_bias_backward(int dtype, Address dy, Address dx, Address dbias, Address sample_ids, Address positions,
                           int64_t position_stride, int64_t batch, int64_t length, int64_t width, int64_t first_feature,
                           uint32_t key_first, uint32_t key_second, uint32_t threshold, int threads) {
    const Tokens tokens{(const int64_t*)sample_ids, (const int64_t*)positions, position_stride, length, width, first_feature};
    const DropoutStream stream_of = dropout_stream(key_first, key_second, threshold);
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const A scale = static_cast<A>(stream_of.scale);
        const int64_t rows = batch * length, parts = row_parts(rows);
        std::unique_ptr<A, void (*)(void*)> partial((A*)std::calloc(parts * width, sizeof(A)), std::free);
        const int used = threads_for(threads, rows * width);
        for_each_part(parts, used, [&](int64_t part) {
            A* total = partial.get() + part * width;
            const Range range = part_of(rows, parts, part);
            for (int64_t row = range.begin; row < range.end; ++row) {
                const T* from = (const T*)dy + row * width;
                T* to = (T*)dx + row * width;
                for_decisions(tokens, stream_of.key, row, [&](int64_t at, const uint16_t* numbers, int64_t count) {
                    each_register<A>(count, [&](int64_t i, int64_t lanes) {
                        Vec<A> v = load_some(from + at + i, lanes) * factors(numbers + i, threshold, scale);
                        store_some(to + at + i, v, lanes);
                        store_some(total + at + i, load_some(total + at + i, lanes) + v, lanes);
                    });
                });
            }
        });
        each_register<A>(width, [&](int64_t i, int64_t lanes) {
            Vec<A> total{};
            for (int64_t part = 0; part < parts; ++part) total += load_some(partial.get() + part * width + i, lanes);
            store_some((T*)dbias + i, total, lanes);
        });
    });
}

void dropout_keep(Address keep, Address sample_ids, Address positions, int64_t position_stride, int64_t batch,
                  int64_t length, int64_t width, int64_t first_feature, uint32_t key_first, uint32_t key_second,
                  uint32_t threshold, int threads) {
    const Tokens tokens{(const int64_t*)sample_ids, (const int64_t*)positions, position_stride, length, width, first_feature};
    const PhiloxKey key = philox_key(key_first, key_second);
    const int64_t rows = batch * length;
    for_each_piece(rows, threads_for(threads, rows * width), 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            for_decisions(tokens, key, row, [&](int64_t at, const uint16_t* numbers, int64_t count) {
                keep_row(numbers, threshold, count, (uint8_t*)keep + row * width + at);
            });
    });
}

void attention_keep(Address keep, Address sample_ids, Address queries, int64_t batch, int64_t heads,
                    int64_t num_queries, int64_t num_keys, int64_t first_head, int64_t first_key, uint32_t key_first,
                    uint32_t key_second, uint32_t threshold, int threads) {
    const PhiloxKey key = philox_key(key_first, key_second);
    const int64_t rows = batch * heads * num_queries;
    for_each_piece(rows, threads_for(threads, rows * num_keys), 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t sample = row / (heads * num_queries), head = row / num_queries % heads;
            const PhiloxRow counters = key_decisions(((const int64_t*)sample_ids)[sample], first_head + head,
                                                     ((const int64_t*)queries)[row % num_queries], key);
            for_decisions(counters, key, first_key, num_keys, [&](int64_t at, const uint16_t* numbers, int64_t count) {
                keep_row(numbers, threshold, count, (uint8_t*)keep + row * num_keys + at);
            });
        }
    });
}

}  // namespace trilith::TRILITH_ISA
