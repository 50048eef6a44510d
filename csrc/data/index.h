// Which tokens a sample holds, and which data set it comes from: the loops of data/index.py, which says what they mean.
#pragma once

#include <cstdint>

namespace trilith::data {

// The documents that make up `length` tokens from each of `positions` (num_samples) of a stream on. `ends` (num_documents): where
// each document ends in the stream, never decreasing; all positions + length lie within the last. Sample i has the runs
// [starts[i], starts[i + 1]); run r is lengths[r] tokens of document slots[r] from its token offsets[r] on. Returns the
// number of runs; what does not fit into `capacity` runs is counted only. `starts` (num_samples + 1).
int64_t sample_runs(const int64_t* ends, int64_t num_documents, const int64_t* positions, int64_t num_samples, int64_t length,
                    int64_t capacity, int64_t* starts, int64_t* slots, int64_t* offsets, int64_t* lengths);

// The document and the offset in it where each of `count` samples begins that lie `stride` tokens apart: one walk.
void sample_starts(const int64_t* ends, int64_t num_documents, int64_t stride, int64_t count, int64_t* slots, int64_t* offsets);

// Sample after sample from the data set that is furthest behind its share: choices[i] is the data set, samples[i] the
// number of the sample within it. `shares` (num_datasets) sum to 1.
void blend(const double* shares, int64_t num_datasets, int64_t size, int16_t* choices, int64_t* samples);

}  // namespace trilith::data
