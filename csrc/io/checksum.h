// A 64-bit checksum of a block, to tell whether a disk gave back what it was given. It lives no longer than the process.
//
// The inner loop of XXH3 (Collet, 2019): eight sums of 64 bits take in 64 bytes at a time, each the product of the two halves
// of a word under a key, and its neighbour's word as it is, so that no single change can vanish in a product with zero. It
// keeps up with memory on one thread, with SSE2 alone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace trilith::io {

namespace checksum_parts {

constexpr int kLanes = 8, kStripe = 64, kStripesPerScramble = 16;
constexpr uint64_t kPrime = 0x9E3779B185EBCA87u, kPrime32 = 0x9E3779B1u;

inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xC2B2AE3D27D4EB4Fu;
    x = (x ^ (x >> 29)) * 0x165667B19E3779F9u;
    return x ^ (x >> 32);
}

struct Sums {
    alignas(16) uint64_t lanes[kLanes], keys[kLanes];

    Sums() {
        for (int i = 0; i < kLanes; ++i) {
            lanes[i] = mix(kPrime * static_cast<uint64_t>(i + 1));
            keys[i] = mix(lanes[i] + kPrime);
        }
    }

    // One stripe; `turn` is its place between two scrambles, so that stripes that change places are seen.
    void take(const unsigned char* data, int turn) {
        const uint64_t shift = kPrime * static_cast<uint64_t>(turn);
#if defined(__SSE2__)
        const __m128i shifts = _mm_set1_epi64x(static_cast<long long>(shift));
        for (int i = 0; i < kLanes; i += 2) {
            const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 8 * i));
            const __m128i key = _mm_load_si128(reinterpret_cast<const __m128i*>(keys + i));
            const __m128i mixed = _mm_xor_si128(word, _mm_add_epi64(key, shifts));
            const __m128i product = _mm_mul_epu32(mixed, _mm_srli_epi64(mixed, 32));
            __m128i* sum = reinterpret_cast<__m128i*>(lanes + i);
            const __m128i swapped = _mm_shuffle_epi32(word, _MM_SHUFFLE(1, 0, 3, 2));
            _mm_store_si128(sum, _mm_add_epi64(_mm_load_si128(sum), _mm_add_epi64(product, swapped)));
        }
#else
        uint64_t words[kLanes];
        std::memcpy(words, data, sizeof words);
        for (int i = 0; i < kLanes; ++i) {
            const uint64_t mixed = words[i] ^ (keys[i] + shift);
            lanes[i] += (mixed & 0xFFFFFFFFu) * (mixed >> 32) + words[i ^ 1];
        }
#endif
    }

    // Spreads what the products have gathered in the high halves over all bits.
    void scramble() {
        for (int i = 0; i < kLanes; ++i) lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ keys[i]) * kPrime32;
    }
};

}  // namespace checksum_parts

inline uint64_t checksum(const void* memory, int64_t num_bytes) {
    using namespace checksum_parts;
    Sums sums;
    const unsigned char* data = static_cast<const unsigned char*>(memory);
    int64_t left = num_bytes;
    int turn = 0;
    for (; left >= kStripe; left -= kStripe, data += kStripe) {
        sums.take(data, turn);
        if (++turn == kStripesPerScramble) {
            sums.scramble();
            turn = 0;
        }
    }
    if (left) {
        unsigned char last[kStripe] = {};
        std::memcpy(last, data, static_cast<size_t>(left));
        sums.take(last, turn);
    }
    sums.scramble();
    uint64_t total = static_cast<uint64_t>(num_bytes) * kPrime;
    for (uint64_t lane : sums.lanes) total = mix(total ^ lane) + kPrime;
    return total;
}

}  // namespace trilith::io
