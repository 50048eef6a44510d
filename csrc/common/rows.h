// What ops over rows share: how large results are stored, and in how many parts sums over rows are made.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/vec.h"

namespace trilith::TRILITH_ISA {

constexpr int64_t kStreamBytes = 16 << 20;  // results from this size on are not kept in the caches

// Whether a result of so many elements, in rows of `width`, is written past the caches.
template <class T>
bool is_streamed(const T* result, int64_t elements, int64_t width) {
    return elements * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && streams(result, width);
}

// Calls f(put) with a `put(address, register, lanes)` that writes past the caches or into them. Whoever has written past them
// ends with stream_fence(), as with_store does.
template <class T, class F>
inline void with_put(bool streamed, F&& f) {
    using V = Vec<wide_t<T>>;
    if (streamed)
        f([](T* p, V v, int64_t) { stream(p, v); });
    else
        f([](T* p, V v, int64_t lanes) { store_some(p, v, lanes); });
}
template <class T, class F>
inline void with_store(bool streamed, F&& f) {
    with_put<T>(streamed, f);
    if (streamed) stream_fence();
}

// The number of parts in which sums over rows are made: by the number of rows alone.
inline int64_t row_parts(int64_t rows) {
    constexpr int64_t most = 16, fewest_rows = 16;
    return std::clamp<int64_t>(rows / fewest_rows, 1, most);
}

}  // namespace trilith::TRILITH_ISA
