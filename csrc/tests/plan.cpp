// How the CUDA kernels deal work to threads: every width has a plan that covers it once, within what a block may have.
#include "cuda/plan.h"

#include <algorithm>
#include <vector>

#include "cuda/attention_plan.h"

#include "tests/check.h"

namespace trilith::tests {

namespace {

void test_rows(int64_t width, int lanes, bool is_backward) {
    const cuda::RowPlan plan = cuda::row_plan(width, lanes, is_backward);
    const std::string what = "row plan of " + std::to_string(width) + " in packs of " + std::to_string(lanes);
    const int64_t packs = width / lanes, most = is_backward ? 512 * 4 : 1024 * 2;
    check((plan.group > 0) == (width > 0 && width % lanes == 0 && packs <= most), what + ": rows of whole packs are held");
    if (plan.group == 0) return;
    const int64_t threads = int64_t(plan.group) * plan.groups, held = int64_t(plan.group) * plan.packs;
    check(held >= packs, what + ": the threads hold the row");
    check(packs > held / 4 || plan.group == 8, what + ": most of them are needed");
    check(threads <= (is_backward ? 512 : 1024) && threads % 32 == 0, what + ": a block of whole warps");
    // Named barriers are 1 to 15, one a group of several warps.
    check(plan.group <= 32 ? 32 % plan.group == 0 : plan.group % 32 == 0 && plan.groups <= 15, what + ": groups can wait");
    // The groups of a backward add their columns in shared memory.
    if (is_backward && plan.groups > 1) check(2 * held * lanes * 4 <= 48 << 10, what + ": columns fit into shared memory");
}

void test_table(int64_t rows, int64_t width, int lanes, int multiprocessors) {
    const cuda::TablePlan plan = cuda::table_plan(rows, width, lanes, multiprocessors);
    const std::string what = "table plan of " + std::to_string(rows) + " x " + std::to_string(width);
    check(int64_t(plan.column_blocks) * cuda::kTableThreads * lanes >= width, what + ": columns are covered");
    check(int64_t(plan.column_blocks - 1) * cuda::kTableThreads * lanes < std::max<int64_t>(width, 1), what + ": none twice");
    check(plan.row_blocks * plan.rows_per_block >= rows, what + ": rows are covered");
    check((plan.row_blocks - 1) * plan.rows_per_block < std::max<int64_t>(rows, 1), what + ": no run is empty");
    check(plan.row_blocks >= 1 && plan.row_blocks <= 65535, what + ": the grid is allowed");
}

// Which tiles of scores are visited, against every score looked at by itself.
void test_visits(const AttentionRule& rule, int num_queries, int num_keys, int rows, int columns, const std::string& what) {
    for (int row = 0; row < num_queries; row += rows)
        for (int column = 0; column < num_keys; column += columns) {
            const int row_end = std::min(row + rows, num_queries), column_end = std::min(column + columns, num_keys);
            const cuda::Hull hull = cuda::hull_of_rows(rule, 0, row, row_end, num_keys);
            const cuda::Keys keys = cuda::keys_of(rule, 0, column, column_end);
            bool some = false, all = true, some_live = false;
            for (int i = row; i < row_end; ++i)
                for (int j = column; j < column_end; ++j) {
                    const cuda::Row r = cuda::row_of(rule, 0, i, num_keys);
                    const int at = cuda::position_of(rule.key_positions, 0, 0, j);
                    const bool seen = at >= r.first && at <= r.last && j >= r.begin && j < r.end;
                    const auto* live = (const uint8_t*)rule.live;
                    some_live = some_live || !live || live[i / rule.block * rule.live_columns + j / rule.block];
                    some = some || seen, all = all && seen;
                }
            check(!some || cuda::is_seen(hull, keys), what + ": no tile is left out");
            check(!cuda::is_seen_whole(hull, keys) || all, what + ": whole tiles are whole");
            check(cuda::is_live(rule, 0, row, row_end, column, column_end) == some_live, what + ": live tiles");
            // Where positions count through, no tile is visited for nothing, and each whole one is known.
            if (rule.query_positions || rule.key_positions || rule.key_begins) continue;
            check(some == cuda::is_seen(hull, keys) && all == cuda::is_seen_whole(hull, keys), what + ": exactly");
        }
}

void test_attention() {
    for (int features : {8, 64, 72, 96, 104, 128, 136, 256}) {
        const int padded = cuda::padded_features(features);
        check(padded >= features && padded % 16 == 0, "attention features");
        const cuda::AttentionShape shapes[3] = {cuda::forward_shape(padded), cuda::query_shape(padded), cuda::key_shape(padded)};
        for (int i = 0; i < 3; ++i) {
            check(cuda::attention_bytes(shapes[i], i > 0) <= 163 << 10, "attention: what a block of an A100 may have");
            check(shapes[i].columns % 16 == 0 && shapes[i].stride / 8 % 2 == 1, "attention: rows lie in different banks");
        }
    }
    const int promised[4][4] = {{64, 36, 72, 54}, {96, 52, 104, 78}, {128, 68, 136, 102}, {256, 66, 132, 99}};  // attention_plan.h
    for (const auto& row : promised) {
        check(cuda::attention_bytes(cuda::forward_shape(row[0]), false) == row[1] << 10, "attention: KiB of forward");
        check(cuda::attention_bytes(cuda::query_shape(row[0]), true) == row[2] << 10, "attention: KiB of queries' gradients");
        check(cuda::attention_bytes(cuda::key_shape(row[0]), true) == row[3] << 10, "attention: KiB of keys' gradients");
    }
    check(cuda::padded_features(4) == 0 && cuda::padded_features(264) == 0 && cuda::padded_features(68) == 0, "no such features");
    const int length = 150;
    std::vector<int64_t> prefix{70}, shuffled, begins, ends;
    std::vector<uint8_t> live;
    for (int i = 0; i < length; ++i) {
        shuffled.push_back(i * 37 % length);
        begins.push_back(i / 40 * 40), ends.push_back(std::min((i / 40 + 1) * 40, length));
    }
    for (int i = 0; i < 10 * 10; ++i) live.push_back(i * 7 % 5 == 0);
    AttentionRule full{};
    full.block = 16, full.live_columns = 10;
    AttentionRule causal = full, window = full, both = full, prefixed = full, moved = full, documents = full, blocks = full;
    causal.causal = true;
    window.causal = true, window.window = 30;
    both.window = 9;
    prefixed.causal = true, prefixed.prefix = (Address)prefix.data();
    moved.causal = true, moved.query_positions = moved.key_positions = (Address)shuffled.data();
    documents.causal = true, documents.key_begins = (Address)begins.data(), documents.key_ends = (Address)ends.data();
    blocks.live = (Address)live.data();
    const AttentionRule rules[] = {full, causal, window, both, prefixed, moved, documents, blocks};
    const char* names[] = {"full", "causal", "window", "both ways", "prefix", "shuffled", "documents", "blocks"};
    for (int i = 0; i < 8; ++i)
        for (int rows : {32, 64, 128})
            for (int columns : {32, 64, 128}) test_visits(rules[i], length, length, rows, columns, names[i]);
}

}  // namespace

void test_plans() {
    test_attention();
    for (int lanes : {4, 8})
        for (bool is_backward : {false, true}) {
            for (int64_t width = 0; width <= 2100; ++width) test_rows(width, lanes, is_backward);
            for (int64_t width = 2100; width <= 70000; width += 61) test_rows(width, lanes, is_backward);
            for (int64_t width = 1024; width <= 65536; width *= 2)
                for (int64_t near : {width - lanes, width, width + lanes}) test_rows(near, lanes, is_backward);
        }
    for (int lanes : {1, 4, 8})
        for (int multiprocessors : {1, 108, 132})
            for (int64_t rows : {0, 1, 15, 16, 17, 100, 4096, 1000003})
                for (int64_t width : {1, 8, 255, 2048, 16384, 65537}) test_table(rows, width, lanes, multiprocessors);
    for (int64_t rows : {0, 1, 5, 132, 133, 100000})
        for (int64_t at_once : {0, 1, 4, 64}) {
            const int64_t blocks = cuda::staying_blocks(rows, at_once, 132);
            check(blocks >= 1 && blocks <= 132 && (blocks == 132 || blocks * std::max<int64_t>(at_once, 1) >= rows),
                  "staying blocks of " + std::to_string(rows));
        }
}

}  // namespace trilith::tests
