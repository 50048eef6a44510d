// The index builders for Python, as the submodule `data`. Addresses are integers.
#pragma once

#include <pybind11/pybind11.h>

namespace trilith::data {

void bind(pybind11::module_& module);

}  // namespace trilith::data
