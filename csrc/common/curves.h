// The sigmoid (with which tanh is written) and the normal distribution (with which erf is), of several registers in step.
//
// One register's chain of some 25 operations takes 90 cycles and more, and a processor looks ahead only a few such chains:
// half of its units would wait. A Group goes through each operation with all its registers, so that there is always
// something to do. For float the exponential is made for what its callers need, without special cases.
#pragma once

#include "common/math.h"

// A call for each group would pass all of it, and half of what it returns for nothing, through memory.
#define TRILITH_INLINE inline __attribute__((always_inline))

namespace trilith::TRILITH_ISA {

// Registers that go together through each operation. The functions below do to each what they say of a number.
template <class V, int count>
struct Group {
    V part[count];

    Group() = default;
    // Register by register: GCC copies the array through memory.
    TRILITH_INLINE Group(const Group& other) {
        for (int i = 0; i < count; ++i) part[i] = other.part[i];
    }
    TRILITH_INLINE Group& operator=(const Group& other) {
        for (int i = 0; i < count; ++i) part[i] = other.part[i];
        return *this;
    }
};

template <class V, int count, class F>
TRILITH_INLINE Group<V, count> each(const Group<V, count>& a, F&& f) {
    Group<V, count> result;
    for (int i = 0; i < count; ++i) result.part[i] = f(a.part[i]);
    return result;
}
template <class V, int count, class F>
TRILITH_INLINE Group<V, count> each(const Group<V, count>& a, const Group<V, count>& b, F&& f) {
    Group<V, count> result;
    for (int i = 0; i < count; ++i) result.part[i] = f(a.part[i], b.part[i]);
    return result;
}
template <class V>
using Element = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

template <class V, int count>
TRILITH_INLINE Group<V, count> operator+(const Group<V, count>& a, const Group<V, count>& b) {
    return each(a, b, [](V x, V y) { return x + y; });
}
template <class V, int count>
TRILITH_INLINE Group<V, count> operator*(const Group<V, count>& a, const Group<V, count>& b) {
    return each(a, b, [](V x, V y) { return x * y; });
}
template <class V, int count>
TRILITH_INLINE Group<V, count> operator+(const Group<V, count>& a, Element<V> b) {
    return each(a, [b](V x) { return x + b; });
}
template <class V, int count>
TRILITH_INLINE Group<V, count> operator*(const Group<V, count>& a, Element<V> b) {
    return each(a, [b](V x) { return x * b; });
}
template <class V, int count>
TRILITH_INLINE Group<V, count> fma(const Group<V, count>& a, const Group<V, count>& b, Element<V> c) {
    return each(a, b, [c](V x, V y) { return fma(x, y, fill(c)); });
}
template <class V, int count>
TRILITH_INLINE Group<V, count> fma(const Group<V, count>& a, const Group<V, count>& b, const Group<V, count>& c) {
    Group<V, count> result;
    for (int i = 0; i < count; ++i) result.part[i] = fma(a.part[i], b.part[i], c.part[i]);
    return result;
}
// The polynomial whose first coefficient belongs to the highest power.
template <class V, int count, size_t terms>
TRILITH_INLINE Group<V, count> polynomial(const Group<V, count>& x, const Element<V> (&coefficients)[terms]) {
    Group<V, count> p = each(x, [&](V) { return fill(coefficients[0]); });
    for (size_t i = 1; i < terms; ++i) p = fma(p, x, coefficients[i]);
    return p;
}

TRILITH_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
TRILITH_INLINE vd magnitude(vd x) { return (vd)((vl)x & 0x7FFFFFFFFFFFFFFF); }

// x, but no further from zero than `limit`; the limit where x is no number.
TRILITH_INLINE vf within(vf x, float limit) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (vf)_mm512_maskz_range_ps(0xFFFF, (__m512)x, _mm512_set1_ps(limit), 2);
#else
    return max(min(x, fill(limit)), fill(-limit));
#endif
}
TRILITH_INLINE vd within(vd x, double limit) { return max(min(x, fill(limit)), fill(-limit)); }

