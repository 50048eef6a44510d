// Fibers that stand for the threads of a block (cuda_runtime.h).
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "emulator.h"

namespace trilith::emulated {

Place now;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32, kBarriers = 17;  // CUDA's sixteen, and one that counts all who live
constexpr long kMostTurns = 1000000;

// A fiber begins as a context; from then on it is left and entered by jumps, which make no call of the system.
struct Fiber {
    ucontext_t context;
    jmp_buf place_left;
    bool has_begun = false;
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
ucontext_t scheduler;
jmp_buf scheduler_left;
int current = 0, alive = 0, num_threads = 0;
std::vector<Barrier> barriers;       // of the block
// What the lanes of each warp hand to each other. Two sets in turn: who writes one has seen all lanes come for the other, and so
// leave this one.
struct alignas(8) Handed {
    unsigned char bytes[40];
};
std::vector<Handed> handed;
std::vector<unsigned> turns;  // of each thread
std::vector<unsigned char> shared_memory;

struct Copy {
    void* to;
    const void* from;  // null: zeros
    bool wanted;
};
std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, its groups; the last is open
const std::function<void()>* body = nullptr;
long num_turns = 0;  // of threads that came again in vain
std::mt19937 draw(1);
std::exception_ptr failure;  // of a thread: exceptions do not leave a fiber

void fiber_main() {
    try {
        (*body)();
    } catch (...) {
        failure = std::current_exception();
    }
    --alive;
    _longjmp(scheduler_left, 1);
}

void release(Barrier& barrier) {
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
    barrier.expected = 0;
    num_turns = 0;
}

// Gives the processor to another fiber until this one is ready again.
void give_way() {
    if (_setjmp(fibers[static_cast<size_t>(current)].place_left) == 0) _longjmp(scheduler_left, 1);
}

// Runs a fiber until it gives way.
void enter(Fiber& fiber) {
    if (_setjmp(scheduler_left)) return;
    if (fiber.has_begun) _longjmp(fiber.place_left, 1);
    fiber.has_begun = true;
    swapcontext(&scheduler, &fiber.context);
}

void run_block() {
    alive = num_threads;
    ready.clear();
    barriers.assign(kBarriers + static_cast<size_t>(num_threads / kWarp) + 1, {});
    std::fill(shared_memory.begin(), shared_memory.end(), static_cast<unsigned char>(0xFF));  // as it may be
    copies.assign(static_cast<size_t>(num_threads), {{}});
    for (int i = 0; i < num_threads; ++i) {
        Fiber& fiber = fibers[static_cast<size_t>(i)];
        fiber.has_begun = false;
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
        enter(fibers[static_cast<size_t>(current)]);
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    require_nothing_begun();
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

void come_again() {
    if (++num_turns > kMostTurns) throw std::runtime_error("the threads of a block wait for each other without end");
    ready.push_back(current);
    give_way();
}

void note_progress() { num_turns = 0; }

size_t drawn(size_t count) { return std::uniform_int_distribution<size_t>(0, count - 1)(draw); }

namespace {

// Hands `mine` to the lanes of the warp; f(lane) is then what a lane handed over.
template <class X, class F>
auto hand_around(const X& mine, F&& use) {
    static_assert(sizeof(X) <= sizeof(Handed));
    const int thread = current, warp = thread / kWarp, first = warp * kWarp;
    const int held = num_threads - first < kWarp ? num_threads - first : kWarp;
    const auto base = static_cast<size_t>(num_threads) * (turns[static_cast<size_t>(thread)]++ % 2);
    std::memcpy(handed[base + static_cast<size_t>(thread)].bytes, &mine, sizeof mine);
    wait(kBarriers + warp, held);
    const Handed* const of_warp = handed.data() + base + first;
    return use(held, [=](int lane) -> const X& { return *reinterpret_cast<const X*>(of_warp[lane].bytes); });
}

int lane_now() { return current % kWarp; }

float widened(uint32_t pair, int which, bool is_half) {
    const auto bits = static_cast<uint16_t>(pair >> (16 * which));
    if (!is_half) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}

}  // namespace

uint64_t exchange(uint64_t bits, int step, int width) {
    return hand_around(bits, [&](int held, auto of) {
        const int lane = lane_now(), other = lane ^ step;
        return other / width == lane / width && other < held ? of(other) : bits;
    });
}

uint32_t ballot(bool bit) {
    return hand_around(bit, [&](int held, auto of) {
        uint32_t bits = 0;
        for (int lane = 0; lane < held; ++lane) bits |= static_cast<uint32_t>(of(lane)) << lane;
        return bits;
    });
}

unsigned char* dynamic_shared() { return shared_memory.data(); }

unsigned char* shared_bytes(size_t offset, size_t count) {
    if (offset + count > shared_memory.size()) throw std::runtime_error("an access leaves the shared memory of its block");
    return shared_memory.data() + offset;
}

float widened_at(size_t offset, bool is_half) {
    uint16_t bits;
    std::memcpy(&bits, shared_bytes(offset, sizeof bits), sizeof bits);
    return widened(bits, 0, is_half);
}

void left_rows(const uint32_t (&a)[4], bool is_half, float (&rows)[2][16]) {
    struct Held {
        uint32_t a[4];
    };
    hand_around(Held{{a[0], a[1], a[2], a[3]}}, [&](int, auto of) {
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 16; ++k)
                rows[half][k] = widened(of(lane_now() / 4 * 4 + k % 8 / 2).a[half + 2 * (k / 8)], k % 2, is_half);
        return 0;
    });
}

void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_half) {
    struct Factors {
        uint32_t a[4], b[2];
    };
    const Factors mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    hand_around(mine, [&](int, auto of) {
        const int g = lane_now() / 4, t = lane_now() % 4;
        float left[2][16], right[2][16];
        for (int at = 0; at < 4; ++at)
            for (int upper = 0; upper < 2; ++upper)
                for (int i = 0; i < 2; ++i) {
                    const int k = 8 * upper + 2 * at + i;
                    for (int half = 0; half < 2; ++half) left[half][k] = widened(of(g * 4 + at).a[half + 2 * upper], i, is_half);
                    for (int n = 0; n < 2; ++n) right[n][k] = widened(of((2 * t + n) * 4 + at).b[upper], i, is_half);
                }
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 16; ++k) c[i] += left[i / 2][k] * right[i % 2][k];
        return 0;
    });
}

void load_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("a row of a matrix is not aligned to 16 bytes");
    hand_around(row, [&](int, auto of) {
        const int g = lane_now() / 4, t = lane_now() % 4;
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int i = 0; i < 2; ++i) {
                const int r = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
                uint16_t bits;
                std::memcpy(&bits, static_cast<const char*>(of(8 * matrix + r)) + 2 * column, sizeof bits);
                out[matrix] = (i ? out[matrix] : 0) | static_cast<uint32_t>(bits) << (16 * i);
            }
        return 0;
    });
}

