// Adam, Lion and SGD over slices of flat buffers against plain loops in double, and the sum of squares.
#include <cmath>
#include <limits>

#include "tests/check.h"

namespace trilith::tests {

namespace {

enum Kind { kAdam, kAdamW, kLion, kSgd, kNesterov, kPlainSgd };
constexpr const char* kNames[] = {"adam", "adamw", "lion", "sgd", "nesterov", "plain sgd"};

struct Case {
    Kind kind;
    DType master, gradient, state, weight;
    bool has_weight, zeroes;
    std::vector<int64_t> sizes;
};

constexpr double kLr = 0.125, kClip = 0.5, kScale = 4, kBeta1 = 0.875, kBeta2 = 0.75, kEps = 1e-3, kDecay = 0.25;
constexpr double kMomentum = 0.5, kDampening = 0.25, kStep = 3;

struct Element {
    double p, g, m, v;
};

// One element's step in double.
void step(Kind kind, Element& e, double lr, double decay) {
    const double g = e.g / kScale * kClip, c1 = 1 - std::pow(kBeta1, kStep), c2 = 1 - std::pow(kBeta2, kStep);
    if (kind == kAdam || kind == kAdamW) {
        const double given = kind == kAdam ? g + decay * e.p : g;
        e.m = kBeta1 * e.m + (1 - kBeta1) * given;
        e.v = kBeta2 * e.v + (1 - kBeta2) * given * given;
        const double p = kind == kAdamW ? e.p * (1 - lr * decay) : e.p;
        e.p = p - lr * (e.m / c1) / (std::sqrt(e.v / c2) + kEps);
    } else if (kind == kLion) {
        const double toward = kBeta1 * e.m + (1 - kBeta1) * g;
        e.p = e.p * (1 - lr * decay) - lr * (toward > 0 ? 1 : toward < 0 ? -1 : 0);
        e.m = kBeta2 * e.m + (1 - kBeta2) * g;
    } else {
        double given = g + decay * e.p;
        if (kind != kPlainSgd) {
            e.m = kMomentum * e.m + (1 - kDampening) * given;
            given = kind == kNesterov ? given + kMomentum * e.m : e.m;
        }
        e.p -= lr * given;
    }
}

void test_case(const CpuKernels& kernels, const Case& c) {
    const std::string what = std::string(kernels.name) + " " + kNames[c.kind] + " " + name_of(c.master) + " gradient " +
                             name_of(c.gradient) + " states " + name_of(c.state) + (c.zeroes ? " zeroes" : "");
    const int num_states = c.kind == kPlainSgd ? 0 : c.kind == kAdam || c.kind == kAdamW ? 2 : 1;
    const auto count = static_cast<int64_t>(c.sizes.size());
    std::vector<Buffer> masters, gradients, firsts, seconds;
    std::vector<double> multipliers;
    for (int64_t s = 0; s < count; ++s) {
        const auto seed = static_cast<uint64_t>(10 * s);
        const int64_t n = c.sizes[static_cast<size_t>(s)];
        masters.push_back(random_buffer(c.master, n, seed + 1));
        gradients.push_back(random_buffer(c.gradient, n, seed + 2));
        firsts.push_back(random_buffer(c.state, n, seed + 3));
        Numbers squares = random_numbers(n, seed + 4);
        for (double& square : squares) square = square * square;
        seconds.push_back(Buffer(c.state, squares));
        multipliers.insert(multipliers.end(), {1.0 + static_cast<double>(s), s % 2 ? 0.0 : 1.0});
    }
    const double now[6] = {kLr, kClip, kScale, 1 - std::pow(kBeta1, kStep), 1 - std::pow(kBeta2, kStep), 0};
    // The results: of each slice master, gradient, first and second state, and the module's weights.
    const auto made = run_both(what, [&](int threads) {
        std::vector<Buffer> out;
        std::vector<int64_t> table;
        for (int64_t s = 0; s < count; ++s) {
            const auto i = static_cast<size_t>(s);
            for (const Buffer* from : {&masters[i], &gradients[i], &firsts[i], &seconds[i]})
                out.push_back(Buffer(from->dtype(), from->values()));
            out.push_back(Buffer(c.weight, c.has_weight ? c.sizes[i] : 0));
            const Buffer* mine = &out[out.size() - 5];
            for (int k = 0; k < 5; ++k) {
                const bool is_there = k < 2 || (k < 4 ? k - 2 < num_states : c.has_weight);
                table.push_back(is_there ? static_cast<int64_t>(mine[k].address()) : 0);
            }
            table.push_back(c.sizes[i]);
        }
        const auto slices = reinterpret_cast<Address>(table.data()), groups = reinterpret_cast<Address>(multipliers.data());
        const auto step_values = reinterpret_cast<Address>(now);
        const int codes[] = {static_cast<int>(c.master), static_cast<int>(c.gradient), static_cast<int>(c.state),
                             static_cast<int>(c.weight)};
        if (c.kind == kAdam || c.kind == kAdamW)
            kernels.adam(codes[0], codes[1], codes[2], codes[3], slices, groups, count, step_values, kBeta1, kBeta2, kEps, kDecay,
                         c.kind == kAdamW, c.zeroes, threads);
        else if (c.kind == kLion)
            kernels.lion(codes[0], codes[1], codes[2], codes[3], slices, groups, count, step_values, kBeta1, kBeta2, kDecay,
                         c.zeroes, threads);
        else
            kernels.sgd(codes[0], codes[1], codes[2], codes[3], slices, groups, count, step_values,
                        c.kind == kPlainSgd ? 0 : kMomentum, kDampening, kDecay, c.kind == kNesterov, c.zeroes, threads);
        return out;
    });
    for (int64_t s = 0; s < count; ++s) {
        const auto i = static_cast<size_t>(s);
        Numbers p, m, v;
        for (int64_t k = 0; k < c.sizes[i]; ++k) {
            Element e{masters[i].at(k), gradients[i].at(k), firsts[i].at(k), seconds[i].at(k)};
            step(c.kind, e, kLr * multipliers[2 * i], kDecay * multipliers[2 * i + 1]);
            p.push_back(e.p), m.push_back(e.m), v.push_back(e.v);
        }
        const Buffer* mine = &made[5 * i];
        check_close(what + " weights", mine[0], p, 16);
        if (num_states > 0) check_close(what + " first state", mine[2], m, 8);
        if (num_states > 1) check_close(what + " second state", mine[3], v, 8);
        if (c.has_weight) check_close(what + " copy", mine[4], mine[0].values(), 1);
        for (int64_t k = 0; k < c.sizes[i]; ++k)
            check(mine[1].at(k) == (c.zeroes ? 0 : gradients[i].at(k)), what + " gradient");
    }
}

void test_squares(const CpuKernels& kernels, DType dtype) {
    const std::string what = std::string(kernels.name) + " sum of squares " + name_of(dtype);
    std::vector<Buffer> runs;
    std::vector<int64_t> table;
    double expected = 0;
    for (int64_t n : {0, 1, 63, 64, 65, 1000, (1 << 16) + 3}) {
        runs.push_back(random_buffer(dtype, n, static_cast<uint64_t>(n)));
        table.insert(table.end(), {static_cast<int64_t>(runs.back().address()), n});
        for (double x : runs.back().values()) expected += x * x;
    }
    auto sum = [&](int threads) {
        std::vector<Buffer> total{Buffer(DType::f64, 1)};
        kernels.sum_of_squares(static_cast<int>(dtype), reinterpret_cast<Address>(table.data()),
                               static_cast<int64_t>(runs.size()), total[0].address(), threads);
        return total;
    };
    check_close(what, run_both(what, sum)[0], {expected}, 1e5);
    runs[3].set(5, std::numeric_limits<double>::infinity());
    check(!std::isfinite(sum(1)[0].at(0)), what + " of infinity");
}

}  // namespace

void test_optimizer(const CpuKernels& kernels, DType dtype) {
    test_squares(kernels, dtype);
    // `dtype` is that of the gradients; weights and states in fp64 go together.
    for (Kind kind : {kAdam, kAdamW, kLion, kSgd, kNesterov, kPlainSgd}) {
        test_case(kernels, {kind, DType::f32, dtype, DType::f32, DType::bf16, true, false, {0, 1, 7, 33, 1029}});
        test_case(kernels, {kind, DType::f32, dtype, DType::bf16, DType::f16, true, true, {1031, 5}});
        test_case(kernels, {kind, DType::f64, dtype, DType::f64, DType::f32, false, true, {66, 2}});
    }
}

}  // namespace trilith::tests
