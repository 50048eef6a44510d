// Functions of a register, with the errors that the ops' accuracy bars need: exp, sigmoid (with which tanh is written) and
// the normal distribution (with which erf is). No library function is called, so a number's result does not depend on where
// in a row it lies.
#pragma once

#include "common/vec.h"

namespace trilith::TRILITH_ISA {


// e^x, error below 1 unit in the last place: x = n ln2 + r with |r| <= ln2/2 (ln2 in two parts, Cody and Waite 1980), a
// polynomial for e^r, and 2^n by the exponent bits. 0 below about -87.3 (float) or -708 (double) where results would be
// subnormal, infinity above 88.7 or 709.7, NaN stays.
inline vf exp(vf x) {
    vf n = round_even(x * 0x1.715476p+0f);
    n = min(max(fill(-127.0f), n), fill(128.0f));
    vf r = fma(n, fill(-0x1.62e400p-1f), x);
    r = fma(n, fill(-0x1.7f7d1cp-20f), r);
    vf p = fill(1.9875691500e-4f);
    p = fma(p, r, fill(1.3981999507e-3f));
    p = fma(p, r, fill(8.3334519073e-3f));
    p = fma(p, r, fill(4.1665795894e-2f));
    p = fma(p, r, fill(1.6666665459e-1f));
    p = fma(p, r, fill(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // 2^n in two factors, so that n = 128 and -127 need no special case.
    vi whole = __builtin_convertvector(n, vi), half = whole >> 1;
    vf y = p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
    y = x < fill(-87.33654f) ? vf{} : y;
    y = x > fill(88.72284f) ? fill(std::numeric_limits<float>::infinity()) : y;
    return x == x ? y : x;
}

inline vd exp(vd x) {
    vd n = round_even(x * 0x1.71547652b82fep+0);
    n = min(max(fill(-1023.0), n), fill(1024.0));
    vd r = fma(n, fill(-0x1.62e42fefa0000p-1), x);
    r = fma(n, fill(-0x1.cf79abc9e3b3ap-40), r);
    constexpr double factorials[] = {6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0,
                                     5040.0,       720.0,       120.0,      24.0,      6.0,      2.0};
    vd p = fill(1.0 / factorials[0]);
    for (int i = 1; i < 12; ++i) p = fma(p, r, fill(1.0 / factorials[i]));
    p = fma(p, r, fill(1.0));
    p = fma(p, r, fill(1.0));
    vl whole = __builtin_convertvector(n, vl), half = whole >> 1;
    vd y = p * (vd)((half + 1023) << 52) * (vd)((whole - half + 1023) << 52);
    y = x < fill(-708.39) ? vd{} : y;
    y = x > fill(709.782712893384) ? fill(std::numeric_limits<double>::infinity()) : y;
    return x == x ? y : x;
}

inline vf magnitude(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
inline vd magnitude(vd x) { return (vd)((vl)x & 0x7FFFFFFFFFFFFFFF); }

// x, but no further from zero than `limit`; the limit where x is no number.
inline vf within(vf x, float limit) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (vf)_mm512_maskz_range_ps(0xFFFF, (__m512)x, _mm512_set1_ps(limit), 2);
#else
    return max(min(x, fill(limit)), fill(-limit));
#endif
}

inline vd within(vd x, double limit) { return max(min(x, fill(limit)), fill(-limit)); }

// 2^(a b) where |a b| <= 126, error 1.5 units in the last place. With a fused multiply-add the product is exact.
inline vf exp2_of_product(vf a, vf b) {
    vf n = round_even(a * b), f = fma(a, b, -n);
    constexpr float coefficients[] = {0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
    vf p = fill(0x1.5bba14p-10f);  // a minimax polynomial with p(0) = 1
    for (float coefficient : coefficients) p = fma(p, f, fill(coefficient));
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
    return (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
#endif
}

// 1 / x where |x| is in [2^-125, 2^126], error 1 unit in the last place.
inline vf inverse(vf x) {
#if defined(__AVX512F__)
    vf guess = (vf)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);  // one step of Newton's takes 14 bits to all
    return guess * fma(-x, guess, fill(2.0f));
#else
    return 1 / x;
#endif
}

// s = 1 / (1 + e^-(a b)) and 1 - s, errors about 2 units in the last place, where |a b| is at most 87 (double: 700). Given is
// c = b kSigmoidFactor, which callers fold into their constants. tanh(x) is 2s - 1 of 2x.
template <class A>
constexpr A kSigmoidFactor = sizeof(A) == sizeof(float) ? A(-0x1.71547652b82fep+0) : A(-1);
template <class V>
struct Sigmoid {
    V value, rest;
};
inline Sigmoid<vf> sigmoid(vf a, vf c) {
    vf power = exp2_of_product(a, c), value = inverse(1 + power);
    return {value, power * value};
}
inline Sigmoid<vd> sigmoid(vd a, vd c) {
    vd power = exp(a * c), value = 1 / (1 + power);
    return {value, power * value};
}

// The standard normal distribution at x: (1 + erf(x / sqrt(2))) / 2, and its density.
template <class V>
struct Normal {
    V cumulative, density;
};

// The tail beyond |x| is e^(-x^2 / 2) times a slow function of |x|; the density needs the same power. That function is a
// polynomial in |x| / (|x| + 3) for float, interpolated at Chebyshev points up to 7 with the exact value at zero: the tail is
// right to 4e-9. For double it is one in (|x| - 6) / (|x| + 6), over 1 + |x|, right to 1e-17 of itself on the whole half line.
inline Normal<vf> normal(vf x) {
    vf size = min(magnitude(x), fill(13.0f));  // the tail beyond is nothing beside x, and infinity stays out
    vf u = size * inverse(size + 3.0f);
    constexpr float coefficients[] = {-0x1.396690p-7f, 0x1.15e36ap-4f, 0x1.523f0ap-5f,  -0x1.3c7ea0p-3f,
                                      -0x1.26520ep-2f, 0x1.0d9d04p+0f, -0x1.32633ep+0f, 0.5f};
    vf p = fill(-0x1.d675cap-7f);
    for (float coefficient : coefficients) p = fma(p, u, fill(coefficient));
    vf bell = exp2_of_product(size * size, fill(-0x1.715476p-1f));
    bell = size < 13.0f ? bell : vf{};
    vf tail = p * bell;
    return {x < 0 ? tail : 1 - tail, bell * 0x1.988454p-2f};
}
inline Normal<vd> normal(vd x) {
    vd size = min(magnitude(x), fill(38.0));  // the tail beyond underflows, and infinity stays out
    vd t = (size - 6.0) / (size + 6.0);
    constexpr double coefficients[] = {
        -0x1.b2e1935e04662p-34, -0x1.76ce76c46c94cp-32, 0x1.95dce4c8b5362p-30,
        0x1.08eb2dcec6ca0p-28, -0x1.fb9f57321cb25p-27, -0x1.684e999e0e98fp-26,
        0x1.191c00612dafbp-23, -0x1.0b6d1e2b2925cp-35, -0x1.0bfc74252f7fep-20,
        0x1.ded9d8aa81a86p-20, 0x1.2811453e0d9cfp-18, -0x1.ba23869f86450p-16, 0x1.3d0c6578d4785p-15,
        0x1.f52d1c238347ep-14, -0x1.c79a7ee772bebp-11, 0x1.80c840be5d8eep-9, -0x1.ceac1d8112daep-8,
        0x1.b212c029b9c89p-7, -0x1.43da9f73c140ap-6, 0x1.7227accadeea5p-6, -0x1.08766e432ba3dp-6,
        -0x1.1e9d4130eaff5p-8, 0x1.46229bd016fd5p-5, -0x1.5c438de6f0febp-4, 0x1.d0568f5d76666p-2};
    vd p = fill(coefficients[0]);
    for (int i = 1; i < 25; ++i) p = fma(p, t, fill(coefficients[i]));
    vd bell = exp(size * size * -0.5), tail = p * bell / (1 + size);
    return {x < 0 ? tail : 1 - tail, bell * 0x1.9884533d43651p-2};
}

// e^x for x <= 0, zero where x is -infinity; x is NaN only where a score was.
inline vf exp_below(vf x) {
    const vf low = max(fill(-87.0f), x);
    const vf n = round_even(low * 0x1.715476p+0f);
    vf r = fma(n, fill(-0x1.62e400p-1f), low);
    r = fma(n, fill(-0x1.7f7d1cp-20f), r);
    vf p = fill(1.9875691500e-4f);
    p = fma(p, r, fill(1.3981999507e-3f));
    p = fma(p, r, fill(8.3334519073e-3f));
    p = fma(p, r, fill(4.1665795894e-2f));
    p = fma(p, r, fill(1.6666665459e-1f));
    p = fma(p, r, fill(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const vf y = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
    return x < -87.0f ? vf{} : y;
}
inline vd exp_below(vd x) { return exp(x); }

}  // namespace trilith::TRILITH_ISA