// p 2^n for integers |n| <= 126 and p near 1.
TRILITH_INLINE vf scaled(vf p, vf n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
    return (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
#endif
}

// 2^(a b) where |a b| <= 126, error 1.5 units in the last place. With a fused multiply-add the product is exact.
template <int count>
TRILITH_INLINE Group<vf, count> exp2_of_product(const Group<vf, count>& a, const Group<vf, count>& b) {
    // A minimax polynomial with p(0) = 1.
    constexpr float coefficients[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f,
                                      0x1.ebf9bcp-3f,  0x1.62e42ap-1f, 1.0f};
    const Group<vf, count> n = each(a, b, [](vf x, vf y) { return round_even(x * y); });
    const Group<vf, count> p = polynomial(fma(a, b, each(n, [](vf x) { return -x; })), coefficients);
    return each(p, n, scaled);
}

// 1 / x where |x| is in [2^-125, 2^126], error 1 unit in the last place.
template <int count>
TRILITH_INLINE Group<vf, count> inverse(const Group<vf, count>& x) {
#if defined(__AVX512F__)
    // One step of Newton's takes 14 bits to all.
    const Group<vf, count> guess = each(x, [](vf v) { return (vf)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)v); });
    return guess * each(x, guess, [](vf v, vf g) { return fma(-v, g, fill(2.0f)); });
#else
    return each(x, [](vf v) { return 1 / v; });
#endif
}

// s = 1 / (1 + e^-(a b)) and 1 - s, errors about 2 units in the last place, where |a b| is at most 87 (double: 700). Given is
// c = b kSigmoidFactor, which callers fold into their constants. tanh(x) is 2s - 1 of 2x.
template <class A>
constexpr A kSigmoidFactor = sizeof(A) == sizeof(float) ? A(-0x1.71547652b82fep+0) : A(-1);
template <class G>
struct Sigmoid {
    G value, rest;
};
template <int count>
TRILITH_INLINE Sigmoid<Group<vf, count>> sigmoid(const Group<vf, count>& a, const Group<vf, count>& c) {
    const Group<vf, count> power = exp2_of_product(a, c), value = inverse(power + 1.0f);
    return {value, power * value};
}
template <int count>
TRILITH_INLINE Sigmoid<Group<vd, count>> sigmoid(const Group<vd, count>& a, const Group<vd, count>& c) {
    const Group<vd, count> power = each(a, c, [](vd x, vd y) { return exp(x * y); });
    const Group<vd, count> value = each(power, [](vd x) { return 1 / (1 + x); });
    return {value, power * value};
}

// The standard normal distribution at x: (1 + erf(x / sqrt(2))) / 2, and its density.
template <class G>
struct Normal {
    G cumulative, density;
};

// The tail beyond |x| is e^(-x^2 / 2) times a slow function of |x|; the density needs the same power. That function is a
// polynomial in |x| / (|x| + 3) for float, interpolated at Chebyshev points up to 7 with the exact value at zero: the tail
// is right to 4e-9. For double it is one in (|x| - 6) / (|x| + 6), over 1 + |x|, right to 1e-17 of itself everywhere.
template <int count>
TRILITH_INLINE Normal<Group<vf, count>> normal(const Group<vf, count>& x) {
    using G = Group<vf, count>;
    constexpr float coefficients[] = {-0x1.d675cap-7f, -0x1.396690p-7f, 0x1.15e36ap-4f, 0x1.523f0ap-5f, -0x1.3c7ea0p-3f,
                                      -0x1.26520ep-2f, 0x1.0d9d04p+0f,  -0x1.32633ep+0f, 0.5f};
    // The tail from 13 on is nothing beside x; infinity stays out.
    const G size = each(x, [](vf v) { return min(magnitude(v), fill(13.0f)); });
    const G power = exp2_of_product(size * size, each(x, [](vf) { return fill(-0x1.715476p-1f); }));
    const G bell = each(power, size, [](vf p, vf v) { return v < 13.0f ? p : vf{}; });
    const G tail = polynomial(size * inverse(size + 3.0f), coefficients) * bell;
    return {each(tail, x, [](vf t, vf v) { return v < 0 ? t : 1 - t; }), bell * 0x1.988454p-2f};
}
TRILITH_INLINE Normal<vd> normal(vd x) {
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
template <int count>
TRILITH_INLINE Normal<Group<vd, count>> normal(const Group<vd, count>& x) {
    Normal<Group<vd, count>> result;
    for (int i = 0; i < count; ++i) {
        const Normal<vd> at = normal(x.part[i]);
        result.cumulative.part[i] = at.cumulative, result.density.part[i] = at.density;
    }
    return result;
}

}  // namespace trilith::TRILITH_ISA
