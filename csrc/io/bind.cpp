#include "io/bind.h"

#include <cerrno>
#include <memory>
#include <string>
#include <system_error>

#include "io/checksum.h"
#include "io/queue.h"

namespace py = pybind11;

namespace trilith::io {

namespace {

constexpr int64_t kSignalsEveryMilliseconds = 50;

// `is_done(milliseconds)` until it says yes, without the GIL; Ctrl-C is heard meanwhile.
template <class F>
void wait_for(F&& is_done) {
    for (;;) {
        {
            py::gil_scoped_release released;
            if (is_done(kSignalsEveryMilliseconds)) return;
        }
        if (PyErr_CheckSignals()) throw py::error_already_set();
    }
}

// Threads are joined without the GIL, which a gate may need.
struct Stopped {
    void operator()(Queue* queue) const {
        {
            py::gil_scoped_release released;
            queue->stop();
        }
        delete queue;
    }
};

using QueueHandle = std::unique_ptr<Queue, Stopped>;

QueueHandle make_queue(int queue_depth, int workers, int64_t block_bytes, const std::string& name, py::object gate) {
    Queue::Gate call;
    if (!gate.is_none())
        call = [gate](const Operation& operation) {
            py::gil_scoped_acquire acquired;
            try {
                return gate(static_cast<int>(operation.request.kind), operation.request.id).cast<int>();
            } catch (py::error_already_set& error) {
                error.discard_as_unraisable("the gate of an io queue");
                return EIO;
            }
        };
    return QueueHandle(new Queue(queue_depth, workers, block_bytes, name, std::move(call)));
}

}  // namespace

void bind(py::module_& module) {
    py::module_ io = module.def_submodule("io", "Files that are read and written in background threads (csrc/io).");
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const std::system_error& error) {
            // what() is "PATH: text of the errno"; Python's OSError wants the two apart.
            errno = error.code().value();
            const std::string what = error.what(), text = error.code().message();
            const std::string path = what.substr(0, what.size() - std::min(what.size(), text.size() + 2));
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
        }
    });
    py::class_<File, std::shared_ptr<File>>(io, "AsyncFile")
        .def(py::init([](int descriptor, int direct, bool owns_padding, std::string path) {
            return std::make_shared<File>(descriptor, direct, owns_padding, std::move(path));
        }))
        .def_static("open", [](const std::string& path, bool writable, bool direct) { return File::open(path, writable, direct); })
        .def("require_bytes", &File::require_bytes)
        .def_property_readonly("is_direct", &File::is_direct)
        .def_property_readonly("path", &File::path);
    py::class_<Operation, std::shared_ptr<Operation>>(io, "Operation");
    py::class_<Queue, QueueHandle>(io, "IoQueue")
        .def(py::init(&make_queue))
        .def("submit",
             [](Queue& queue, int kind, std::shared_ptr<File> file, uintptr_t address, int64_t num_bytes, int64_t offset,
                int64_t chain, uintptr_t checksums, std::shared_ptr<Operation> source, int64_t id) {
                 return queue.submit({static_cast<Kind>(kind), std::move(file), reinterpret_cast<char*>(address), num_bytes,
                                      offset, chain, reinterpret_cast<uint64_t*>(checksums), std::move(source), id});
             })
        .def("is_done", [](const Queue& queue, const Operation& operation) { return queue.wait(operation, 0); })
        .def("wait",
             [](const Queue& queue, const Operation& operation) {
                 wait_for([&](int64_t most) { return queue.wait(operation, most); });
             })
        .def("wait_all", [](const Queue& queue) { wait_for([&](int64_t most) { return queue.wait_all(most); }); })
        .def("fault",
             [](const Queue& queue, const Operation& operation) {
                 const Fault fault = queue.fault(operation);
                 return py::make_tuple(static_cast<int>(fault.cause), fault.start, fault.size, fault.moved.num_bytes,
                                       fault.moved.error, operation.request.file->path());
             })
        .def("stop", &Queue::stop, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("bytes_read", &Queue::bytes_read)
        .def_property_readonly("bytes_written", &Queue::bytes_written);
    io.def("checksum", [](uintptr_t address, int64_t num_bytes) {
        py::gil_scoped_release released;
        return checksum(reinterpret_cast<const void*>(address), num_bytes);
    });
}

}  // namespace trilith::io
