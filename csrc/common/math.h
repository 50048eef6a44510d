// Exponentials of a register, with the errors that the ops' accuracy bars need. No library function is called, so a number's
// result does not depend on where in a row it lies. common/curves.h has the sigmoid and the normal distribution.
#pragma once

#include "common/vec.h"

namespace trilith::TRILITH_ISA {

// e^x = 2^n e^r for n = round(x / ln2), x between about -88 and 89: |r| <= ln2/2 (ln2 in two parts, Cody and Waite 1980), and
// a polynomial for e^r.
struct ReducedExp {
    vf n, power;  // power = e^r
};
inline ReducedExp reduced_exp(vf x, vf n) {
    vf r = fma(n, fill(-0x1.62e400p-1f), x);
    r = fma(n, fill(-0x1.7f7d1cp-20f), r);
    vf p = fill(1.9875691500e-4f);
    p = fma(p, r, fill(1.3981999507e-3f));
    p = fma(p, r, fill(8.3334519073e-3f));
    p = fma(p, r, fill(4.1665795894e-2f));
    p = fma(p, r, fill(1.6666665459e-1f));
    p = fma(p, r, fill(5.0000001201e-1f));
    return {n, fma(p, r * r, r) + 1.0f};
}

// e^x, error below 1 unit in the last place. 0 below about -87.3 (float) or -708 (double) where results would be subnormal,
// infinity above 88.7 or 709.7, NaN stays.
inline vf exp(vf x) {
    const ReducedExp e = reduced_exp(x, min(max(fill(-127.0f), round_even(x * 0x1.715476p+0f)), fill(128.0f)));
    // 2^n in two factors, so that n = 128 and -127 need no special case.
    vi whole = __builtin_convertvector(e.n, vi), half = whole >> 1;
    vf y = e.power * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
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

// e^x for x <= 0, zero where x is -infinity; x is NaN only where a score was.
inline vf exp_below(vf x) {
    const vf low = max(fill(-87.0f), x);
    const ReducedExp e = reduced_exp(low, round_even(low * 0x1.715476p+0f));
    const vf y = (vf)((vi)e.power + (__builtin_convertvector(e.n, vi) << 23));
    return x < -87.0f ? vf{} : y;
}
inline vd exp_below(vd x) { return exp(x); }

}  // namespace trilith::TRILITH_ISA
