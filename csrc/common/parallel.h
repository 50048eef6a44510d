// Work in parts, over the OpenMP team that torch uses, too.
//
// Whatever is summed is summed in a number of parts that depends on the sizes alone, each part in order, and the parts in
// order: results are the same for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace trilith {

// Fewer bytes than this are faster on one thread: waking a team costs a few microseconds.
constexpr int64_t kBytesPerThread = 32 << 10;

inline int useful_threads(int threads, int64_t bytes) {
    return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max(threads, 1)));
}

// f(part) for part in [0, parts), in any order.
template <class F>
void for_each_part(int64_t parts, [[maybe_unused]] int threads, F&& f) {
#ifdef _OPENMP
    if (threads > 1 && parts > 1) {
#pragma omp parallel for num_threads(static_cast<int>(std::min<int64_t>(threads, parts))) schedule(static)
        for (int64_t part = 0; part < parts; ++part) f(part);
        return;
    }
#endif
    for (int64_t part = 0; part < parts; ++part) f(part);
}

// [begin, end) of part `part` of `parts` of n elements; bounds are multiples of `grain` but for the last.
struct Range {
    int64_t begin, end;
};
inline Range part_of(int64_t n, int64_t parts, int64_t part, int64_t grain = 1) {
    int64_t grains = (n + grain - 1) / grain, each = grains / parts, extra = grains % parts;
    int64_t first = part * each + std::min(part, extra);
    int64_t last = first + each + (part < extra ? 1 : 0);
    return {std::min(first * grain, n), std::min(last * grain, n)};
}

// f(begin, end) over [0, n), one contiguous piece a thread: for work whose elements do not meet.
template <class F>
void for_each_piece(int64_t n, int threads, int64_t grain, F&& f) {
    int64_t parts = std::clamp<int64_t>(n / std::max<int64_t>(grain, 1), 1, std::max(threads, 1));
    for_each_part(parts, threads, [&](int64_t part) {
        Range range = part_of(n, parts, part, grain);
        if (range.begin < range.end) f(range.begin, range.end);
    });
}

}  // namespace trilith
