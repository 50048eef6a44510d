#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
inline float __half2float(__half x) {
    _Float16 value;
    std::memcpy(&value, &x, sizeof value);
    return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
    const _Float16 value = static_cast<_Float16>(x);
    __half result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
