// The Python module _cuda: addresses, sizes and strides in, kernels launched on a stream. Nothing waits.
//
// `kernel` is "mma" (sm_80 and newer) or "wgmma" (sm_90a); elements are numbered as problem.h numbers them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "device.h"
#include "exact.h"
#include "finish.h"
#include "pack.h"
#include "projected_launch.h"
#include "schedule.h"

namespace py = pybind11;

namespace tikmix_fast::gpu {
namespace {

using Address = uintptr_t;

// A split shorter than this would spend more on the products at its end than on its rows.
constexpr int64_t kLeastSplitRows = 512;
// Blocks of the mma kernel that run on a multiprocessor at once.
constexpr int kMmaBlocks = 2;

void raise(const char* error) {
    if (error) throw std::runtime_error(error);
}

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

TileShape shape_of(const std::string& kernel) {
    if (kernel == "mma") return kTileMma;
#ifdef TIKMIX_FAST_WGMMA
    if (kernel == "wgmma") return kTileWgmma;
#endif
    throw std::invalid_argument("kernel must be mma" +
#ifdef TIKMIX_FAST_WGMMA
                                std::string(" or wgmma") +
#endif
                                "; got " + kernel);
}

int64_t tiles_of(const TileShape& shape, int64_t height, int64_t width) {
    return divide_up(height, shape.rows) * divide_up(width, shape.columns);
}

std::tuple<int64_t, int64_t, int64_t> plan(const std::string& kernel, std::array<int64_t, 3> sizes,
                                           int multiprocessors) {
    const auto [rows, height, width] = sizes;
    const TileShape shape = shape_of(kernel);
    const int64_t tiles = tiles_of(shape, height, width);
    const int64_t blocks = multiprocessors * (kernel == "mma" ? kMmaBlocks : 1);
    const int64_t splits = count_splits(tiles, rows, blocks, kLeastSplitRows);
    return {splits, splits * tiles, splits > 1 ? splits * tiles * shape.elements() : 0};
}

}  // namespace
}  // namespace tikmix_fast::gpu

