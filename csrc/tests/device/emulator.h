// What the parts of the emulator have of each other (cuda_runtime.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace trilith::emulated {

// Gives the processor to other threads of the block, and comes again; an error where that goes on without `note_progress`.
void come_again();
void note_progress();
// A number below `count`.
size_t drawn(size_t count);

// An error where the threads of a block have ended and left copies or products of Hopper on their way.
void require_nothing_begun();

// So many bytes of dynamic shared memory from `offset` on; an error where there are not as many.
unsigned char* shared_bytes(size_t offset, size_t count);
// The 16-bit number there.
float widened_at(size_t offset, bool is_half);
// The rows g and g + 8 of the left factor (16 x 16) that a warp holds as csrc/cuda/mma.h says; all lanes call it.
void left_rows(const uint32_t (&a)[4], bool is_half, float (&rows)[2][16]);

}  // namespace trilith::emulated
