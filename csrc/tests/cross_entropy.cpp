// Cross-entropy, whole and in its vocabulary-parallel parts, against plain loops in double.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/check.h"

namespace trilith::tests {

namespace {

void test_case(const CpuKernels& kernels, DType dtype, int64_t tokens, int64_t valid, int64_t padding, int64_t first_label) {
    const int64_t width = valid + padding, stride = width + 3;
    const std::string what = std::string(kernels.name) + " cross-entropy " + name_of(dtype) + " " + std::to_string(tokens) + " x " +
                             std::to_string(valid) + " of " + std::to_string(width);
    const int code = static_cast<int>(dtype);
    // The last row ends with its logits: nothing behind it may be read.
    const int64_t n = tokens ? (tokens - 1) * stride + width : 0;
    const Buffer logits = random_buffer(dtype, n, 1), scale = random_buffer(wide(dtype), tokens, 2);
    std::vector<int64_t> labels;
    for (int64_t token = 0; token < tokens; ++token) labels.push_back(first_label + (token * 7) % valid);
    if (tokens > 2 && first_label) labels[1] = first_label - 1, labels[2] = first_label + valid;  // of other ranks
    const Address at = reinterpret_cast<Address>(labels.data());
    const auto made = run_both(what, [&](int threads) {
        std::vector<Buffer> out;
        for (int i = 0; i < 5; ++i) out.emplace_back(wide(dtype), tokens);
        out.emplace_back(dtype, tokens * width);
        kernels.logit_max(code, logits.address(), stride, valid, tokens, out[4].address(), threads);
        kernels.cross_entropy_terms(code, logits.address(), stride, at, first_label, valid, tokens, true, out[0].address(),
                                    out[1].address(), out[2].address(), out[3].address(), threads);
        kernels.cross_entropy_gradient(code, logits.address(), stride, at, first_label, valid, width, tokens, out[0].address(),
                                       out[1].address(), scale.address(), 0, out[5].address(), width, threads);
        return out;
    });
    Numbers most, total, target, losses, gradient;
    for (int64_t token = 0; token < tokens; ++token) {
        auto logit = [&](int64_t i) { return logits.at(token * stride + i); };
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int64_t i = 0; i < valid; ++i) largest = std::max(largest, logit(i));
        for (int64_t i = 0; i < valid; ++i) sum += std::exp(logit(i) - largest);
        const int64_t label = labels[static_cast<size_t>(token)] - first_label;
        const bool is_here = label >= 0 && label < valid;
        most.push_back(largest);
        total.push_back(sum);
        target.push_back(is_here ? logit(label) - largest : 0);
        losses.push_back(is_here ? std::log(sum) - target.back() : 0);
        for (int64_t i = 0; i < width; ++i)
            gradient.push_back(i < valid ? (std::exp(logit(i) - largest) / sum - (i == label ? 1 : 0)) * scale.at(token) : 0);
    }
    check_close(what + " logit_max", made[4], most);
    check_close(what + " most", made[0], most);
    check_close(what + " total", made[1], total, static_cast<double>(valid));
    check_close(what + " target", made[2], target);
    check_close(what + " losses", made[3], losses, 4);
    check_close(what + " gradient", made[5], gradient);
    if (first_label) return;
    for (double z_loss : {0.0, 0.25}) {
        const auto fused = run_both(what + " fused", [&](int threads) {
            std::vector<Buffer> out;
            out.emplace_back(dtype, logits.values());
            out.emplace_back(wide(dtype), tokens);
            kernels.cross_entropy_fused(code, out[0].address(), stride, at, first_label, valid, width, tokens, z_loss,
                                        scale.address(), out[1].address(), threads);
            return out;
        });
        Numbers expected = logits.values(), with_z = losses;
        for (int64_t token = 0; token < tokens; ++token) {
            const auto t = static_cast<size_t>(token);
            const double normaliser = std::log(total[t]) + most[t], factor = 2 * z_loss * normaliser;
            with_z[t] += z_loss * normaliser * normaliser;
            for (int64_t i = 0; i < width; ++i) {
                const double softmax = i < valid ? std::exp(logits.at(token * stride + i) - most[t]) / total[t] : 0;
                expected[static_cast<size_t>(token * stride + i)] =
                    gradient[static_cast<size_t>(token * width + i)] + softmax * factor * scale.at(token);
            }
        }
        check_close(what + " fused losses", fused[1], with_z, 16);
        check_close(what + " fused gradient", fused[0], expected, 4);
    }
}

}  // namespace

void test_cross_entropy(const CpuKernels& kernels, DType dtype) {
    for (int64_t tokens : {0, 1, 3, 40})
        for (int64_t valid : {1, 5, 16, 33, 250})
            for (int64_t padding : {0, 6}) {
                test_case(kernels, dtype, tokens, valid, padding, 0);
                test_case(kernels, dtype, tokens, valid, padding, 1000);
            }
}

}  // namespace trilith::tests
