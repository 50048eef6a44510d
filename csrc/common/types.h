// Element types as the library sees them: codes that cross the boundary, storage types, and the type to compute in.
#pragma once

#include <cstdint>

namespace trilith {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// The sixteen-bit formats as they lie in memory; common/vec.h widens and rounds them.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// What an op on T computes in: double for double, float for everything else.
template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

template <class T>
struct Tag {
    using type = T;
};

// Calls f(Tag<T>()) for the storage type of `dtype`.
template <class F>
void with_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32: f(Tag<float>()); break;
        case DType::f64: f(Tag<double>()); break;
        case DType::bf16: f(Tag<bf16>()); break;
        case DType::f16: f(Tag<f16>()); break;
    }
}

}  // namespace trilith
