// Which kernels this processor runs.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace trilith {

// The tables this processor can run, the fastest first.
std::vector<const CpuKernels*> usable_cpu_kernels();

}  // namespace trilith
