// Activations, gated units and rotary against plain loops in double.
#include <cmath>

#include "tests/check.h"

namespace trilith::tests {

namespace {

struct Point {
    double value, slope;
};

Point evaluate(int kind, double x) {
    if (kind == 0) {
        const double cumulative = 0.5 * std::erfc(-x / std::sqrt(2.0)), density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
        return {x * cumulative, cumulative + x * density};
    }
    const double a = std::sqrt(2 / M_PI), b = 0.044715;
    const double u = kind == 1 ? 2 * a * (x + b * x * x * x) : x, du = kind == 1 ? 2 * a * (1 + 3 * b * x * x) : 1;
    const double sigmoid = 1 / (1 + std::exp(-u));
    return {x * sigmoid, sigmoid + x * sigmoid * (1 - sigmoid) * du};
}

std::string name_of_case(const CpuKernels& kernels, const char* op, DType dtype, int64_t rows, int64_t width, int kind) {
    return std::string(kernels.name) + " " + op + " " + name_of(dtype) + " " + std::to_string(rows) + " x " + std::to_string(width) +
           " kind " + std::to_string(kind);
}

void test_alone(const CpuKernels& kernels, DType dtype, int64_t rows, int64_t width, int kind, bool has_bias) {
    const std::string what = name_of_case(kernels, "activation", dtype, rows, width, kind);
    const int64_t n = rows * width;
    const int code = static_cast<int>(dtype);
    Buffer x = random_buffer(dtype, n, 1);
    const Buffer bias = random_buffer(dtype, width, 2), dy = random_buffer(dtype, n, 3);
    if (n > 3) x.set(0, 300), x.set(1, -300), x.set(2, 0);
    const auto made = run_both(what, [&](int threads) {
        std::vector<Buffer> out{Buffer(dtype, n), Buffer(dtype, n), Buffer(dtype, has_bias ? width : 0)};
        kernels.activation_forward(code, kind, x.address(), has_bias ? bias.address() : 0, out[0].address(), rows, width, threads);
        kernels.activation_backward(code, kind, dy.address(), x.address(), has_bias ? bias.address() : 0, out[1].address(),
                                    has_bias ? out[2].address() : 0, rows, width, threads);
        return out;
    });
    Numbers y, dx, dbias(static_cast<size_t>(has_bias ? width : 0), 0.0);
    for (int64_t i = 0; i < n; ++i) {
        const Point at = evaluate(kind, x.at(i) + (has_bias ? bias.at(i % width) : 0));
        y.push_back(at.value);
        dx.push_back(dy.at(i) * at.slope);
        if (has_bias) dbias[static_cast<size_t>(i % width)] += dx.back();
    }
    check_close(what + " y", made[0], y, 4);
    check_close(what + " dx", made[1], dx, 4);
    check_close(what + " dbias", made[2], dbias, 4 * static_cast<double>(rows));
    Buffer in_place(dtype, x.values());
    kernels.activation_forward(code, kind, in_place.address(), has_bias ? bias.address() : 0, in_place.address(), rows, width, 2);
    check(in_place.same_bits(made[0]), what + " in place");
}

void test_gated(const CpuKernels& kernels, DType dtype, int64_t rows, int64_t width, int kind, bool is_packed) {
    const std::string what = name_of_case(kernels, is_packed ? "packed glu" : "glu", dtype, rows, width, kind);
    const int64_t n = rows * width, stride = is_packed ? 2 * width : width;
    const int code = static_cast<int>(dtype), element = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    const Buffer gate_up = random_buffer(dtype, 2 * n, 4), dy = random_buffer(dtype, n, 5);
    const int64_t up_at = is_packed ? width : n;
    auto up_of = [&](const Buffer& buffer) { return buffer.address() + static_cast<Address>(up_at * element); };
    const auto made = run_both(what, [&](int threads) {
        std::vector<Buffer> out{Buffer(dtype, n), Buffer(dtype, 2 * n)};
        kernels.glu_forward(code, kind, gate_up.address(), up_of(gate_up), out[0].address(), rows, width, stride, stride, threads);
        kernels.glu_backward(code, kind, dy.address(), gate_up.address(), up_of(gate_up), out[1].address(), up_of(out[1]), rows,
                             width, stride, stride, stride, threads);
        return out;
    });
    Numbers y, gradients(static_cast<size_t>(2 * n));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < width; ++i) {
            const int64_t at = row * stride + i;
            const Point gate = evaluate(kind, gate_up.at(at));
            const double up = gate_up.at(at + up_at), d = dy.at(row * width + i);
            y.push_back(gate.value * up);
            gradients[static_cast<size_t>(at)] = d * up * gate.slope;
            gradients[static_cast<size_t>(at + up_at)] = d * gate.value;
        }
    check_close(what + " y", made[0], y, 4);
    check_close(what + " gradients", made[1], gradients, 8);
}

void test_turn(const CpuKernels& kernels, DType dtype, int64_t batch, int64_t length, int64_t heads, int64_t half, bool per_sample,
               bool inverse) {
    const std::string what = name_of_case(kernels, "rotary", dtype, length, half, per_sample);
    // x lies as the second of three parts of a packed product.
    const int64_t features = 2 * half, x_position = 3 * heads * features, n = batch * length * heads * features;
    const Buffer x = random_buffer(dtype, batch * length * x_position, 6);
    const int64_t table = (per_sample ? batch : 1) * length * half;
    const Buffer cos = random_buffer(wide(dtype), table, 7), sin = random_buffer(wide(dtype), table, 8);
    const int element = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    const auto made = run_both(what, [&](int threads) {
        std::vector<Buffer> out{Buffer(dtype, n)};
        kernels.rotary(static_cast<int>(dtype), x.address() + static_cast<Address>(heads * features * element), out[0].address(),
                       cos.address(), sin.address(), batch, length, heads, half, length * x_position, x_position, features,
                       length * heads * features, heads * features, features, per_sample ? length * half : 0, inverse, threads);
        return out;
    });
    Numbers y;
    for (int64_t row = 0; row < batch * length; ++row)
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t i = 0; i < features; ++i) {
                const int64_t pair = i % half, at = (per_sample ? row : row % length) * half + pair;
                const int64_t from = row * x_position + heads * features + head * features;
                const double sine = sin.at(at) * (inverse ? -1 : 1) * (i < half ? -1 : 1);
                y.push_back(x.at(from + i) * cos.at(at) + x.at(from + (i + half) % features) * sine);
            }
    check_close(what, made[0], y, 8);
}

}  // namespace

void test_activation(const CpuKernels& kernels, DType dtype) {
    for (int kind = 0; kind < 3; ++kind)
        for (int64_t rows : {0, 1, 5, 70})
            for (int64_t width : {1, 15, 16, 33, 129}) {
                test_alone(kernels, dtype, rows, width, kind, false);
                test_alone(kernels, dtype, rows, width, kind, true);
                test_gated(kernels, dtype, rows, width, kind, false);
                test_gated(kernels, dtype, rows, width, kind, true);
            }
}

void test_rotary(const CpuKernels& kernels, DType dtype) {
    for (int64_t half : {1, 3, 16, 33})
        for (int64_t length : {0, 1, 7}) {
            test_turn(kernels, dtype, 2, length, 3, half, false, false);
            test_turn(kernels, dtype, 2, length, 1, half, true, true);
        }
}

}  // namespace trilith::tests
