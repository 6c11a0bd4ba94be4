// Packing and finishing in the simulator, for both shapes of tiles.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "finish_kernel.h"
#include "pack_kernel.h"

namespace py = pybind11;
using namespace tikmix_fast::gpu;

namespace {

using Address = uintptr_t;

TileShape shape_of(const std::string& kernel) { return kernel == "mma" ? kTileMma : kTileWgmma; }

void pack(const std::string& kernel, std::array<int64_t, 3> sizes, Address queries, int element,
          std::array<int64_t, 3> strides, Address packed, int packed_element, int64_t blocks) {
    PackProblem problem = {};
    problem.tasks = sizes[0];
    problem.height = sizes[1];
    problem.width = sizes[2];
    problem.queries = reinterpret_cast<const void*>(queries);
    problem.element = static_cast<Element>(element);
    problem.task_stride = strides[0];
    problem.row_stride = strides[1];
    problem.column_stride = strides[2];
    problem.packed = reinterpret_cast<void*>(packed);
    problem.packed_element = static_cast<Element>(packed_element);
    const TileShape shape = shape_of(kernel);
    const bool to_bfloat16 = problem.packed_element == Element::bfloat16;
    simt::launch(blocks, kPackThreads, 0, [&](unsigned char*) {
        to_bfloat16 ? pack_queries<8>(problem, shape) : pack_queries<4>(problem, shape);
    });
}

// Sizes are T, O, I, m, n.
ExactProblem problem_of(std::array<int64_t, 5> sizes, int64_t splits) {
    ExactProblem problem = {};
    problem.rows = sizes[0];
    problem.height = sizes[1];
    problem.width = sizes[2];
    problem.domains.count = sizes[3];
    problem.tasks = sizes[4];
    problem.splits = splits;
    return problem;
}

void finish(const std::string& kernel, std::array<int64_t, 5> sizes, int64_t splits, Address offsets, Address order,
            Address partials, Address values, Address flag, int64_t blocks, uint64_t seed) {
    ExactProblem problem = problem_of(sizes, splits);
    problem.domains.offsets = reinterpret_cast<const int64_t*>(offsets);
    problem.domains.order = reinterpret_cast<const int64_t*>(order);
    problem.partials = reinterpret_cast<float*>(partials);
    problem.values = reinterpret_cast<double*>(values);
    problem.flag = reinterpret_cast<int32_t*>(flag);
    const TileShape shape = shape_of(kernel);
    simt::launch(
        blocks, kFinishThreads, kFinishBytes, [&](unsigned char* shared) { finish_values(problem, shape, shared); },
        seed);
    if (order) simt::launch(blocks, kFinishThreads, 0, [&](unsigned char*) { check_order(problem); }, seed);
}

void total(const std::string& kernel, std::array<int64_t, 5> sizes, int64_t splits, Address split_totals,
           Address grad_weight, int element, int64_t stride, int64_t blocks) {
    ExactProblem problem = problem_of(sizes, splits);
    problem.split_totals = reinterpret_cast<float*>(split_totals);
    problem.grad_weight = reinterpret_cast<void*>(grad_weight);
    problem.grad_weight_element = static_cast<Element>(element);
    problem.grad_weight_stride = stride;
    simt::launch(blocks, kFinishThreads, 0, [&](unsigned char*) { finish_total(problem, shape_of(kernel)); });
}

py::tuple layout(const std::string& kernel) {
    const TileShape shape = shape_of(kernel);
    return py::make_tuple(shape.rows, shape.columns, shape.warp_rows, shape.warp_columns);
}

}  // namespace

PYBIND11_MODULE(finish, module) {
    module.attr("row_block") = kRowBlock;
    module.def("pack", pack);
    module.def("finish", finish);
    module.def("total", total);
    module.def("layout", layout);
}
