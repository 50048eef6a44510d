// Normal numbers of the elements of a canonical tensor: the initialisation of weights.
//
// engine/trilith/kernels/stream.py is the specification; this agrees with it bit for bit on every instruction set, because
// each operation is one of +, -, * and / of doubles, in the written order, and this file is compiled without fused
// multiply-adds. Elements go through the cache in chunks: all take the middle branch of AS 241 in whole registers; the
// 15 % that belong to the tails are listed, and take theirs in whole registers, too.
#include <algorithm>

#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kBytesOfNormal = 32;  // a number costs the time of about so many bytes

constexpr double kA[] = {59.109374720, 159.29113202, 50.434271938, 3.3871327179};
constexpr double kB[] = {67.187563600, 78.757757664, 17.895169469, 1.0};
constexpr double kC[] = {0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777};
constexpr double kD[] = {0.12021132975, 0.73700164250, 1.0};
constexpr double kG[] = {2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0};
constexpr double kMiddle = 0.425;
constexpr int64_t kSqrtHalfBits = 0x3FE6A09E667F3BCD;

template <int count>
inline vd polynomial(vd x, const double (&coefficients)[count]) {
    vd value = x * coefficients[0];
    for (int i = 1; i + 1 < count; ++i) value = (value + coefficients[i]) * x;
    return value + coefficients[count - 1];
}

// ln of positive normal numbers near 1 or below.
inline vd log_of(vd v) {
    vl bits = (vl)v, exponent = (bits - kSqrtHalfBits) >> 52;
    vd mantissa = (vd)(bits - (exponent << 52));
    vd s = (mantissa - 1.0) / (mantissa + 1.0);
    // A small integer as a double, without the conversion that AVX2 lacks.
    vd whole = (vd)(exponent + 0x4338000000000000) - 0x1.8p52;
    return whole * 0x1.62e42fefa39efp-1 + polynomial(s * s, kG) * s;
}

inline vd root_of(vd x) {
    vd guess = x * 0.1674 + 1.289;
    for (int i = 0; i < 3; ++i) guess = (x / guess + guess) * 0.5;
    return guess;
}

// q = u - 0.5 of 32-bit words; exact.
inline vd centred(const uint32_t* words) {
    VecOf<uint32_t, kBytes / 2>::type narrow;
    std::memcpy(&narrow, words, sizeof narrow);
    vl wide = __builtin_convertvector(narrow, vl);
    return ((vd)(wide + 0x4330000000000000) - (0x1p52 + 0x1p31) + 0.5) * 0x1p-32;
}

// One chunk's room.
struct Chunk {
    alignas(64) uint32_t words[kChunk + 8 * kLanes<uint64_t>];
    alignas(64) double q[kChunk + kLanes<double>], z[kChunk + kLanes<double>];
    alignas(64) double far[kChunk + kLanes<double>];
    alignas(64) float narrow[kChunk + kLanes<float>];
    int32_t tail[kChunk + kLanes<double>];
};

// z of elements [first, first + count) of the canonical tensor, count <= kChunk.
void normal_chunk(uint64_t first, int64_t count, const PhiloxKey& key, double deviation, Chunk& chunk) {
    constexpr int64_t lanes = kLanes<double>;
    const int64_t skipped = static_cast<int64_t>(first % 4), made = skipped + count;
    vw blocks = lane_counters() + first / 4;
    for (int64_t i = 0; i < made; i += 4 * kLanes<uint64_t>) {
        store_words(chunk.words + i, philox(blocks, blocks >> 32, vw{}, vw{}, key));
        blocks += static_cast<uint64_t>(kLanes<uint64_t>);
    }
    int64_t tails = 0;
    for (int64_t i = 0; i < count; i += lanes) {
        vd q = centred(chunk.words + skipped + i);
        vd r = 0.180625 - q * q;
        store(chunk.q + i, q);
        store(chunk.z + i, (polynomial(r, kA) * q / polynomial(r, kB)) * deviation);
        vl outside = (q < 0.0 ? -q : q) > kMiddle;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            chunk.tail[tails] = static_cast<int32_t>(i + lane);
            tails -= outside[lane];
        }
    }
    for (int64_t i = 0; i < tails; ++i) chunk.far[i] = chunk.q[chunk.tail[i]];
    for (int64_t i = tails; i < tails + lanes; ++i) chunk.far[i] = 0.49;
    for (int64_t i = 0; i < tails; i += lanes) {
        vd q = load(chunk.far + i);
        vd t = root_of(-log_of(0.5 - (q < 0.0 ? -q : q))) - 1.6;
        vd z = polynomial(t, kC) / polynomial(t, kD);
        store(chunk.far + i, (q < 0.0 ? -z : z) * deviation);
    }
    for (int64_t i = 0; i < tails; ++i) chunk.z[chunk.tail[i]] = chunk.far[i];
}

void write(double* out, Chunk& chunk, int64_t count) { std::copy_n(chunk.z, count, out); }
// Sixteen bits are rounded from fp32, as low-precision weights are from their master weights.
template <class T>
void write(T* out, Chunk& chunk, int64_t count) {
    for (int64_t i = 0; i < count; ++i) chunk.narrow[i] = static_cast<float>(chunk.z[i]);
    each_register<float>(count, [&](int64_t i, int64_t lanes) { store_some(out + i, load(chunk.narrow + i), lanes); });
}

}  // namespace

void fill_normal(int dtype, Address out, int64_t runs, int64_t run, int64_t first, Address extents, Address strides,
                 int64_t dims, uint32_t key_first, uint32_t key_second, double deviation, int threads) {
    const PhiloxKey key = philox_key(key_first, key_second);
    auto start_of = [&](int64_t index) {
        int64_t start = first;
        for (int64_t dim = dims - 1; dim >= 0; --dim) {
            const int64_t extent = ((const int64_t*)extents)[dim];
            start += index % extent * ((const int64_t*)strides)[dim];
            index /= extent;
        }
        return start;
    };
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        const int64_t total = runs * run;
        for_each_piece(total, useful_threads(threads, total * kBytesOfNormal), 4, [&](int64_t begin, int64_t end) {
            Chunk chunk;
            while (begin < end) {
                const int64_t column = begin % run, count = std::min({end - begin, run - column, kChunk});
                normal_chunk(static_cast<uint64_t>(start_of(begin / run) + column), count, key, deviation, chunk);
                write((T*)out + begin, chunk, count);
                begin += count;
            }
        });
    });
}

}  // namespace trilith::TRILITH_ISA
