// Fibers that stand for the threads of a block (cuda_runtime.h).
//
// A fiber begins as a context of its own; after that it changes hands by _setjmp and _longjmp, which, other than swapcontext, do
// not ask the system to keep the signal mask: two calls at every shuffle of every thread.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace trilith::emulated {

Place now;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32, kBarriers = 17;  // CUDA's sixteen, and one that counts all who live

struct Fiber {
    ucontext_t context;  // where it begins
    jmp_buf here;        // where it goes on
    bool begun = false;
    Place place;
    std::unique_ptr<char[]> stack;
};

struct Barrier {
    std::vector<int> waiting;
    int expected = 0;
};

// One block at a time: the fibers keep their stacks for the next.
std::vector<Fiber> fibers;
std::vector<int> ready;
jmp_buf scheduler;
int current = 0, alive = 0, num_threads = 0;
std::vector<Barrier> barriers;       // of the block
std::vector<uint64_t> lanes;         // what threads hand to each other
const std::function<void()>* body = nullptr;
std::mt19937 draw(1);

void fiber_main() {
    (*body)();
    --alive;
    _longjmp(scheduler, 1);
}

void release(Barrier& barrier) {
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
    barrier.expected = 0;
}

// Gives the processor to another fiber until this one is ready again.
void give_way() {
    if (!_setjmp(fibers[static_cast<size_t>(current)].here)) _longjmp(scheduler, 1);
}

// Lets a fiber run until it gives way or ends.
void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}

void run_block() {
    alive = num_threads;
    ready.clear();
    barriers.assign(kBarriers + static_cast<size_t>(num_threads / kWarp) + 1, {});
    for (int i = 0; i < num_threads; ++i) {
        Fiber& fiber = fibers[static_cast<size_t>(i)];
        fiber.begun = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
        ready.push_back(i);
    }
    while (alive > 0) {
        if (ready.empty()) {
            // Those who wait for all who live may go on once the others have ended.
            if (barriers[0].expected == 0 && static_cast<int>(barriers[0].waiting.size()) == alive) {
                release(barriers[0]);
                continue;
            }
            throw std::runtime_error("the threads of a block wait for each other without end");
        }
        const size_t at = std::uniform_int_distribution<size_t>(0, ready.size() - 1)(draw);
        current = ready[at];
        ready[at] = ready.back();
        ready.pop_back();
        now = fibers[static_cast<size_t>(current)].place;
        resume(fibers[static_cast<size_t>(current)]);
    }
}

}  // namespace

void wait(int id, int count) {
    Barrier& barrier = barriers[static_cast<size_t>(id)];
    if (!barrier.waiting.empty() && barrier.expected != count)
        throw std::runtime_error("threads wait at one barrier for different numbers");
    barrier.expected = count;
    barrier.waiting.push_back(current);
    if (static_cast<int>(barrier.waiting.size()) == (count ? count : alive)) release(barrier);
    give_way();
}

uint64_t exchange(uint64_t bits, int step, int width) {
    const int thread = current, warp = thread / kWarp, first = warp * kWarp;
    const int held = num_threads - first < kWarp ? num_threads - first : kWarp;
    lanes[static_cast<size_t>(thread)] = bits;
    wait(kBarriers + warp, held);
    const int lane = thread % kWarp, other = lane ^ step;
    const uint64_t found = other / width == lane / width && other < held ? lanes[static_cast<size_t>(first + other)] : bits;
    wait(kBarriers + warp, held);
    return found;
}
uint32_t exchange(uint32_t bits, int step, int width) {
    return static_cast<uint32_t>(exchange(static_cast<uint64_t>(bits), step, width));
}

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
    if (block.y != 1 || block.z != 1 || block.x > 1024 || grid.x == 0 || grid.y == 0)
        throw std::runtime_error("a launch that CUDA would refuse, or that is not emulated");
    num_threads = static_cast<int>(block.x);
    body = &thread;
    while (static_cast<int>(fibers.size()) < num_threads) {
        fibers.emplace_back();
        fibers.back().stack.reset(new char[kStackBytes]);
    }
    lanes.resize(static_cast<size_t>(num_threads));
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                for (unsigned i = 0; i < block.x; ++i) fibers[i].place = {dim3(i), dim3(x, y, z), block, grid};
                run_block();
            }
}

}  // namespace trilith::emulated
