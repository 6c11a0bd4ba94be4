#include <cuda_runtime.h>

#include "pack.h"
#include "pack_kernel.h"

namespace tikmix_fast::gpu {
namespace {

template <int kPerLoad>
__global__ void __launch_bounds__(kPackThreads)
    pack_queries_kernel(const __grid_constant__ PackProblem problem, const __grid_constant__ TileShape shape) {
    pack_queries<kPerLoad>(problem, shape);
}

}  // namespace

const char* launch_pack_queries(const PackProblem& problem, const TileShape& shape, void* stream) {
    const bool to_bfloat16 = problem.packed_element == Element::bfloat16;
    const int64_t loads = divide_up(problem.height, shape.rows) * divide_up(problem.width, shape.columns) *
                          problem.tasks * (shape.elements() / (to_bfloat16 ? 8 : 4));
    if (loads == 0) return nullptr;
    // Threads go on to further loads; so many blocks occupy any GPU.
    const auto blocks = static_cast<unsigned>(least(divide_up(loads, kPackThreads), 1 << 16));
    const auto kernel = to_bfloat16 ? pack_queries_kernel<8> : pack_queries_kernel<4>;
    kernel<<<blocks, kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(problem, shape);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tikmix_fast::gpu
