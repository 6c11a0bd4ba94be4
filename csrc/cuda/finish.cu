#include <cuda_runtime.h>

#include "finish.h"
#include "finish_kernel.h"

namespace tikmix_fast::gpu {
namespace {

constexpr int kBlocksPerMultiprocessor = 2048 / kFinishThreads;

__global__ void __launch_bounds__(kFinishThreads)
    finish_values_kernel(const __grid_constant__ ExactProblem problem, const __grid_constant__ TileShape shape) {
    __shared__ __align__(16) unsigned char shared[kFinishBytes];
    finish_values(problem, shape, shared);
}

__global__ void __launch_bounds__(kFinishThreads) check_order_kernel(const __grid_constant__ ExactProblem problem) {
    check_order(problem);
}

// With one block asked for, ptxas need not spill to fit more.
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_total_kernel(const __grid_constant__ ExactProblem problem, const __grid_constant__ TileShape shape) {
    finish_total(problem, shape);
}

}  // namespace

const char* launch_finish_exact(const ExactProblem& problem, const TileShape& shape, int multiprocessors,
                                void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const auto blocks_for = [&](int64_t threads) {
        const int64_t most_blocks = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
        return static_cast<unsigned>(clamp(divide_up(threads, kFinishThreads), 1, most_blocks));
    };
    finish_values_kernel<<<blocks_for(problem.tasks * problem.domains.count * kLanes), kFinishThreads, 0, on>>>(problem,
                                                                                                                shape);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess && problem.domains.order) {
        check_order_kernel<<<blocks_for(problem.rows), kFinishThreads, 0, on>>>(problem);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess && problem.grad_weight && problem.splits > 1) {
        const int64_t elements =
            divide_up(problem.height, shape.rows) * divide_up(problem.width, shape.columns) * shape.elements();
        finish_total_kernel<<<blocks_for(elements / 4), kFinishThreads, 0, on>>>(problem, shape);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tikmix_fast::gpu
