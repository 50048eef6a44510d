// Blocked attention under its masks against plain loops in double.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/check.h"

namespace trilith::tests {

namespace {

struct Case {
    int64_t num_queries, num_keys, num_heads, num_kv_heads, features;
    bool causal, has_prefix;
    int64_t window;
    bool has_slopes;
    uint32_t threshold;
    int64_t document = 0, block = 0;  // tokens of a document; scores to a side of a block, of which each head sees some
};

constexpr int64_t kBatch = 2;
constexpr uint32_t kKey[2] = {77, 0x80000001u};

void test_case(const CpuKernels& kernels, DType dtype, const Case& c) {
    const std::string what = std::string(kernels.name) + " attention " + name_of(dtype) + " " + std::to_string(c.num_queries) + " x " +
                             std::to_string(c.num_keys) + " D" + std::to_string(c.features) + (c.causal ? " causal" : "") +
                             (c.has_prefix ? " prefix" : "") + (c.window ? " window" : "") + (c.has_slopes ? " alibi" : "") +
                             (c.threshold ? " dropout" : "") + (c.document ? " documents" : "") + (c.block ? " blocks" : "");
    const int64_t q_row = c.num_heads * c.features, k_row = c.num_kv_heads * c.features;
    const int64_t num_q = kBatch * c.num_queries * q_row, num_k = kBatch * c.num_keys * k_row;
    const Buffer q = random_buffer(dtype, num_q, 1), k = random_buffer(dtype, num_k, 2), v = random_buffer(dtype, num_k, 3);
    const Buffer dout = random_buffer(dtype, num_q, 4);
    const double scale = 1 / std::sqrt(static_cast<double>(c.features));
    const HeadStrides of_q{c.num_queries * q_row, q_row, c.features}, of_k{c.num_keys * k_row, k_row, c.features};
    const AttentionSizes sizes{kBatch, c.num_queries, c.num_keys, c.num_heads, c.num_kv_heads, c.features, scale, of_q, of_k, of_k};
    std::vector<int64_t> kv_index, prefix{1, c.num_keys / 2}, samples{5, int64_t{1} << 33};
    std::vector<double> slopes;
    for (int64_t head = 0; head < c.num_heads; ++head) {
        kv_index.push_back(head * c.num_kv_heads / c.num_heads);
        slopes.push_back(std::exp2(-static_cast<double>(head + 1)));
    }
    auto at = [](const auto& vector) { return reinterpret_cast<Address>(vector.data()); };
    std::vector<int64_t> begins, ends;
    if (c.document)
        for (int64_t i = 0; i < c.num_queries; ++i) {
            begins.push_back(i / c.document * c.document);
            ends.push_back(std::min(begins.back() + c.document, c.num_keys));
        }
    const int64_t block = c.block ? c.block : 16, columns = (c.num_keys + block - 1) / block;
    const int64_t blocks = (c.num_queries + block - 1) / block * columns;
    std::vector<unsigned char> live;
    if (c.block)
        for (int64_t i = 0; i < c.num_heads * blocks; ++i) live.push_back(i % columns == i / columns % columns || i * 7 % 5 < 2);
    const AttentionRule rule{c.causal, c.window, c.has_prefix ? at(prefix) : 0, c.has_slopes ? at(slopes) : 0, 0, 0, 0, 0,
                             c.document ? at(begins) : 0, c.document ? at(ends) : 0, 0, c.block ? at(live) : 0, block, blocks, columns,
                             at(samples), 3, kKey[0], kKey[1], c.threshold};
    const int code = static_cast<int>(dtype);
    const auto forward = run_both(what, [&](int threads) {
        std::vector<Buffer> made{Buffer(dtype, num_q), Buffer(wide(dtype), kBatch * c.num_heads * c.num_queries)};
        kernels.attention_forward(code, sizes, rule, q.address(), k.address(), v.address(), at(kv_index), made[0].address(),
                                  made[1].address(), threads);
        return made;
    });
    const auto backward = run_both(what + " backward", [&](int threads) {
        std::vector<Buffer> made{Buffer(dtype, num_q), Buffer(dtype, num_k), Buffer(dtype, num_k)};
        kernels.attention_backward(code, sizes, rule, q.address(), k.address(), v.address(), at(kv_index), forward[0].address(),
                                   forward[1].address(), dout.address(), made[0].address(), made[1].address(), made[2].address(),
                                   sizes, threads);
        return made;
    });
    std::vector<unsigned char> keep(static_cast<size_t>(kBatch * c.num_heads * c.num_queries * c.num_keys), 1);
    if (c.threshold) {
        std::vector<int64_t> queries;
        for (int64_t i = 0; i < c.num_queries; ++i) queries.push_back(i);
        kernels.attention_keep(at(keep), at(samples), at(queries), kBatch, c.num_heads, c.num_queries, c.num_keys, 3, 0, kKey[0],
                               kKey[1], c.threshold, 1);
    }
    const double kept = 65536.0 / (65536.0 - c.threshold);
    auto zeros = [](int64_t count) { return Numbers(static_cast<size_t>(count), 0.0); };
    Numbers out = zeros(num_q), lse, dq = zeros(num_q), dk = zeros(num_k), dv = zeros(num_k);
    for (int64_t b = 0; b < kBatch; ++b)
        for (int64_t head = 0; head < c.num_heads; ++head)
            for (int64_t i = 0; i < c.num_queries; ++i) {
                const int64_t qi = b * of_q.batch + i * of_q.row + head * c.features;
                auto ki = [&](int64_t j) { return b * of_k.batch + j * of_k.row + kv_index[static_cast<size_t>(head)] * c.features; };
                Numbers weights = zeros(c.num_keys), gradients = weights;
                double most = -std::numeric_limits<double>::infinity(), total = 0, delta = 0;
                auto sees = [&](int64_t j) {
                    if (c.document && i / c.document != j / c.document) return false;
                    if (c.block && !live[static_cast<size_t>(head * blocks + i / block * columns + j / block)]) return false;
                    if (c.has_prefix && j < prefix[static_cast<size_t>(b)]) return true;
                    return (!c.causal || j <= i) && (!c.window || i - j < c.window);
                };
                for (int64_t j = 0; j < c.num_keys; ++j) {
                    double score = 0;
                    for (int64_t d = 0; d < c.features; ++d) score += q.at(qi + d) * k.at(ki(j) + d);
                    weights[static_cast<size_t>(j)] = score * scale + (c.has_slopes ? slopes[static_cast<size_t>(head)] * static_cast<double>(j - i) : 0);
                    if (sees(j)) most = std::max(most, weights[static_cast<size_t>(j)]);
                }
                for (int64_t j = 0; j < c.num_keys; ++j) {
                    double& weight = weights[static_cast<size_t>(j)];
                    weight = sees(j) ? std::exp(weight - most) : 0;
                    total += weight;
                }
                lse.push_back(most + std::log(total));
                for (int64_t j = 0; j < c.num_keys; ++j) {
                    double& weight = weights[static_cast<size_t>(j)];
                    weight /= total;
                    const int64_t place = ((b * c.num_heads + head) * c.num_queries + i) * c.num_keys + j;
                    const double factor = keep[static_cast<size_t>(place)] ? kept : 0;
                    double gradient = 0;
                    for (int64_t d = 0; d < c.features; ++d) {
                        out[static_cast<size_t>(qi + d)] += weight * factor * v.at(ki(j) + d);
                        gradient += dout.at(qi + d) * v.at(ki(j) + d) * factor;
                        dv[static_cast<size_t>(ki(j) + d)] += weight * factor * dout.at(qi + d);
                    }
                    gradients[static_cast<size_t>(j)] = gradient;
                    delta += weight * gradient;
                }
                for (int64_t j = 0; j < c.num_keys; ++j) {
                    const double ds = weights[static_cast<size_t>(j)] * (gradients[static_cast<size_t>(j)] - delta) * scale;
                    for (int64_t d = 0; d < c.features; ++d) {
                        dq[static_cast<size_t>(qi + d)] += ds * k.at(ki(j) + d);
                        dk[static_cast<size_t>(ki(j) + d)] += ds * q.at(qi + d);
                    }
                }
            }
    const double spread = 8 * kept * std::sqrt(static_cast<double>(c.features));
    check_close(what + " out", forward[0], out, 4);
    check_close(what + " lse", forward[1], lse, 4);
    check_close(what + " dq", backward[0], dq, spread);
    check_close(what + " dk", backward[1], dk, spread * 4);
    check_close(what + " dv", backward[2], dv, spread * 4);
}

}  // namespace

void test_attention(const CpuKernels& kernels, DType dtype) {
    for (int64_t features : {1, 7, 16, 33, 64})
        for (int64_t sequence : {1, 5, 64, 67}) test_case(kernels, dtype, {sequence, sequence, 2, 1, features, true, false, 0, false, 0});
    test_case(kernels, dtype, {130, 130, 4, 2, 20, true, false, 0, true, 0});
    test_case(kernels, dtype, {70, 70, 2, 2, 16, true, false, 9, false, 0});
    test_case(kernels, dtype, {70, 70, 2, 1, 16, true, true, 0, false, 0});
    test_case(kernels, dtype, {37, 141, 2, 2, 24, false, false, 0, false, 0});
    test_case(kernels, dtype, {66, 66, 3, 1, 24, true, false, 0, false, 19661});
    test_case(kernels, dtype, {0, 5, 2, 2, 8, false, false, 0, false, 0});
    test_case(kernels, dtype, {150, 150, 2, 1, 16, true, false, 0, false, 0, 41, 0});
    test_case(kernels, dtype, {150, 150, 2, 1, 16, true, false, 0, true, 19661, 0, 16});
    test_case(kernels, dtype, {133, 150, 2, 2, 16, false, false, 0, false, 0, 70, 48});
}

}  // namespace trilith::tests
