// The io queue and its files for Python, as the submodule `io`.
#pragma once

#include <pybind11/pybind11.h>

namespace trilith::io {

void bind(pybind11::module_& module);

}  // namespace trilith::io
