// The Python module _cuda. Its kernels are yet to come; it tells what it was built for and what the device is.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "device.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA part of tikmix_fast: what it was built for. It holds no kernel yet.";
    module.attr("architectures") = TIKMIX_FAST_CUDA_ARCHITECTURES;
    const int version = tikmix_fast::toolkit_version();
    module.attr("toolkit_version") = py::make_tuple(version / 1000, version % 1000 / 10);
    module.def(
        "compute_capability",
        [](int device) {
            int major = 0;
            int minor = 0;
            const char* error = tikmix_fast::compute_capability(device, &major, &minor);
            if (error) throw std::runtime_error(error);
            return std::make_pair(major, minor);
        },
        py::arg("device"), "Compute capability (major, minor) of a device; RuntimeError where there is none.");
}
