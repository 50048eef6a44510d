// The index builders against what they mean, written as plainly as can be.
#include "data/index.h"

#include <vector>

#include "tests/check.h"

namespace trilith::tests {

namespace {

using Ints = std::vector<int64_t>;

void check_runs(const Ints& lengths, const Ints& positions, int64_t length) {
    Ints ends, documents, offsets;  // the latter of every token
    for (size_t document = 0; document < lengths.size(); ++document) {
        for (int64_t i = 0; i < lengths[document]; ++i) {
            documents.push_back(static_cast<int64_t>(document));
            offsets.push_back(i);
        }
        ends.push_back(static_cast<int64_t>(documents.size()));
    }
    const int64_t n = static_cast<int64_t>(positions.size()), num_documents = static_cast<int64_t>(ends.size());
    Ints starts(positions.size() + 1, -1);
    const int64_t count =
        data::sample_runs(ends.data(), num_documents, positions.data(), n, length, 0, starts.data(), nullptr, nullptr, nullptr);
    const size_t size = static_cast<size_t>(count);
    Ints slots(size), at(size), counts(size);
    check(data::sample_runs(ends.data(), num_documents, positions.data(), n, length, count, starts.data(), slots.data(), at.data(),
                            counts.data()) == count,
          "runs: counted and made");
    check(starts.front() == 0 && starts.back() == count, "runs: starts");
    for (size_t sample = 0; sample < positions.size(); ++sample) {
        int64_t token = positions[sample];
        for (int64_t run = starts[sample]; run < starts[sample + 1]; ++run)
            for (int64_t i = 0; i < counts[static_cast<size_t>(run)]; ++i, ++token)
                check(documents[static_cast<size_t>(token)] == slots[static_cast<size_t>(run)] &&
                          offsets[static_cast<size_t>(token)] == at[static_cast<size_t>(run)] + i,
                      "runs: token " + std::to_string(token));
        check(token == positions[sample] + length, "runs: length");
    }
    const int64_t samples = length > 1 ? (static_cast<int64_t>(documents.size()) - 1) / (length - 1) + 1 : 0;
    Ints first(static_cast<size_t>(samples)), in(static_cast<size_t>(samples));
    data::sample_starts(ends.data(), num_documents, length - 1, samples, first.data(), in.data());
    for (int64_t i = 0; i < samples; ++i) {
        const size_t token = static_cast<size_t>(i * (length - 1));
        check(first[static_cast<size_t>(i)] == documents[token] && in[static_cast<size_t>(i)] == offsets[token], "starts");
    }
}

}  // namespace

void test_data() {
    check_runs({5, 0, 3, 1, 0, 20}, {0, 4, 5, 7, 20, 24}, 5);
    check_runs({0, 0, 4}, {0}, 4);
    check_runs({1, 1, 1, 1}, {3, 0, 1}, 1);
    check_runs({9}, {}, 3);
    for (int64_t size : {0, 1, 7, 500}) {
        const double shares[] = {0.5, 0.25, 0.15, 0.1};
        std::vector<int16_t> choices(static_cast<size_t>(size));
        Ints samples(static_cast<size_t>(size)), taken(4, 0);
        data::blend(shares, 4, size, choices.data(), samples.data());
        for (size_t i = 0; i < choices.size(); ++i) check(samples[i] == taken[static_cast<size_t>(choices[i])]++, "blend: in order");
        for (size_t i = 0; i < 4; ++i) {
            const double behind = shares[i] * static_cast<double>(size) - static_cast<double>(taken[i]);
            check(behind < 2 && behind > -2, "blend: shares are kept");
        }
    }
}

}  // namespace trilith::tests
