// The tables that optimizers are called with, as they lie in memory, on the processor or on a device.
#pragma once

#include <cstdint>

namespace trilith {

// A slice of the flat buffers: addresses of weights, gradient, two states and the module's own weights (0: none).
struct Slice {
    std::uintptr_t parameter, gradient, states[2], weight;
    int64_t numel;
};
static_assert(sizeof(Slice) == 6 * 8, "a row of the caller's table");

// Of a slice's learning rate and decay.
struct Multipliers {
    double lr, decay;
};

// What changes from step to step.
struct Step {
    double lr, clip_factor, loss_scale, correction1, correction2, is_first;
};
static_assert(sizeof(Step) == 6 * 8, "the caller's array");

// Elements whose squares are summed.
struct Run {
    std::uintptr_t address;
    int64_t numel;
};
static_assert(sizeof(Run) == 2 * 8, "a row of the caller's table");

}  // namespace trilith
