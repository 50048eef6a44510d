// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) and the decisions of dropout made from it, as engine/trilith/kernels/stream.py
// specifies them, bit for bit: eight neighbours (features or keys) share a call, sixteen bits each, in the order of memory.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TRILITH_BOTH __host__ __device__ __forceinline__
#else
#define TRILITH_BOTH inline
#endif

namespace trilith::cuda {

constexpr int kPhiloxRounds = 10, kDecisionsPerCall = 8;

struct Words {
    uint32_t at[4];
};

TRILITH_BOTH Words philox(Words counter, uint32_t first, uint32_t second) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * counter.at[0], b = uint64_t(0xCD9E8D57u) * counter.at[2];
        counter = {{uint32_t(b >> 32) ^ counter.at[1] ^ first, uint32_t(b), uint32_t(a >> 32) ^ counter.at[3] ^ second, uint32_t(a)}};
        first += 0x9E3779B9u, second += 0xBB67AE85u;
    }
    return counter;
}

// What eight features share, of one token.
TRILITH_BOTH Words feature_counter(int64_t sample, int64_t position, int64_t block) {
    return {{uint32_t(uint64_t(sample) >> 32), uint32_t(position), uint32_t(sample), uint32_t(block)}};
}

// What eight keys share, of one query of one head.
TRILITH_BOTH Words key_counter(int64_t sample, int64_t head, int64_t query, int64_t block) {
    const auto s = uint64_t(sample);
    return {{uint32_t(uint64_t(head) + (s >> 32 << 16)), uint32_t(query), uint32_t(s), uint32_t(block)}};
}

// The words of a call from decision `first` on, a multiple of `count`: as many decisions as that are wanted of them. The words stay
// in registers, which have no index at run time.
template <int count>
TRILITH_BOTH Words from_decision(Words words, int first) {
    if constexpr (count == 4) {
        if (first) words.at[0] = words.at[2], words.at[1] = words.at[3];
    } else if constexpr (count == 1) {
        const uint32_t word = first < 4 ? (first < 2 ? words.at[0] : words.at[1]) : (first < 6 ? words.at[2] : words.at[3]);
        words.at[0] = word >> (first % 2 * 16);
    }
    return words;
}

// Decision i of a call: kept where the number is at least the threshold, round(65536 p).
TRILITH_BOTH bool is_kept(const Words& words, int i, uint32_t threshold) {
    return ((words.at[i / 2] >> (i % 2 * 16)) & 0xFFFFu) >= threshold;
}

}  // namespace trilith::cuda
