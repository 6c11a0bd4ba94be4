// The mma kernel and what follows it in the simulator, and how it meets the banks of shared memory.
#include "exact_mma.h"

#include <pybind11/pybind11.h>

#include <set>
#include <vector>

#include "arguments.h"
#include "finish_kernel.h"

namespace py = pybind11;
using namespace tikmix_fast::gpu;

namespace {

ExactProblem problem_of(const py::dict& given) {
    ExactProblem problem = common_fields<ExactProblem>(given);
    problem.query_element = element(given, "query_element");
    problem.queries = address<void>(given, "queries");
    problem.grad_weight = address<void>(given, "grad_weight");
    problem.grad_weight_element = element(given, "grad_weight_element");
    problem.grad_weight_stride = number(given, "grad_weight_stride");
    problem.split_totals = address<float>(given, "split_totals");
    return problem;
}

template <class Number, bool kBfloat16Queries, bool kTotal, int kStages>
void launch(const ExactProblem& problem, int64_t blocks, uint64_t seed) {
    simt::launch(
        blocks, MmaKernel::kThreads, MmaKernel::shared_bytes(kStages, problem.tasks),
        [&](unsigned char* shared) { exact_mma<Number, kBfloat16Queries, kTotal, kStages>(problem, shared); }, seed);
}

template <class Number, bool kBfloat16Queries>
void launch(const ExactProblem& problem, int stages, int64_t blocks, uint64_t seed) {
    const auto chosen = problem.grad_weight ? stages == 4 ? &launch<Number, kBfloat16Queries, true, 4>
                                                          : &launch<Number, kBfloat16Queries, true, 3>
                        : stages == 4       ? &launch<Number, kBfloat16Queries, false, 4>
                                            : &launch<Number, kBfloat16Queries, false, 3>;
    chosen(problem, blocks, seed);
}

void run(const py::dict& given) {
    const ExactProblem problem = problem_of(given);
    const int stages = static_cast<int>(number(given, "stages"));
    const int64_t blocks = number(given, "blocks");
    const auto seed = static_cast<uint64_t>(number(given, "seed"));
    const bool bfloat16_queries = problem.query_element == Element::bfloat16;
    // What may be read; a row's padding may not.
    for (int64_t row = 0; row < problem.rows; ++row) {
        simt::allow(static_cast<const uint16_t*>(problem.input.data) + row * problem.input.stride, problem.width * 2);
        simt::allow(static_cast<const uint16_t*>(problem.grad_output.data) + row * problem.grad_output.stride,
                    problem.height * 2);
    }
    simt::allow(problem.queries, number(given, "query_bytes"));
    const auto chosen = problem.element == Element::bfloat16
                            ? bfloat16_queries ? &launch<BFloat16, true> : &launch<BFloat16, false>
                        : bfloat16_queries ? &launch<Float16, true>
                                           : &launch<Float16, false>;
    chosen(problem, stages, blocks, seed);

    simt::launch(
        blocks, kFinishThreads, kFinishBytes,
        [&](unsigned char* shared) { finish_values(problem, MmaShape::value(), shared); }, seed);
    if (problem.domains.order) {
        simt::launch(blocks, kFinishThreads, 0, [&](unsigned char*) { check_order(problem); }, seed);
    }
    if (problem.grad_weight && problem.splits > 1) {
        simt::launch(
            blocks, kFinishThreads, 0, [&](unsigned char*) { finish_total(problem, MmaShape::value()); }, seed);
    }
}

// How often the busiest group of four banks is used when eight lanes use shared memory at a time.
template <class Offset>
int most_conflicts(int first_thread, Offset offset) {
    int worst = 0;
    for (int phase = 0; phase < kLanes; phase += 8) {
        std::vector<int> uses(8);
        for (int lane = phase; lane < phase + 8; ++lane) {
            worst = std::max(worst, ++uses[offset(first_thread + lane) / 16 % 8]);
        }
    }
    return worst;
}

int conflicts_of_copies() {
    int worst = 0;
    for (int thread = 0; thread < MmaKernel::kThreads; thread += kLanes) {
        for (int i = 0; i < MmaKernel::kBlockRows * kChunks / MmaKernel::kThreads; ++i) {
            worst = std::max(worst, most_conflicts(thread, [&](int each) {
                                 return chunk_offset(copied_chunk(MmaKernel::kThreads, each, i));
                             }));
        }
    }
    return worst;
}

int conflicts_of_fragments(bool is_a) {
    int worst = 0;
    for (int first_column = 0; first_column < kChunks; first_column += 8) {
        for (int right = 0; right < 8; right += 2) {
            worst = std::max(worst, most_conflicts(0, [&](int lane) {
                                 const Chunk chunk = is_a ? chunk_for_a(lane) : chunk_for_b(lane);
                                 const int offset = chunk_offset({chunk.row, chunk.column + first_column});
                                 return static_cast<int>(chunks_right(static_cast<uint32_t>(offset), right));
                             }));
        }
    }
    return worst;
}

// Whether every chunk of a stage is copied once, each to a place of its own, and moving to the right is what it says.
bool chunks_are_places() {
    std::set<int> offsets;
    for (int thread = 0; thread < MmaKernel::kThreads; ++thread) {
        for (int i = 0; i < MmaKernel::kBlockRows * kChunks / MmaKernel::kThreads; ++i) {
            const Chunk chunk = copied_chunk(MmaKernel::kThreads, thread, i);
            if (chunk.row >= MmaKernel::kBlockRows || chunk.column >= kChunks) return false;
            if (!offsets.insert(chunk_offset(chunk)).second) return false;
            if (chunk.column % 8 > 1) continue;
            for (int right = 0; right < 8; right += 2) {
                const auto offset = static_cast<uint32_t>(chunk_offset(chunk));
                const int expected = chunk_offset({chunk.row, chunk.column + right});
                if (chunks_right(offset + 1024, right) != static_cast<uint32_t>(expected) + 1024) return false;
            }
        }
    }
    return static_cast<int>(offsets.size()) * kChunkBytes == MmaKernel::kOperandBytes &&
           *offsets.rbegin() + kChunkBytes == MmaKernel::kOperandBytes;
}

}  // namespace

PYBIND11_MODULE(exact_mma, module) {
    module.def("run", run);
    module.def("conflicts_of_copies", conflicts_of_copies);
    module.def("conflicts_of_fragments", conflicts_of_fragments);
    module.def("chunks_are_places", chunks_are_places);
    module.def("shared_bytes", [](int stages, int64_t tasks) { return MmaKernel::shared_bytes(stages, tasks); });
}
