// The projected kernels and what comes before and after them, in the simulator.
#include "projected.h"

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "arguments.h"
#include "factor.h"
#include "projected_finish.h"

namespace py = pybind11;
using namespace tikmix_fast::gpu;

namespace {

ProjectedProblem problem_of(const py::dict& given) {
    ProjectedProblem problem = common_fields<ProjectedProblem>(given);
    problem.k_out = number(given, "k_out");
    problem.k_in = number(given, "k_in");
    problem.queries = address<float>(given, "queries");
    problem.input_matrix = address<void>(given, "input_matrix");
    problem.output_matrix = address<void>(given, "output_matrix");
    problem.scale = given["scale"].cast<double>();
    problem.dim = number(given, "dim");
    problem.rows_at_once = number(given, "rows_at_once");
    problem.slots = address<float>(given, "slots");
    problem.gradients = address<float>(given, "gradients");
    return problem;
}

template <class Shape, class Number>
void launch(const ProjectedProblem& problem, int64_t blocks, uint64_t seed) {
    simt::launch(
        blocks, Shape::kThreads, Shape::kSharedBytes,
        [&](unsigned char* shared) { projected<Shape, Number>(problem, shared); }, seed);
}

// All kernels for bfloat16, one for float16: they differ in one instruction, and take long to compile.
auto chosen(const ProjectedProblem& problem) {
    const auto is_for = [&](int dim, int rows) { return problem.dim == dim && problem.rows_at_once == rows; };
    const bool is_bfloat16 = problem.element == Element::bfloat16;
    if (is_for(64, 128)) return is_bfloat16 ? &launch<Projected64, BFloat16> : &launch<Projected64, Float16>;
    if (is_bfloat16 && is_for(64, 64)) return &launch<ProjectedSmall64, BFloat16>;
    if (is_bfloat16 && is_for(128, 128)) return &launch<Projected128, BFloat16>;
    if (is_bfloat16 && is_for(128, 64)) return &launch<ProjectedMedium128, BFloat16>;
    if (is_bfloat16 && is_for(128, 32)) return &launch<ProjectedSmall128, BFloat16>;
    throw std::invalid_argument("no such kernel");
}

void run(const py::dict& given) {
    const ProjectedProblem problem = problem_of(given);
    const int64_t blocks = number(given, "blocks");
    const auto seed = static_cast<uint64_t>(number(given, "seed"));
    // What may be copied; a row's padding may not.
    for (int64_t row = 0; row < problem.rows; ++row) {
        simt::allow(static_cast<const uint16_t*>(problem.input.data) + row * problem.input.stride, problem.width * 2);
        simt::allow(static_cast<const uint16_t*>(problem.grad_output.data) + row * problem.grad_output.stride,
                    problem.height * 2);
    }
    simt::allow(problem.input_matrix, problem.dim * matrix_stride(problem.width) * 2);
    simt::allow(problem.output_matrix, problem.dim * matrix_stride(problem.height) * 2);
    chosen(problem)(problem, blocks, seed);

    simt::launch(
        blocks, kFinishThreads, kFinishBytes, [&](unsigned char* shared) { finish_projected(problem, shared); }, seed);
    if (problem.slots) {
        simt::launch(
            blocks, kFinishThreads, kFinishBytes, [&](unsigned char* shared) { add_slots(problem, shared); }, seed);
    }
    if (problem.domains.order) {
        simt::launch(blocks, kFinishThreads, 0, [&](unsigned char*) { check_projected_order(problem); }, seed);
    }
}

void factor(uintptr_t factor, int kind, int64_t k, int64_t columns, int element, uintptr_t matrix, int64_t dim,
            int64_t blocks) {
    FactorProblem problem = {};
    problem.factor = reinterpret_cast<const void*>(factor);
    problem.kind = static_cast<Factor>(kind);
    problem.k = k;
    problem.columns = columns;
    problem.element = static_cast<Element>(element);
    problem.matrix = reinterpret_cast<void*>(matrix);
    problem.dim = dim;
    problem.stride = matrix_stride(columns);
    simt::launch(blocks, kFactorThreads, 0, [&](unsigned char*) { write_factor(problem); });
}

py::tuple plan(int64_t rows, int64_t k_out, int64_t k_in, int64_t multiprocessors, int64_t shared_bytes) {
    const ProjectedPlan plan = plan_projected(rows, k_out, k_in, multiprocessors, shared_bytes);
    return py::make_tuple(plan.dim, plan.rows_at_once, plan.splits);
}

// How often the busiest bank group of 16 bytes is used when eight lanes read eight rows of one column, or a row.
template <int row_bytes>
int conflicts() {
    int worst = 0;
    for (int chunk = 0; chunk < row_bytes / 16; ++chunk) {
        int uses[8] = {};
        for (int row = 0; row < 8; ++row) {
            int& count = uses[swizzled(row_bytes, row, chunk) / 16 % 8];
            worst = ++count > worst ? count : worst;
        }
    }
    return worst;
}

}  // namespace

PYBIND11_MODULE(projected, module) {
    module.def("run", run);
    module.def("factor", factor);
    module.def("plan", plan);
    module.def("matrix_stride", [](int64_t columns) { return matrix_stride(columns); });
    module.def("split_of_row",
               [](int64_t rows, int64_t splits, int64_t row) { return split_of_row(rows, splits, row); });
    module.def("rows_of_split", [](int64_t rows, int64_t splits, int64_t split) {
        const RowRange range = rows_of_split(rows, splits, split, kRowBlock);
        return py::make_tuple(range.begin, range.end);
    });
    module.def("conflicts", [] { return py::make_tuple(conflicts<128>(), conflicts<256>()); });
}
