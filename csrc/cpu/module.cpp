// The Python module _cpu. It knows no torch: the caller has checked shapes, dtypes and bounds, and keeps the memory
// alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "earliest_first.h"
#include "group_influence.h"
#include "sketch.h"

namespace py = pybind11;
using tikmix_fast::Element;
using tikmix_fast::Kernel;
using tikmix_fast::Matrix;

namespace {

// (address, dtype code, row stride, column stride)
using MatrixArgument = std::array<int64_t, 4>;

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

Element to_element(int64_t code) {
    if (code < 0 || code > 2) throw std::invalid_argument("dtype code must be 0, 1 or 2");
    return static_cast<Element>(code);
}

Matrix to_matrix(const MatrixArgument& argument) {
    return {pointer<const void>(argument[0]), to_element(argument[1]), argument[2], argument[3]};
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernel& kernel : tikmix_fast::usable_kernels()) names.emplace_back(kernel.name);
    return names;
}

void sketch_rows(const std::string& instruction_set, int threads, const std::array<int64_t, 3>& sizes,
                 const MatrixArgument& input, int64_t codes, int64_t output) {
    tikmix_fast::SketchProblem problem{};
    problem.rows = sizes[0];
    problem.columns = sizes[1];
    problem.dim = sizes[2];
    problem.input = to_matrix(input);
    problem.codes = pointer<const int32_t>(codes);
    problem.output = pointer<float>(output);
    const py::gil_scoped_release release;
    tikmix_fast::sketch_rows(problem, instruction_set.c_str(), threads);
}

Kernel kernel_named(const std::string& name) {
    for (const Kernel& kernel : tikmix_fast::usable_kernels()) {
        if (name == kernel.name) return kernel;
    }
    throw std::invalid_argument("no such instruction set here: " + name);
}

// (address, dtype code, tasks, whether packed, stride from task to task, row stride)
using QueriesArgument = std::array<int64_t, 6>;

tikmix_fast::Queries to_queries(const QueriesArgument& argument) {
    return {pointer<const void>(argument[0]),
            to_element(argument[1]),
            argument[2],
            argument[3] != 0,
            argument[4],
            argument[5]};
}

std::array<int64_t, 3> packed_layout(const std::string& instruction_set, int64_t dtype) {
    const Kernel kernel = kernel_named(instruction_set);
    return {kernel.micro_rows, kernel.micro_columns, static_cast<int64_t>(kernel.packed_element(to_element(dtype)))};
}

void pack_queries(const std::string& instruction_set, int threads, int64_t height, int64_t width,
                  const QueriesArgument& queries, int64_t panels) {
    const Kernel kernel = kernel_named(instruction_set);
    const py::gil_scoped_release release;
    tikmix_fast::pack_queries(to_queries(queries), kernel, height, width, threads, pointer<void>(panels));
}

void group_influence(const std::string& instruction_set, int threads, const std::array<int64_t, 4>& sizes,
                     const MatrixArgument& input, const MatrixArgument& grad_output, const QueriesArgument& queries,
                     int64_t offsets, int64_t order, const std::array<int64_t, 3>& grad_weight, int64_t values) {
    const Kernel kernel = kernel_named(instruction_set);
    tikmix_fast::Problem problem{};
    problem.rows = sizes[0];
    problem.height = sizes[1];
    problem.width = sizes[2];
    problem.domains = sizes[3];
    problem.input = to_matrix(input);
    problem.grad_output = to_matrix(grad_output);
    problem.queries = to_queries(queries);
    problem.offsets = pointer<const int64_t>(offsets);
    problem.order = pointer<const int64_t>(order);
    problem.grad_weight = pointer<float>(grad_weight[0]);
    problem.grad_weight_row_stride = grad_weight[1];
    problem.grad_weight_column_stride = grad_weight[2];
    const py::gil_scoped_release release;
    tikmix_fast::group_influence(problem, kernel, threads, pointer<double>(values));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Native CPU kernels of tikmix_fast, on addresses, sizes and strides.";
    module.def("sketch_rows", &sketch_rows, py::kw_only(), py::arg("instruction_set"), py::arg("threads"),
               py::arg("sizes"), py::arg("input"), py::arg("codes"), py::arg("output"),
               "Write the CountSketch [T, k] of the rows, float32; sizes are (T, columns, k), codes int32.");
    module.def("instruction_sets", &instruction_sets, "Names of the kernels this processor can run, best first.");
    module.def(
        "packed_layout", &packed_layout, py::kw_only(), py::arg("instruction_set"), py::arg("dtype"),
        "Micro-tile rows, micro-tile columns and dtype code of packed queries, by the dtype code of plain ones.");
    module.def("pack_queries", &pack_queries, py::kw_only(), py::arg("instruction_set"), py::arg("threads"),
               py::arg("height"), py::arg("width"), py::arg("queries"), py::arg("panels"),
               "Write packed queries; queries as in group_influence, panels an address.");
    module.def(
        "earliest_first",
        [](int64_t keys, int64_t arrived, int64_t slots, int64_t drawn) {
            const py::gil_scoped_release release;
            tikmix_fast::earliest_first(pointer<const int64_t>(keys), pointer<const int64_t>(arrived), slots,
                                        pointer<int64_t>(drawn));
        },
        py::kw_only(), py::arg("keys"), py::arg("arrived"), py::arg("slots"), py::arg("drawn"),
        "Write for every slot the smallest of the int64 keys that have arrived and were not drawn yet.");
    module.def(
        "group_influence", &group_influence, py::kw_only(), py::arg("instruction_set"), py::arg("threads"),
        py::arg("sizes"), py::arg("input"), py::arg("grad_output"), py::arg("queries"), py::arg("offsets"),
        py::arg("order"), py::arg("grad_weight"), py::arg("values"),
        "Write the group influence [n, m]; sizes are (T, O, I, m), matrices (address, dtype code, row stride, column "
        "stride), queries (address, dtype code, n, 1 if packed, stride from task to task, row stride), grad_weight "
        "(address or 0, row stride, column stride) of float32.");
}
