// Rotary position embedding (Su et al. 2021): each pair (i, i + half) of a head is turned by its position's angle.
//
// x and the result have strides of their own, so that q and k are read where the product of all three wrote them. A position's
// angles stay in the nearest cache for all its heads; one tensor moves in and one out. Backward turns back: the same with -sin.
#include "common/parallel.h"
#include "common/rows.h"
#include "cpu/kernels.h"

namespace trilith::TRILITH_ISA {

void rotary(int dtype, Address x, Address y, Address cos, Address sin, int64_t batch, int64_t length, int64_t heads,
            int64_t half, int64_t x_sample, int64_t x_position, int64_t x_head, int64_t y_sample, int64_t y_position,
            int64_t y_head, int64_t table_stride, bool inverse, int threads) {
    with_dtype(static_cast<DType>(dtype), [&](auto tag) {
        using T = typename decltype(tag)::type;
        using A = wide_t<T>;
        const int64_t bytes = 4 * batch * length * heads * half * static_cast<int64_t>(sizeof(T));
        const A sign = inverse ? A(-1) : A(1);
        const bool streamed = is_streamed((const T*)y, 2 * batch * length * heads * half, half) && y_head == 2 * half &&
                              y_position == heads * y_head && x != y;
        auto turn = [&](int64_t begin, int64_t end, auto&& put) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t sample = row / length, position = row % length;
                const A* c = (const A*)cos + sample * table_stride + position * half;
                const A* s = (const A*)sin + sample * table_stride + position * half;
                const T* from = (const T*)x + sample * x_sample + position * x_position;
                T* to = (T*)y + sample * y_sample + position * y_position;
                for (int64_t head = 0; head < heads; ++head) {
                    const T* source = from + head * x_head;
                    T* target = to + head * y_head;
                    each_register<A>(half, [&](int64_t i, int64_t lanes) {
                        __builtin_prefetch(source + x_position + i);  // a gap lies before the next position's heads
                        __builtin_prefetch(source + x_position + half + i);
                        const Vec<A> cosine = load_some(c + i, lanes), sine = load_some(s + i, lanes) * sign;
                        const Vec<A> first = load_some(source + i, lanes), second = load_some(source + half + i, lanes);
                        put(target + i, first * cosine - second * sine, lanes);
                        put(target + half + i, second * cosine + first * sine, lanes);
                    });
                }
            }
        };
        for_each_piece(batch * length, useful_threads(threads, bytes), 1, [&](int64_t begin, int64_t end) {
            with_store<T>(streamed, [&](auto put) { turn(begin, end, put); });
        });
    });
}

}  // namespace trilith::TRILITH_ISA
