// The random stream against kernels/stream.py's specification written as plain loops: equal bits on every instruction set.
#include <array>
#include <cmath>

#include "tests/check.h"

namespace trilith::tests {

namespace {

using Words = std::array<uint32_t, 4>;
constexpr uint32_t kKey[2] = {0x12345678u, 0xF0E1D2C3u};

Words philox(uint64_t c0, uint64_t c1, uint64_t c2, uint64_t c3) {
    Words c{static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2), static_cast<uint32_t>(c3)};
    uint32_t first = kKey[0], second = kKey[1];
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(c[0]) * 0xD2511F53u, b = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
        c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ first, static_cast<uint32_t>(b),
             static_cast<uint32_t>(a >> 32) ^ c[3] ^ second, static_cast<uint32_t>(a)};
        first += 0x9E3779B9u;
        second += 0xBB67AE85u;
    }
    return c;
}

bool is_kept(const Words& words, int64_t neighbour, uint32_t threshold) {
    const int64_t j = neighbour % 8;
    return (words[static_cast<size_t>(j / 2)] >> (j % 2 * 16) & 0xFFFF) >= threshold;
}
bool keeps_feature(int64_t sample, int64_t position, int64_t feature, uint32_t threshold) {
    const uint64_t s = static_cast<uint64_t>(sample);
    return is_kept(philox(s >> 32, static_cast<uint64_t>(position), s & 0xFFFFFFFF, static_cast<uint64_t>(feature / 8)), feature, threshold);
}

// The inverse of the normal distribution as the specification has it, each operation rounded by itself.
double normal(uint64_t element) {
    const uint64_t counter = element / 4;
    const uint32_t word = philox(counter & 0xFFFFFFFF, counter >> 32, 0, 0)[element % 4];
    const volatile double q = (word + 0.5) / 4294967296.0 - 0.5;
    volatile double p, d;
    auto step = [](volatile double& sum, double r, double next) {
        const volatile double product = sum * r;
        sum = product + next;
    };
    auto polynomial = [&](volatile double& sum, double r, std::initializer_list<double> from_the_highest) {
        sum = *from_the_highest.begin();
        for (const double* next = from_the_highest.begin() + 1; next != from_the_highest.end(); ++next) step(sum, r, *next);
    };
    if (std::abs(q) <= 0.425) {
        const volatile double square = q * q;
        const double r = 0.180625 - square;
        polynomial(p, r, {59.109374720, 159.29113202, 50.434271938, 3.3871327179});
        polynomial(d, r, {67.187563600, 78.757757664, 17.895169469, 1.0});
        const volatile double top = q * p;
        return top / d;
    }
    const double v = 0.5 - std::abs(q);
    int exponent;
    double m = std::frexp(v, &exponent);  // in [1/2, 1)
    const double half_root = 0x1.6a09e667f3bcdp-1;
    if (m < half_root) m *= 2, --exponent;
    const volatile double s = (m - 1) / (m + 1), y = s * s;
    polynomial(p, y, {2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0});
    const volatile double fraction = s * p, whole = exponent * 0x1.62e42fefa39efp-1;
    const volatile double logarithm = whole + fraction;
    const double x = -logarithm;
    const volatile double start = x * 0.1674;
    volatile double g = start + 1.289;
    for (int i = 0; i < 3; ++i) {
        const volatile double quotient = x / g, total = g + quotient;
        g = total * 0.5;
    }
    const double t = g - 1.6;
    polynomial(p, t, {0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777});
    polynomial(d, t, {0.12021132975, 0.73700164250, 1.0});
    const double z = p / d;
    return q < 0 ? -z : z;
}

}  // namespace

void test_random(const CpuKernels& kernels, DType dtype) {
    // A box of a canonical (9, 40, width) tensor: rows 2.. of 3, all of the second dim but its first, from column 5 on.
    for (int64_t run : {1, 3, 8, 33, 700}) {
        const std::string what = std::string(kernels.name) + " fill_normal " + name_of(dtype) + " " + std::to_string(run);
        const int64_t extents[] = {3, 4}, width = run + 9, strides[] = {40 * width, width}, runs = 12;
        const int64_t first = (int64_t{1} << 34) * 3 + 2 * 40 * width + width + 5;
        const double deviation = 0.02;
        const auto made = run_both(what, [&](int threads) {
            std::vector<Buffer> out{Buffer(dtype, runs * run)};
            kernels.fill_normal(static_cast<int>(dtype), out[0].address(), runs, run, first, reinterpret_cast<Address>(extents),
                                reinterpret_cast<Address>(strides), 2, kKey[0], kKey[1], deviation, threads);
            return out;
        });
        bool is_equal = true;
        for (int64_t i = 0; i < runs * run; ++i) {
            const int64_t row = i / run, element = first + row / 4 * strides[0] + row % 4 * strides[1] + i % run;
            const double value = normal(static_cast<uint64_t>(element)) * deviation;
            Buffer expected(dtype, 1);
            expected.set(0, dtype == DType::f64 ? value : static_cast<double>(static_cast<float>(value)));
            is_equal = is_equal && expected.at(0) == made[0].at(i);
        }
        check(is_equal, what);
    }
}