void copy_begin(void* shared, const void* global, bool wanted) {
    const auto* at = static_cast<unsigned char*>(shared);
    if (reinterpret_cast<uintptr_t>(shared) % 16 || (wanted && reinterpret_cast<uintptr_t>(global) % 16))
        throw std::runtime_error("a copy is not aligned to 16 bytes");
    if (at < shared_memory.data() || at + 16 > shared_memory.data() + shared_memory.size())
        throw std::runtime_error("a copy leaves the shared memory of its block");
    copies[static_cast<size_t>(current)].back().push_back({shared, global, wanted});
}

void copies_close() { copies[static_cast<size_t>(current)].emplace_back(); }

void copies_wait(int left) {
    auto& groups = copies[static_cast<size_t>(current)];
    while (groups.size() > static_cast<size_t>(left) + 1) {  // and the open one
        for (const Copy& copy : groups.front())
            copy.wanted ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
        groups.erase(groups.begin());
    }
}

uint32_t exchange(uint32_t bits, int step, int width) {
    return static_cast<uint32_t>(exchange(static_cast<uint64_t>(bits), step, width));
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
    if (block.y != 1 || block.z != 1 || block.x > 1024 || grid.x == 0 || grid.y == 0 || shared_bytes > 227 << 10)
        throw std::runtime_error("a launch that CUDA would refuse, or that is not emulated");
    num_threads = static_cast<int>(block.x);
    body = &thread;
    while (static_cast<int>(fibers.size()) < num_threads) {
        fibers.emplace_back();
        fibers.back().stack.reset(new char[kStackBytes]);
    }
    handed.assign(2 * static_cast<size_t>(num_threads), {});
    turns.assign(static_cast<size_t>(num_threads), 0);
    shared_memory.resize(shared_bytes);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                for (unsigned i = 0; i < block.x; ++i) fibers[i].place = {dim3(i), dim3(x, y, z), block, grid};
                run_block();
            }
}

}  // namespace trilith::emulated
