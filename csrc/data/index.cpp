#include "data/index.h"

#include <algorithm>
#include <vector>

namespace trilith::data {

int64_t sample_runs(const int64_t* ends, int64_t num_documents, const int64_t* positions, int64_t num_samples, int64_t length,
                    int64_t capacity, int64_t* starts, int64_t* slots, int64_t* offsets, int64_t* lengths) {
    int64_t count = 0;
    for (int64_t sample = 0; sample < num_samples; ++sample) {
        starts[sample] = count;
        int64_t position = positions[sample], missing = length;
        int64_t slot = std::upper_bound(ends, ends + num_documents, position) - ends;
        for (; missing && slot < num_documents; ++slot) {
            const int64_t run = std::min(ends[slot] - position, missing);
            if (!run) continue;  // an empty document
            if (count < capacity) {
                slots[count] = slot;
                offsets[count] = position - (slot ? ends[slot - 1] : 0);
                lengths[count] = run;
            }
            ++count;
            position += run;
            missing -= run;
        }
    }
    starts[num_samples] = count;
    return count;
}

void sample_starts(const int64_t* ends, int64_t num_documents, int64_t stride, int64_t count, int64_t* slots, int64_t* offsets) {
    int64_t slot = 0;
    for (int64_t sample = 0; sample < count; ++sample) {
        const int64_t position = sample * stride;
        while (slot < num_documents && ends[slot] <= position) ++slot;
        slots[sample] = slot;
        offsets[sample] = position - (slot ? ends[slot - 1] : 0);
    }
}

void blend(const double* shares, int64_t num_datasets, int64_t size, int16_t* choices, int64_t* samples) {
    std::vector<int64_t> taken(static_cast<size_t>(num_datasets), 0);
    for (int64_t i = 0; i < size; ++i) {
        const double due = static_cast<double>(std::max<int64_t>(i, 1));
        int64_t furthest = 0;
        double most = shares[0] * due - static_cast<double>(taken[0]);
        for (int64_t dataset = 1; dataset < num_datasets; ++dataset) {
            const double behind = shares[dataset] * due - static_cast<double>(taken[static_cast<size_t>(dataset)]);
            if (behind > most) {
                most = behind;
                furthest = dataset;
            }
        }
        choices[i] = static_cast<int16_t>(furthest);
        samples[i] = taken[static_cast<size_t>(furthest)]++;
    }
}

}  // namespace trilith::data