void test_dropout(const CpuKernels& kernels, DType dtype) {
    const uint32_t threshold = 19661;
    const double scale = 65536.0 / (65536.0 - threshold);
    const int code = static_cast<int>(dtype);
    for (int64_t width : {1, 7, 8, 31, 64, 133})
        for (int64_t length : {0, 1, 5, 40}) {
            const int64_t batch = 2, n = batch * length * width, first_feature = 11;
            const std::string what = std::string(kernels.name) + " dropout " + name_of(dtype) + " " + std::to_string(length) + " x " +
                                     std::to_string(width);
            const Buffer x = random_buffer(dtype, n, 1), bias = random_buffer(dtype, width, 2), residual = random_buffer(dtype, n, 3);
            const std::vector<int64_t> samples{int64_t{3} << 33, 7};
            std::vector<int64_t> positions;
            for (int64_t i = 0; i < batch * length; ++i) positions.push_back((i * 37) % 1000);
            const Address ids = reinterpret_cast<Address>(samples.data()), places = reinterpret_cast<Address>(positions.data());
            const auto made = run_both(what, [&](int threads) {
                std::vector<Buffer> out{Buffer(dtype, n), Buffer(dtype, n), Buffer(dtype, width)};
                kernels.dropout_forward(code, x.address(), bias.address(), residual.address(), out[0].address(), ids, places, length,
                                        batch, length, width, first_feature, kKey[0], kKey[1], threshold, threads);
                kernels.dropout_bias_backward(code, x.address(), out[1].address(), out[2].address(), ids, places, length, batch,
                                              length, width, first_feature, kKey[0], kKey[1], threshold, threads);
                return out;
            });
            std::vector<unsigned char> keep(static_cast<size_t>(n), 9);
            kernels.dropout_keep(reinterpret_cast<Address>(keep.data()), ids, places, length, batch, length, width, first_feature,
                                 kKey[0], kKey[1], threshold, 2);
            Numbers y, dx, dbias(static_cast<size_t>(width), 0.0);
            bool is_equal = true;
            for (int64_t i = 0; i < n; ++i) {
                const int64_t row = i / width, column = i % width;
                const bool kept = keeps_feature(samples[static_cast<size_t>(row / length)], positions[static_cast<size_t>(row)],
                                                first_feature + column, threshold);
                is_equal = is_equal && keep[static_cast<size_t>(i)] == kept;
                y.push_back(residual.at(i) + (kept ? (x.at(i) + bias.at(column)) * scale : 0));
                dx.push_back(kept ? x.at(i) * scale : 0);
                dbias[static_cast<size_t>(column)] += dx.back();
            }
            check(is_equal, what + " keep");
            check_close(what + " y", made[0], y, 8);
            check_close(what + " dx", made[1], dx, 4);
            check_close(what + " dbias", made[2], dbias, 4 * static_cast<double>(batch * length + 1));
        }
    for (int64_t num_keys : {0, 1, 9, 77}) {
        const int64_t batch = 2, heads = 3, num_queries = 5, first_head = 2, first_key = 13;
        const std::vector<int64_t> samples{1, (int64_t{5} << 32) + 2}, queries{0, 3, 4, 900, 7};
        std::vector<unsigned char> keep(static_cast<size_t>(batch * heads * num_queries * num_keys), 9);
        kernels.attention_keep(reinterpret_cast<Address>(keep.data()), reinterpret_cast<Address>(samples.data()),
                               reinterpret_cast<Address>(queries.data()), batch, heads, num_queries, num_keys, first_head, first_key,
                               kKey[0], kKey[1], threshold, 2);
        bool is_equal = true;
        for (size_t i = 0; i < keep.size(); ++i) {
            const int64_t at = static_cast<int64_t>(i), key = first_key + at % num_keys, query = at / num_keys % num_queries;
            const uint64_t head = static_cast<uint64_t>(first_head + at / num_keys / num_queries % heads);
            const uint64_t s = static_cast<uint64_t>(samples[static_cast<size_t>(at / num_keys / num_queries / heads)]);
            const Words words = philox(head + (s >> 32 << 16), static_cast<uint64_t>(queries[static_cast<size_t>(query)]), s & 0xFFFFFFFF,
                                       static_cast<uint64_t>(key / 8));
            is_equal = is_equal && keep[i] == is_kept(words, key, threshold);
        }
        check(is_equal, std::string(kernels.name) + " attention_keep " + std::to_string(num_keys));
    }
}

}  // namespace trilith::tests
