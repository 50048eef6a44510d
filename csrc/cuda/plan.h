// How work is dealt to threads: pure functions of sizes, shared with the host's tests.
#pragma once

#include <cstdint>

namespace trilith::cuda {

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// --- rows (norm.cu, softmax.cu) -------------------------------------------------------------------------------------------

// A row that stays in registers: `group` threads hold it, each `packs` packs of 16 bytes, thread t those numbered t, t + group
// and so on. A group is a part of a warp or some warps; a block has `groups` of them, each with rows of its own. A group of 0
// means that rows do not fit, or are not made of packs: a block loops over its row then.
struct RowPlan {
    int group, packs, groups;
};

constexpr int kLoopThreads = 512;

// For rows of `width` elements, `lanes` to a pack. Forward keeps little and uses the widest groups; backward also holds the
// sums of its columns, and has half the threads, each with twice as many packs, for the widest rows.
constexpr RowPlan row_plan(int64_t width, int lanes, bool is_backward) {
    const int64_t packs = ceil_div(width, lanes);
    if (width % lanes != 0 || width == 0) return {0, 0, 0};
    if (packs <= 8 * 2) return {8, 2, is_backward ? 64 : 32};
    if (packs <= 32 * 2) return {32, 2, is_backward ? 16 : 8};
    if (packs <= 128 * 2) return {128, 2, is_backward ? 4 : 2};
    if (packs <= 256 * 2) return {256, 2, is_backward ? 2 : 1};
    if (packs <= 512 * 2) return {512, 2, 1};
    if (packs <= 1024 * 2) return is_backward ? RowPlan{512, 4, 1} : RowPlan{1024, 2, 1};
    return {0, 0, 0};
}

// Blocks that stay, one a multiprocessor at most, where each takes `rows_at_once` rows after another.
constexpr int64_t staying_blocks(int64_t rows, int64_t rows_at_once, int multiprocessors) {
    const int64_t useful = ceil_div(rows, rows_at_once < 1 ? 1 : rows_at_once);
    return useful < 1 ? 1 : useful < multiprocessors ? useful : multiprocessors;
}

// --- tables whose columns are summed while they are read ----------------------------------------------------------------

// A block has kTableThreads neighbouring packs of columns and a run of rows; each thread keeps the sums of its own columns.
constexpr int kTableThreads = 256;

struct TablePlan {
    int column_blocks, row_blocks;
    int64_t rows_per_block;
};

// As many runs of rows as keep all multiprocessors busy with four blocks, but none shorter than 16 rows.
constexpr TablePlan table_plan(int64_t rows, int64_t width, int lanes, int multiprocessors) {
    const int64_t columns = ceil_div(ceil_div(width, lanes), kTableThreads);
    const int64_t wanted = ceil_div(int64_t(4) * multiprocessors, columns < 1 ? 1 : columns), most = ceil_div(rows, 16);
    const int64_t runs = wanted < most ? wanted : (most < 1 ? 1 : most);
    const int64_t each = ceil_div(rows < 1 ? 1 : rows, runs);
    return {static_cast<int>(columns), static_cast<int>(ceil_div(rows < 1 ? 1 : rows, each)), each};
}

}  // namespace trilith::cuda
