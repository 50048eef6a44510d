// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) on registers, and the decisions of dropout made from it.
//
// engine/trilith/kernels/stream.py is the specification; this agrees with it bit for bit. A word lies in the low half of a
// 64-bit lane, because that is where the 32 x 32 -> 64 bit product takes its factors: a round is two products, two shifts
// and four exclusive ors, and what is left in the high halves disturbs nobody. Counters are dealt to lanes in such an order
// that results reach memory in order by unpacking within 128 bits alone.
//
// A row of dropout decisions has three of its four counter words in common. What depends on these alone is computed once, in
// ordinary registers (PhiloxRow); it is a fifth of all products.
#pragma once

#include "common/vec.h"

namespace trilith::TRILITH_ISA {

using vw = Vec<uint64_t>;  // words of as many counters as there are lanes, in the low halves

constexpr int kPhiloxRounds = 10;
constexpr uint64_t kPhiloxMultipliers[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint64_t kLowWord = 0xFFFFFFFF;

// The key of each round.
struct PhiloxKey {
    uint64_t first[kPhiloxRounds], second[kPhiloxRounds];
};
inline PhiloxKey philox_key(uint32_t first, uint32_t second) {
    PhiloxKey key;
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
        key.first[round] = first + round * 0x9E3779B9u;
        key.second[round] = second + round * 0xBB67AE85u;
    }
    return key;
}

// The 64-bit product of the low words.
inline uint64_t word_product(uint64_t a, uint64_t b) { return (a & kLowWord) * b; }
// The masked forms of AVX-512 say that all lanes are wanted: GCC 12 warns of its own plain ones.
inline vw word_product(vw a, uint64_t b) {
#if defined(__AVX512F__)
    return (vw)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(static_cast<long long>(b)));
#elif defined(__AVX2__)
    return (vw)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(static_cast<long long>(b)));
#elif defined(__SSE2__)
    return (vw)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(static_cast<long long>(b)));
#else
    return (a & kLowWord) * b;
#endif
}

// Words 0 and 1, and words 2 and 3, of each lane's counter, in the low and in the high half of the lane.
struct Words {
    vw first, second;
};

// Rounds from `round` on.
inline Words philox_rounds(vw c0, vw c1, vw c2, vw c3, const PhiloxKey& key, int round) {
    for (; round < kPhiloxRounds; ++round) {
        const vw product0 = word_product(c0, kPhiloxMultipliers[0]), product1 = word_product(c2, kPhiloxMultipliers[1]);
        c0 = (product1 >> 32) ^ c1 ^ key.first[round];
        c2 = (product0 >> 32) ^ c3 ^ key.second[round];
        c1 = product1;
        c3 = product0;
    }
    return {(c0 & kLowWord) | (c1 << 32), (c2 & kLowWord) | (c3 << 32)};
}
inline Words philox(vw c0, vw c1, vw c2, vw c3, const PhiloxKey& key) { return philox_rounds(c0, c1, c2, c3, key, 0); }

// Counters of which only the last word varies.
struct PhiloxRow {
    uint64_t round0_c2, round1_c0, round2_c0, round2_c1, round2_c2;  // what the varying words are xored with
};
inline PhiloxRow philox_row(uint64_t c0, uint64_t c1, uint64_t c2, const PhiloxKey& key) {
    const uint64_t a0 = word_product(c0, kPhiloxMultipliers[0]), a1 = word_product(c2, kPhiloxMultipliers[1]);
    const uint64_t b0 = word_product((a1 >> 32) ^ c1 ^ key.first[0], kPhiloxMultipliers[0]);
    const uint64_t c = word_product((b0 >> 32) ^ a0 ^ key.second[1], kPhiloxMultipliers[1]);
    return {(a0 >> 32) ^ key.second[0], a1 ^ key.first[1], (c >> 32) ^ key.first[2], c, b0 ^ key.second[2]};
}
inline Words philox(const PhiloxRow& row, vw c3, const PhiloxKey& key) {
    const vw b1 = word_product(c3 ^ row.round0_c2, kPhiloxMultipliers[1]);
    const vw c0 = word_product((b1 >> 32) ^ row.round1_c0, kPhiloxMultipliers[0]);
    return philox_rounds(b1 ^ row.round2_c0, vw{} + row.round2_c1, (c0 >> 32) ^ row.round2_c2, c0, key, 3);
}

