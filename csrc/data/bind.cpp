#include "data/bind.h"

#include <cstdint>

#include "data/index.h"

namespace py = pybind11;

namespace trilith::data {

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind(py::module_& module) {
    py::module_ data = module.def_submodule("data", "Index builders (csrc/data).");
    const auto released = py::call_guard<py::gil_scoped_release>();
    data.def(
        "sample_runs",
        [](Address ends, int64_t num_documents, Address positions, int64_t num_samples, int64_t length, int64_t capacity,
           Address starts, Address slots, Address offsets, Address lengths) {
            return sample_runs(at<int64_t>(ends), num_documents, at<int64_t>(positions), num_samples, length, capacity,
                               at<int64_t>(starts), at<int64_t>(slots), at<int64_t>(offsets), at<int64_t>(lengths));
        },
        released);
    data.def(
        "sample_starts",
        [](Address ends, int64_t num_documents, int64_t stride, int64_t count, Address slots, Address offsets) {
            sample_starts(at<int64_t>(ends), num_documents, stride, count, at<int64_t>(slots), at<int64_t>(offsets));
        },
        released);
    data.def(
        "blend",
        [](Address shares, int64_t num_datasets, int64_t size, Address choices, Address samples) {
            blend(at<double>(shares), num_datasets, size, at<int16_t>(choices), at<int64_t>(samples));
        },
        released);
}

}  // namespace trilith::data
