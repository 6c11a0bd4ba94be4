#include <cuda_runtime.h>

#include "factor.h"
#include "projected_launch.h"

namespace tikmix_fast::gpu {
namespace {

__global__ void __launch_bounds__(kFactorThreads) factor_kernel(const __grid_constant__ FactorProblem problem) {
    write_factor(problem);
}

}  // namespace

const char* launch_factor(const FactorProblem& problem, int multiprocessors, void* stream) {
    const int64_t needed = divide_up(problem.dim * problem.stride / 8, kFactorThreads);
    if (needed == 0) return nullptr;
    const int blocks = static_cast<int>(least(needed, int64_t{multiprocessors} * 8));
    factor_kernel<<<blocks, kFactorThreads, 0, static_cast<cudaStream_t>(stream)>>>(problem);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tikmix_fast::gpu