PYBIND11_MODULE(_cuda, module) {
    using namespace tikmix_fast::gpu;

    module.doc() = "CUDA part of tikmix_fast.";
    module.attr("architectures") = TIKMIX_FAST_CUDA_ARCHITECTURES;
    const int version = tikmix_fast::toolkit_version();
    module.attr("toolkit_version") = py::make_tuple(version / 1000, version % 1000 / 10);
#ifdef TIKMIX_FAST_WGMMA
    module.attr("has_wgmma") = true;
#else
    module.attr("has_wgmma") = false;
#endif
    module.def(
        "compute_capability",
        [](int device) {
            int major = 0;
            int minor = 0;
            raise(tikmix_fast::compute_capability(device, &major, &minor));
            return std::make_pair(major, minor);
        },
        py::arg("device"), "Compute capability (major, minor) of a device; RuntimeError where there is none.");
    module.def(
        "packed_layout",
        [](const std::string& kernel, int element) {
            const TileShape shape = shape_of(kernel);
            const int per_load = static_cast<Element>(element) == Element::float32 ? 4 : 8;
            return std::make_tuple(shape.rows, shape.columns, shape.warps(), shape.registers() / per_load, per_load);
        },
        py::kw_only(), py::arg("kernel"), py::arg("element"),
        "Rows and columns of a tile, warps, loads of a lane, and numbers in a load: the shape of packed queries.");
    module.def(
        "pack_queries",
        [](const std::string& kernel, std::array<int64_t, 3> sizes,
           std::tuple<Address, int, int64_t, int64_t, int64_t> from, std::pair<Address, int> panels, Address stream) {
            const auto [tasks, height, width] = sizes;
            const auto [queries, element, task_stride, row_stride, column_stride] = from;
            PackProblem problem = {};
            problem.tasks = tasks, problem.height = height, problem.width = width;
            problem.queries = pointer<const void>(queries);
            problem.element = static_cast<Element>(element);
            problem.task_stride = task_stride, problem.row_stride = row_stride, problem.column_stride = column_stride;
            problem.packed = pointer<void>(panels.first);
            problem.packed_element = static_cast<Element>(panels.second);
            raise(launch_pack_queries(problem, shape_of(kernel), pointer<void>(stream)));
        },
        py::kw_only(), py::arg("kernel"), py::arg("sizes"), py::arg("queries"), py::arg("panels"), py::arg("stream"),
        "Packs queries (address, element, strides) of sizes (n, O, I) into panels (address, element).");
    module.def(
        "group_influence",
        [](const std::string& kernel, int multiprocessors, std::array<int64_t, 5> sizes, int64_t splits, int element,
           std::pair<Address, int64_t> input, std::pair<Address, int64_t> grad_output, Address offsets, Address order,
           std::pair<Address, int> queries, std::tuple<Address, int, int64_t> grad_weight,
           std::pair<Address, Address> workspace, Address values, Address flag, Address stream) {
            const auto [rows, height, width, domains, tasks] = sizes;
            ExactProblem problem = {};
            problem.rows = rows, problem.height = height, problem.width = width, problem.tasks = tasks;
            problem.element = static_cast<Element>(element);
            problem.input = {pointer<const void>(input.first), input.second};
            problem.grad_output = {pointer<const void>(grad_output.first), grad_output.second};
            problem.domains = {pointer<const int64_t>(offsets), pointer<const int64_t>(order), domains};
            problem.queries = pointer<const void>(queries.first);
            problem.query_element = static_cast<Element>(queries.second);
            problem.grad_weight = pointer<void>(std::get<0>(grad_weight));
            problem.grad_weight_element = static_cast<Element>(std::get<1>(grad_weight));
            problem.grad_weight_stride = std::get<2>(grad_weight);
            problem.splits = splits;
            problem.partials = pointer<float>(workspace.first);
            problem.split_totals = pointer<float>(workspace.second);
            problem.values = pointer<double>(values);
            problem.flag = pointer<int32_t>(flag);
            void* const on = pointer<void>(stream);
            const TileShape shape = shape_of(kernel);
#ifdef TIKMIX_FAST_WGMMA
            raise(kernel == "wgmma" ? launch_exact_wgmma(problem, multiprocessors, on)
                                    : launch_exact_mma(problem, multiprocessors, on));
#else
            raise(launch_exact_mma(problem, multiprocessors, on));
#endif
            raise(launch_finish_exact(problem, shape, multiprocessors, on));
        },
        py::kw_only(), py::arg("kernel"), py::arg("multiprocessors"), py::arg("sizes"), py::arg("splits"),
        py::arg("element"), py::arg("input"), py::arg("grad_output"), py::arg("offsets"), py::arg("order"),
        py::arg("queries"), py::arg("grad_weight"), py::arg("workspace"), py::arg("values"), py::arg("flag"),
        py::arg("stream"),
        "Launches the exact influence of sizes (T, O, I, m, n) and splits as plan() says. Rows are (address, stride),\n"
        "queries (address, element), grad_weight (address or 0, element, stride), workspace the addresses of what\n"
        "plan() counted.");
    module.def("plan", &plan, py::kw_only(), py::arg("kernel"), py::arg("sizes"), py::arg("multiprocessors"),
               "For sizes (T, O, I): splits, partial sums per task and domain, and float32 numbers of split totals.");
    module.def(
        "plan_projected",
        [](int device, std::array<int64_t, 3> sizes) {
            const auto [rows, k_out, k_in] = sizes;
            ProjectedPlan plan = {};
            raise(plan_projected_on(device, rows, k_out, k_in, &plan));
            return std::make_tuple(plan.dim, plan.rows_at_once, plan.splits);
        },
        py::kw_only(), py::arg("device"), py::arg("sizes"),
        "For sizes (T, k_out, k_in): what k is padded to (0 if there is no kernel), rows of a block at a time, "
        "splits.");
    module.def(
        "write_factor",
        [](int multiprocessors, std::tuple<Address, int, int64_t, int64_t> factor,
           std::tuple<Address, int, int64_t, int64_t> matrix, Address stream) {
            FactorProblem problem = {};
            problem.factor = pointer<const void>(std::get<0>(factor));
            problem.kind = static_cast<Factor>(std::get<1>(factor));
            problem.k = std::get<2>(factor), problem.columns = std::get<3>(factor);
            problem.matrix = pointer<void>(std::get<0>(matrix));
            problem.element = static_cast<Element>(std::get<1>(matrix));
            problem.dim = std::get<2>(matrix), problem.stride = std::get<3>(matrix);
            raise(launch_factor(problem, multiprocessors, pointer<void>(stream)));
        },
        py::kw_only(), py::arg("multiprocessors"), py::arg("factor"), py::arg("matrix"), py::arg("stream"),
        "Writes a factor (address, kind, k, columns) out as a matrix (address, element, rows, row stride).");
    module.def(
        "projected_group_influence",
        [](int multiprocessors, std::array<int64_t, 5> sizes, std::pair<int64_t, int64_t> dims,
           std::array<int64_t, 3> plan, int element, std::pair<Address, int64_t> input,
           std::pair<Address, int64_t> grad_output, Address offsets, Address order, Address queries,
           std::pair<Address, Address> matrices, double scale, std::pair<Address, Address> workspace, Address values,
           Address gradients, Address flag, Address stream) {
            const auto [rows, height, width, domains, tasks] = sizes;
            ProjectedProblem problem = {};
            problem.rows = rows, problem.height = height, problem.width = width, problem.tasks = tasks;
            problem.k_out = dims.first, problem.k_in = dims.second;
            problem.dim = plan[0], problem.rows_at_once = plan[1], problem.splits = plan[2];
            problem.element = static_cast<Element>(element);
            problem.input = {pointer<const void>(input.first), input.second};
            problem.grad_output = {pointer<const void>(grad_output.first), grad_output.second};
            problem.domains = {pointer<const int64_t>(offsets), pointer<const int64_t>(order), domains};
            problem.queries = pointer<const float>(queries);
            problem.output_matrix = pointer<const void>(matrices.first);
            problem.input_matrix = pointer<const void>(matrices.second);
            problem.scale = scale;
            problem.partials = pointer<float>(workspace.first);
            problem.slots = pointer<float>(workspace.second);
            problem.values = pointer<double>(values);
            problem.gradients = pointer<float>(gradients);
            problem.flag = pointer<int32_t>(flag);
            raise(launch_projected(problem, multiprocessors, pointer<void>(stream)));
            raise(launch_finish_projected(problem, multiprocessors, pointer<void>(stream)));
        },
        py::kw_only(), py::arg("multiprocessors"), py::arg("sizes"), py::arg("dims"), py::arg("plan"),
        py::arg("element"), py::arg("input"), py::arg("grad_output"), py::arg("offsets"), py::arg("order"),
        py::arg("queries"), py::arg("matrices"), py::arg("scale"), py::arg("workspace"), py::arg("values"),
        py::arg("gradients"), py::arg("flag"), py::arg("stream"),
        "Launches the projected influence of sizes (T, O, I, m, n) and dims (k_out, k_in), as plan_projected() says.\n"
        "matrices and dims are output side first; workspace is partials and slots (0 if no gradients are wanted).");
}
