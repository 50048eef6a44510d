// Vectors of one register, written once for every instruction set.
//
// Each file of csrc/cpu is compiled once for each instruction set, with TRILITH_ISA naming it (base, avx2, avx512); all
// that depends on the set lies in that namespace, so that the copies do not meet. Vectors are the compiler's own
// (vector_size): arithmetic, comparison and `mask ? a : b` work on them as on numbers. The bodies below are intrinsics
// only where the compiler does not find the instruction by itself. A register holds kBytes bytes; the portable path
// uses 16 (SSE2 or NEON).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/types.h"

#ifndef TRILITH_ISA
#error "TRILITH_ISA names the instruction set that this file is compiled for"
#endif

namespace trilith::TRILITH_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T, int bytes = kBytes>
struct VecOf {
    typedef T type __attribute__((vector_size(bytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

// Lanes of a register of T.
template <class T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

using vf = Vec<float>;
using vd = Vec<double>;
using vi = Vec<int32_t>;
using vu = Vec<uint32_t>;
using vl = Vec<int64_t>;
using half_bits = VecOf<uint16_t, kBytes / 2>::type;  // as many 16-bit numbers as a register has floats

// The integer of a floating-point type's width.
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
    using type = int32_t;
};
template <>
struct IntOf<double> {
    using type = int64_t;
};
template <class T>
using int_t = typename IntOf<T>::type;

template <class T>
inline Vec<T> fill(T x) {
    return x - Vec<T>{};  // a sum with zero would make -0 a 0, so that the compiler had to do it
}

// --- sixteen-bit formats, to and from float ---------------------------------------------------------------------------

inline vf widen_bf16(half_bits x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

inline half_bits round_bf16(vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + (0x7FFFu + ((bits >> 16) & 1u))) >> 16;
    vu nan = (bits >> 16) | 0x40u;  // stays a NaN where the low half alone made it one
    return __builtin_convertvector((vu)(x == x ? rounded : nan), half_bits);
}

#if defined(__AVX512F__)
inline vf widen_f16(half_bits x) { return (vf)_mm512_cvtph_ps((__m256i)x); }
inline half_bits round_f16(vf x) { return (half_bits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
inline vf widen_f16(half_bits x) { return (vf)_mm256_cvtph_ps((__m128i)x); }
inline half_bits round_f16(vf x) { return (half_bits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline vf widen_f16(half_bits half) {
    // The exponent's bias differs by 112; a product with 2^112 also makes subnormals right. Infinity and NaN on their own.
    vu x = __builtin_convertvector(half, vu);
    vu magnitude = (x & 0x7FFFu) << 13;
    vf value = (vf)magnitude * 0x1p112f;
    vu special = magnitude | 0x7F800000u;
    vu bits = (x & 0x7C00u) == 0x7C00u ? special : (vu)value;
    return (vf)(bits | ((x & 0x8000u) << 16));
}
inline half_bits round_f16(vf x) {
    vu bits = (vu)x, sign = (bits >> 16) & 0x8000u;
    vu magnitude = bits & 0x7FFFFFFFu;
    vu normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3F000000u;  // the sum rounds at the last place of a subnormal half
    vu small = magnitude < 0x38800000u ? subnormal : normal;
    vu finite = magnitude >= 0x477FF000u ? (vu{} + 0x7C00u) : small;
    vu value = magnitude > 0x7F800000u ? (vu{} + 0x7E00u) : finite;
    return __builtin_convertvector(value | sign, half_bits);
}
#endif

// --- memory: one register of numbers to compute with, from and to storage of type T -------------------------------------

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vd load(const double* p) {
    vd v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vf load(const bf16* p) {
    half_bits v;
    std::memcpy(&v, p, sizeof v);
    return widen_bf16(v);
}
inline vf load(const f16* p) {
    half_bits v;
    std::memcpy(&v, p, sizeof v);
    return widen_f16(v);
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, vd v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
    half_bits rounded = round_bf16(v);
    std::memcpy(p, &rounded, sizeof rounded);
}
inline void store(f16* p, vf v) {
    half_bits rounded = round_f16(v);
    std::memcpy(p, &rounded, sizeof rounded);
}

// The first `count` lanes; the others read as zero and are not written.
template <class T>
inline Vec<wide_t<T>> load_part(const T* p, int64_t count) {
    alignas(64) T buffer[kLanes<wide_t<T>>] = {};
    std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
    return load(buffer);
}
template <class T>
inline void store_part(T* p, Vec<wide_t<T>> v, int64_t count) {
    alignas(64) T buffer[kLanes<wide_t<T>>];
    store(buffer, v);
    std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

// Stores past the caches, for results that are larger than these; p is aligned to the store's bytes (`streams` tells).
// The caller ends with stream_fence().
template <class T>
inline void stream(T* p, Vec<wide_t<T>> v) {
    store(p, v);
}
#if defined(__AVX512F__)
inline void stream(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream(double* p, vd v) { _mm512_stream_pd(p, (__m512d)v); }
inline void stream(bf16* p, vf v) { _mm256_stream_si256((__m256i*)p, (__m256i)round_bf16(v)); }
inline void stream(f16* p, vf v) { _mm256_stream_si256((__m256i*)p, (__m256i)round_f16(v)); }
#elif defined(__AVX2__)
inline void stream(float* p, vf v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream(double* p, vd v) { _mm256_stream_pd(p, (__m256d)v); }
inline void stream(bf16* p, vf v) { _mm_stream_si128((__m128i*)p, (__m128i)round_bf16(v)); }
inline void stream(f16* p, vf v) { _mm_stream_si128((__m128i*)p, (__m128i)round_f16(v)); }
#endif
inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
// Whether rows of `count` elements from `p` on can be written by stream().
template <class T>
inline bool streams(const T* p, int64_t count) {
    constexpr size_t bytes = kLanes<wide_t<T>> * sizeof(T);
    return reinterpret_cast<uintptr_t>(p) % bytes == 0 && static_cast<size_t>(count) * sizeof(T) % bytes == 0;
}

// Brings the line at `p` into the second cache: rows are pages, which the processor's own prefetch does not look across.
template <class T>
inline void prefetch(const T* p) {
    __builtin_prefetch(p, 0, 2);
}

// What `v` is once it was stored as a T.
template <class T>
inline Vec<wide_t<T>> rounded(Vec<wide_t<T>> v) {
    if constexpr (sizeof(T) == 2) {
        T buffer[kLanes<float>];
        store(buffer, v);
        return load(buffer);
    }
    return v;
}

// One number from and to storage.
template <class T>
inline wide_t<T> load_one(const T* p) {
    return load_part(p, 1)[0];
}
template <>
inline float load_one(const float* p) {
    return *p;
}
template <>
inline double load_one(const double* p) {
    return *p;
}
template <class T>
inline void store_one(T* p, wide_t<T> x) {
    store_part(p, fill(x), 1);
}
template <>
inline void store_one(float* p, float x) {
    *p = x;
}
template <>
inline void store_one(double* p, double x) {
    *p = x;
}

// --- lanes -------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vd max(vd a, vd b) { return (vd)_mm512_max_pd((__m512d)a, (__m512d)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
inline vd min(vd a, vd b) { return (vd)_mm512_min_pd((__m512d)a, (__m512d)b); }
inline vf sqrt(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }
inline vd sqrt(vd a) { return (vd)_mm512_sqrt_pd((__m512d)a); }
inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vd fma(vd a, vd b, vd c) { return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
inline vf round_even(vf a) { return (vf)_mm512_roundscale_ps((__m512)a, 0); }
inline vd round_even(vd a) { return (vd)_mm512_roundscale_pd((__m512d)a, 0); }
#elif defined(__AVX2__)
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vd max(vd a, vd b) { return (vd)_mm256_max_pd((__m256d)a, (__m256d)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
inline vd min(vd a, vd b) { return (vd)_mm256_min_pd((__m256d)a, (__m256d)b); }
inline vf sqrt(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }
inline vd sqrt(vd a) { return (vd)_mm256_sqrt_pd((__m256d)a); }
inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline vd fma(vd a, vd b, vd c) { return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
inline vf round_even(vf a) { return (vf)_mm256_round_ps((__m256)a, 8); }
inline vd round_even(vd a) { return (vd)_mm256_round_pd((__m256d)a, 8); }
#else
// As the x86 instructions: the second operand where one is NaN.
template <class V>
inline V max(V a, V b) {
    return a > b ? a : b;
}
template <class V>
inline V min(V a, V b) {
    return a < b ? a : b;
}
#if defined(__SSE2__)
inline vf sqrt(vf a) { return (vf)_mm_sqrt_ps((__m128)a); }
inline vd sqrt(vd a) { return (vd)_mm_sqrt_pd((__m128d)a); }
#else
template <class V>
inline V sqrt(V a) {
    for (size_t i = 0; i < sizeof a / sizeof a[0]; ++i) a[i] = std::sqrt(a[i]);
    return a;
}
#endif
template <class V>
inline V fma(V a, V b, V c) {
    return a * b + c;
}
inline vf round_even(vf a) {
    vf big = fill(0x1.8p23f);
    vf magnitude = a < 0 ? -a : a;
    return magnitude < 0x1p22f ? (a + big) - big : a;
}
inline vd round_even(vd a) {
    vd big = fill(0x1.8p52);
    vd magnitude = a < 0 ? -a : a;
    return magnitude < 0x1p51 ? (a + big) - big : a;
}
#endif

// One number's a * b + c as fma() computes it in a register.
template <class A>
inline A fused(A a, A b, A c) {
#if defined(__FMA__) || defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
        return __builtin_fmaf(a, b, c);
    else
        return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// Sum and maximum of all lanes, always as one tree over halves.
template <class V, class F>
inline auto fold(V v, F&& join) {
    using A = std::remove_reference_t<decltype(v[0])>;
    if constexpr (sizeof v > 16) {
        typename VecOf<A, sizeof v / 2>::type low, high;
        std::memcpy(&low, &v, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return fold(join(low, high), join);
    } else if constexpr (sizeof(A) == 4) {
        using Order = typename VecOf<int32_t, 16>::type;
        v = join(v, __builtin_shuffle(v, Order{2, 3, 0, 1}));
        v = join(v, __builtin_shuffle(v, Order{1, 0, 3, 2}));
        return A(v[0]);
    } else {
        v = join(v, __builtin_shuffle(v, typename VecOf<int64_t, 16>::type{1, 0}));
        return A(v[0]);
    }
}
template <class V>
inline auto sum(V v) {
    return fold(v, [](auto a, auto b) { return a + b; });
}
template <class V>
inline auto largest(V v) {
    return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// f(offset, lanes) for a row of n: whole registers first, then what is left. f is called with kLanes<A> as its second
// argument for whole registers, so that a branch on it vanishes where f is inlined.
template <class A, class F>
inline void each_register(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, static_cast<int64_t>(kLanes<A>));
    if (i < n) f(i, n - i);
}
template <class T>
inline Vec<wide_t<T>> load_some(const T* p, int64_t count) {
    return count == kLanes<wide_t<T>> ? load(p) : load_part(p, count);
}
template <class T>
inline void store_some(T* p, Vec<wide_t<T>> v, int64_t count) {
    if (count == kLanes<wide_t<T>>)
        store(p, v);
    else
        store_part(p, v, count);
}

}  // namespace trilith::TRILITH_ISA
