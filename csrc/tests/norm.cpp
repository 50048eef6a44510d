// LayerNorm and RMSNorm against plain loops in double.
#include <algorithm>
#include <cmath>

#include "tests/check.h"

namespace trilith::tests {

namespace {

struct Case {
    int64_t rows, width;
    bool is_rms, has_residual, has_bias;
};

constexpr double kEps = 1e-5;

void test_case(const CpuKernels& kernels, DType dtype, const Case& c) {
    const std::string what = std::string(kernels.name) + " norm " + name_of(dtype) + " " + std::to_string(c.rows) + " x " +
                             std::to_string(c.width) + (c.is_rms ? " rms" : "") + (c.has_residual ? " residual" : "");
    const int64_t n = c.rows * c.width;
    const int code = static_cast<int>(dtype);
    const Buffer x = random_buffer(dtype, n, 1), residual = random_buffer(dtype, n, 2), weight = random_buffer(dtype, c.width, 3);
    const Buffer bias = random_buffer(dtype, c.width, 4), dy = random_buffer(dtype, n, 5), dsum = random_buffer(dtype, n, 6);
    const auto forward = run_both(what, [&](int threads) {
        std::vector<Buffer> made{Buffer(dtype, c.has_residual ? n : 0), Buffer(dtype, n), Buffer(wide(dtype), c.is_rms ? 0 : c.rows),
                                 Buffer(wide(dtype), c.rows)};
        kernels.norm_forward(code, x.address(), c.has_residual ? residual.address() : 0, weight.address(),
                             c.has_bias ? bias.address() : 0, c.has_residual ? made[0].address() : 0, made[1].address(),
                             c.is_rms ? 0 : made[2].address(), made[3].address(), c.rows, c.width, kEps, threads);
        return made;
    });
    const Buffer& source = c.has_residual ? forward[0] : x;
    const auto backward = run_both(what, [&](int threads) {
        std::vector<Buffer> made{Buffer(dtype, n), Buffer(dtype, c.width), Buffer(dtype, c.has_bias ? c.width : 0)};
        kernels.norm_backward(code, dy.address(), c.has_residual ? dsum.address() : 0, source.address(), weight.address(),
                              c.is_rms ? 0 : forward[2].address(), forward[3].address(), made[0].address(), made[1].address(),
                              c.has_bias ? made[2].address() : 0, c.rows, c.width, threads);
        return made;
    });
    Numbers y, dx, dweight(static_cast<size_t>(c.width), 0.0), dbias = dweight, sum;
    double largest = 1, largest_rstd = 1;
    for (int64_t row = 0; row < c.rows; ++row) {
        auto in = [&](const Buffer& buffer, int64_t i) { return buffer.at(row * c.width + i); };
        double mean = 0, squares = 0, mean_g = 0, mean_gx = 0;
        for (int64_t i = 0; i < c.width; ++i) mean += c.is_rms ? 0 : in(source, i) / static_cast<double>(c.width);
        for (int64_t i = 0; i < c.width; ++i) squares += (in(source, i) - mean) * (in(source, i) - mean);
        const double rstd = 1 / std::sqrt(squares / static_cast<double>(c.width) + kEps);
        largest_rstd = std::max(largest_rstd, rstd);
        auto normal = [&](int64_t i) { return (in(source, i) - mean) * rstd; };
        for (int64_t i = 0; i < c.width; ++i) {
            const double g = in(dy, i) * weight.at(i);
            mean_g += c.is_rms ? 0 : g / static_cast<double>(c.width);
            mean_gx += g * normal(i) / static_cast<double>(c.width);
            dweight[static_cast<size_t>(i)] += in(dy, i) * normal(i);
            dbias[static_cast<size_t>(i)] += in(dy, i);
            largest = std::max(largest, std::abs(normal(i)));
        }
        for (int64_t i = 0; i < c.width; ++i) {
            if (c.has_residual) sum.push_back(in(x, i) + in(residual, i));
            y.push_back(normal(i) * weight.at(i) + (c.has_bias ? bias.at(i) : 0));
            const double g = in(dy, i) * weight.at(i);
            dx.push_back((g - mean_g - normal(i) * mean_gx) * rstd + (c.has_residual ? in(dsum, i) : 0));
        }
    }
    const double rows = static_cast<double>(std::max<int64_t>(c.rows, 1));
    // Where a row is a single number its distance from the mean is 0, and what is left of rounding is multiplied by rstd.
    check_close(what + " sum", forward[0], sum);
    check_close(what + " y", forward[1], y, 8 * largest);
    check_close(what + " dx", backward[0], dx, 16 * largest_rstd * largest);
    check_close(what + " dweight", backward[1], dweight, 4 * rows);
    if (c.has_bias) check_close(what + " dbias", backward[2], dbias, 4 * rows);
}

}  // namespace

void test_norm(const CpuKernels& kernels, DType dtype) {
    for (int64_t rows : {0, 1, 3, 5, 70})
        for (int64_t width : {1, 7, 16, 31, 33, 67, 130}) {
            test_case(kernels, dtype, {rows, width, false, false, true});
            test_case(kernels, dtype, {rows, width, false, true, true});
            test_case(kernels, dtype, {rows, width, true, true, false});
            test_case(kernels, dtype, {rows, width, true, false, false});
        }
    test_case(kernels, dtype, {2049, 2048, false, true, true});  // written past the caches
}

}  // namespace trilith::tests
