// trilith._kernels: the library's functions for Python. Pointers are integers; the GIL is released in every call.
#include <pybind11/pybind11.h>

#include "cpu/tables.h"
#include "data/bind.h"
#include "io/bind.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

void bind_structs(py::module_& module) {
    using namespace trilith;
    py::class_<HeadStrides>(module, "HeadStrides").def(py::init<int64_t, int64_t, int64_t>());
    py::class_<AttentionSizes>(module, "AttentionSizes")
        .def_readonly("batch", &AttentionSizes::batch)
        .def_readonly("num_heads", &AttentionSizes::num_heads)
        .def_readonly("num_queries", &AttentionSizes::num_queries)
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, HeadStrides, HeadStrides, HeadStrides>());
    py::class_<AttentionRule>(module, "AttentionRule")
        .def(py::init<bool, int64_t, Address, Address, Address, Address, int64_t, int64_t, Address, Address, int64_t, Address,
                      int64_t, int64_t, int64_t, Address, int64_t, uint32_t, uint32_t, uint32_t>());
}

// A submodule for each instruction set that this processor runs.
void bind_cpu(py::module_& module) {
    py::list names;
    for (const trilith::CpuKernels* kernels : trilith::usable_cpu_kernels()) {
        names.append(kernels->name);
        py::module_ table = module.def_submodule(kernels->name);
#define TRILITH_BIND(op) table.def(#op, kernels->op, py::call_guard<py::gil_scoped_release>());
        TRILITH_CPU_OPS(TRILITH_BIND)
#undef TRILITH_BIND
    }
    module.attr("instruction_sets") = py::tuple(names);  // the fastest first
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
    module.doc() = "Kernels of csrc/. Call them through trilith.kernels.ops, which checks what they do not.";
    bind_structs(module);
    bind_cpu(module);
    trilith::data::bind(module);
    trilith::io::bind(module);
#ifdef _OPENMP
    module.attr("has_openmp") = true;
#else
    module.attr("has_openmp") = false;
#endif
}
