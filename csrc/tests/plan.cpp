// How the CUDA kernels deal work to threads: every width has a plan that covers it once, within what a block may have.
#include "cuda/plan.h"

#include <algorithm>

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

}  // namespace

void test_plans() {
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
