// Hopper's barriers, copy engine and products of warpgroups, as csrc/cuda/hopper.h uses them (PTX ISA 8; cuda.h beside this).
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda.h"
#include "emulator.h"

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    bool is_valid = rank == 4 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] * 2 <= 128;
    for (int i = 0; i < 4; ++i) is_valid = is_valid && sizes[i] > 0 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    for (int i = 0; i < 3; ++i) is_valid = is_valid && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    if (!is_valid) return CUDA_ERROR_INVALID_VALUE;
    map->base = base;
    std::memcpy(map->sizes, sizes, sizeof map->sizes);
    std::memcpy(map->strides, strides, sizeof map->strides);
    std::memcpy(map->box, box, sizeof map->box);
    return CUDA_SUCCESS;
}

namespace trilith::emulated {

namespace {

constexpr uint32_t kBase = 1024;  // where dynamic shared memory begins: an address that is not zero
constexpr int kRowBytes = 128;

// A barrier as it lies in shared memory.
struct Barrier {
    uint8_t count, left;
    uint16_t phase;
    int32_t bytes;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

struct Box {
    unsigned char* to;
    CUtensorMap tensor;
    Barrier* barrier;
    int at[4];
};
std::vector<Box> boxes;  // on their way

// A product that a thread has begun: registers are read and written when it is waited for, not before.
struct Product {
    float* d;
    int groups;
    uint64_t a, b;
    const uint32_t* held;  // the left factor, where that is in registers
    bool adds, is_half;
};
struct Begun {
    std::vector<std::vector<Product>> closed;
    std::vector<Product> open;
};
std::vector<Begun> products(1024);  // by thread

Begun& mine() { return products[now.thread.x]; }

// Exchanges the packs of 16 bytes in rows of 128 by the row's number modulo 8.
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

void settle(Barrier& barrier) {
    if (barrier.left || barrier.bytes) return;
    ++barrier.phase;
    barrier.left = barrier.count;
    note_progress();
}

void arrive(const Box& box) {
    const auto address = shared_address(box.to);
    if (address % 1024) throw std::runtime_error("a box does not begin at a multiple of 1024 bytes");
    int bytes = 0;
    for (cuuint32_t row = 0; row < box.tensor.box[2]; ++row)
        for (cuuint32_t f = 0; f < box.tensor.box[0]; ++f, bytes += 2) {
            const int64_t at[4] = {box.at[0] + static_cast<int64_t>(f), box.at[1], box.at[2] + static_cast<int64_t>(row), box.at[3]};
            bool is_inside = true;
            int64_t offset = at[0] * 2;
            for (int i = 0; i < 4; ++i) is_inside = is_inside && at[i] >= 0 && at[i] < static_cast<int64_t>(box.tensor.sizes[i]);
            for (int i = 0; i < 3; ++i) offset += at[i + 1] * static_cast<int64_t>(box.tensor.strides[i]);
            uint16_t value = 0;
            if (is_inside) std::memcpy(&value, static_cast<const char*>(box.tensor.base) + offset, sizeof value);
            std::memcpy(shared_bytes(swizzled(address + row * kRowBytes + f * 2) - kBase, 2), &value, sizeof value);
        }
    box.barrier->bytes -= bytes;
    settle(*box.barrier);
}

// Number (row, k) of a matrix whose rows lie along the depth, or across it.
float along(uint64_t descriptor, int row, int k, bool is_half) {
    const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4, stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    return widened_at(swizzled(start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * kRowBytes +
                               static_cast<uint32_t>(k) * 2) - kBase, is_half);
}
float across(uint64_t descriptor, int column, int k, bool is_half) {
    const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4, leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4,
               stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    return widened_at(swizzled(start + static_cast<uint32_t>(column / 64) * leading + static_cast<uint32_t>(k / 8) * stride +
                               static_cast<uint32_t>(k % 8) * kRowBytes + static_cast<uint32_t>(column % 64) * 2) - kBase, is_half);
}

void check_descriptor(uint64_t descriptor) {
    if (descriptor >> 62 != 1) throw std::runtime_error("a descriptor without the swizzle of 128 bytes");
}

int warp_in_group() { return static_cast<int>(now.thread.x) % 128 / 32; }

void run_shared(const Product& p) {
    const int lane = static_cast<int>(now.thread.x) % 32, g = lane / 4, t = lane % 4, first = 16 * warp_in_group();
    float left[2][16];
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k) left[half][k] = along(p.a, first + g + 8 * half, k, p.is_half);
    for (int j = 0; j < p.groups; ++j)
        for (int i = 0; i < 2; ++i) {
            float right[16];
            for (int k = 0; k < 16; ++k) right[k] = along(p.b, 8 * j + 2 * t + i, k, p.is_half);
            for (int half = 0; half < 2; ++half) {
                float& d = p.d[4 * j + 2 * half + i];
                float sum = p.adds ? d : 0.0f;
                for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k];
                d = sum;
            }
        }
}

void run_held(const Product& p) {
    float left[2][16];
    left_rows(reinterpret_cast<const uint32_t(&)[4]>(*p.held), p.is_half, left);
    const int t = static_cast<int>(now.thread.x) % 4;
    for (int j = 0; j < p.groups; ++j)
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 16; ++k) {
                const float right = across(p.b, 8 * j + 2 * t + i, k, p.is_half);
                for (int half = 0; half < 2; ++half) p.d[4 * j + 2 * half + i] += left[half][k] * right;
            }
}

}  // namespace

uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - dynamic_shared()) + kBase;
}

void barrier_init(uint64_t* barrier, int arrivals) {
    const Barrier made{static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
    std::memcpy(barrier, &made, sizeof made);
}

void barrier_arrive(uint64_t* barrier, int expected_bytes) {
    auto& b = reinterpret_cast<Barrier&>(*barrier);
    if (b.left == 0) throw std::runtime_error("more arrivals at a barrier than it waits for");
    b.bytes += expected_bytes;
    --b.left;
    settle(b);
}

void barrier_wait(uint64_t* barrier, int parity) {
    const auto& b = reinterpret_cast<const volatile Barrier&>(*barrier);
    while ((b.phase & 1) == parity) {
        if (!boxes.empty()) {
            const size_t at = drawn(boxes.size());
            const Box box = boxes[at];
            boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(at));
            arrive(box);
        }
        if ((b.phase & 1) == parity) come_again();
    }
}

void copy_box(void* to, const CUtensorMap& tensor, uint64_t* barrier, int feature, int head, int place, int sample) {
    boxes.push_back({static_cast<unsigned char*>(to), tensor, reinterpret_cast<Barrier*>(barrier), {feature, head, place, sample}});
}

void multiply_shared(float* d, int groups, uint64_t a, uint64_t b, int adds, bool is_half) {
    check_descriptor(a), check_descriptor(b);
    mine().open.push_back({d, groups, a, b, nullptr, adds != 0, is_half});
}

void multiply_held(float* d, int groups, const uint32_t (&a)[4], uint64_t b, bool is_half) {
    check_descriptor(b);
    mine().open.push_back({d, groups, 0, b, a, true, is_half});
}

void products_close() {
    ballot(true);  // the lanes of a warp come together
    mine().closed.push_back(std::move(mine().open));
    mine().open.clear();
}

void products_wait(int left) {
    ballot(true);
    while (mine().closed.size() > static_cast<size_t>(left)) {
        const std::vector<Product> group = std::move(mine().closed.front());
        mine().closed.erase(mine().closed.begin());
        for (const Product& product : group) product.held ? run_held(product) : run_shared(product);
    }
    ballot(true);  // nobody goes on while the shared memory is read
}

void require_nothing_begun() {
    bool is_done = boxes.empty();
    for (const Begun& begun : products) is_done = is_done && begun.open.empty() && begun.closed.empty();
    boxes.clear();
    products.assign(products.size(), {});
    if (!is_done) throw std::runtime_error("a block has ended with copies or products on their way");
}

}  // namespace trilith::emulated