// Which of kLanes<uint64_t> consecutive counters each lane takes, so that store_words writes them in order.
inline vw lane_counters() {
    constexpr int lanes = kLanes<uint64_t>;
    vw order{};
    for (int lane = 0; lane < lanes; ++lane) order[lane] = static_cast<uint64_t>(lane / 2 + (lane % 2) * (lanes / 2));
    return order;
}
// 2 * kBytes bytes: words 0, 1, 2, 3 of the first counter, then of the second, and so on.
inline void store_words(void* out, Words words) {
    vw low, high;
#if defined(__AVX512F__)
    low = (vw)_mm512_maskz_unpacklo_epi64(0xFF, (__m512i)words.first, (__m512i)words.second);
    high = (vw)_mm512_maskz_unpackhi_epi64(0xFF, (__m512i)words.first, (__m512i)words.second);
#elif defined(__AVX2__)
    low = (vw)_mm256_unpacklo_epi64((__m256i)words.first, (__m256i)words.second);
    high = (vw)_mm256_unpackhi_epi64((__m256i)words.first, (__m256i)words.second);
#elif defined(__SSE2__)
    low = (vw)_mm_unpacklo_epi64((__m128i)words.first, (__m128i)words.second);
    high = (vw)_mm_unpackhi_epi64((__m128i)words.first, (__m128i)words.second);
#else
    for (int lane = 0; lane < kLanes<uint64_t>; lane += 2) {
        low[lane] = words.first[lane], low[lane + 1] = words.second[lane];
        high[lane] = words.first[lane + 1], high[lane + 1] = words.second[lane + 1];
    }
#endif
    std::memcpy(out, &low, sizeof low);
    std::memcpy(static_cast<char*>(out) + sizeof low, &high, sizeof high);
}

// --- dropout ------------------------------------------------------------------------------------------------------------

// The stream of one dropout: its key, T = round(65536 p), and the factor of what is kept.
struct DropoutStream {
    PhiloxKey key;
    uint32_t threshold;
    double scale;
};
inline DropoutStream dropout_stream(uint32_t first, uint32_t second, uint32_t threshold) {
    return {philox_key(first, second), threshold, 65536.0 / (65536.0 - threshold)};
}

// Decisions over features of one token, and over keys of one query of one head; all indices are global.
inline PhiloxRow feature_decisions(int64_t sample, int64_t position, const PhiloxKey& key) {
    const uint64_t s = static_cast<uint64_t>(sample);
    return philox_row(s >> 32, static_cast<uint64_t>(position), s & kLowWord, key);
}
inline PhiloxRow key_decisions(int64_t sample, int64_t head, int64_t query, const PhiloxKey& key) {
    const uint64_t s = static_cast<uint64_t>(sample);
    return philox_row(static_cast<uint64_t>(head) + (s >> 32 << 16), static_cast<uint64_t>(query), s & kLowWord, key);
}

constexpr int kDecisionsPerCall = 8;
// Numbers that one step of decision_numbers makes: from 8 neighbours a 64-bit lane.
constexpr int kDecisionStep = kDecisionsPerCall * kLanes<uint64_t>;

// The 16-bit numbers of neighbours (features or keys) from 8 * block on, at least `count` of them: `out` has room for
// `count` rounded up to kDecisionStep. Neighbour i of the result is kept where out[i] >= threshold.
inline void decision_numbers(const PhiloxRow& row, const PhiloxKey& key, int64_t block, int64_t count, uint16_t* out) {
    vw c3 = lane_counters() + static_cast<uint64_t>(block);
    for (int64_t i = 0; i < count; i += kDecisionStep) {
        store_words(out + i, philox(row, c3, key));
        c3 += static_cast<uint64_t>(kLanes<uint64_t>);
    }
}

// For one register of numbers to compute with (A is float or double): all bits set in the lanes of what is kept.
template <class A>
inline Vec<int_t<A>> kept(const uint16_t* numbers, uint32_t threshold) {
    typename VecOf<uint16_t, kLanes<A> * 2>::type halves;
    std::memcpy(&halves, numbers, sizeof halves);
    return __builtin_convertvector(halves, Vec<int_t<A>>) >= static_cast<int_t<A>>(threshold);
}

}  // namespace trilith::TRILITH_ISA
