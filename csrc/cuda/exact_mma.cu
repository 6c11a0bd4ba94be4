#include <cuda_runtime.h>

#include "exact.h"
#include "exact_mma.h"

namespace tikmix_fast::gpu {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;
// Leaves room for one step past the end.
constexpr int64_t kMostCounted = (int64_t{1} << 31) - (1 << 20);

// Loads of queries that are under way; as the compiler's allocation of registers for each architecture allows without
// spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kFloat32Ahead = 4;
#else
constexpr int kFloat32Ahead = 8;
#endif

template <class Number, bool kBfloat16Queries, bool kTotal, int kStages>
__global__ void __launch_bounds__(MmaKernel::kThreads, kBlocksPerMultiprocessor)
    exact_mma_kernel(const __grid_constant__ ExactProblem problem) {
    extern __shared__ __align__(1024) unsigned char shared[];
    exact_mma<Number, kBfloat16Queries, kTotal, kStages, kBfloat16Queries ? 8 : kFloat32Ahead>(problem, shared);
}

using Kernel = void (*)(ExactProblem);

template <class Number, bool kBfloat16Queries, bool kTotal>
Kernel choose(int stages) {
    return stages == 4 ? &exact_mma_kernel<Number, kBfloat16Queries, kTotal, 4>
                       : &exact_mma_kernel<Number, kBfloat16Queries, kTotal, 3>;
}

template <class Number>
Kernel choose(const ExactProblem& problem, int stages) {
    const bool total = problem.grad_weight != nullptr;
    if (problem.query_element == Element::bfloat16) {
        return total ? choose<Number, true, true>(stages) : choose<Number, true, false>(stages);
    }
    return total ? choose<Number, false, true>(stages) : choose<Number, false, false>(stages);
}

}  // namespace

const char* launch_exact_mma(const ExactProblem& problem, int multiprocessors, void* stream) {
    const int64_t items = divide_up(problem.height, MmaShape::value().rows) *
                          divide_up(problem.width, MmaShape::value().columns) * problem.splits;
    if (items == 0) return nullptr;
    if (most(most(items, problem.rows), problem.domains.count) > kMostCounted ||
        most(problem.input.stride, problem.grad_output.stride) > kMostCounted) {
        return "the mma kernel counts rows, domains, work items and the numbers between rows in 32 bits";
    }
    int device = 0, available = 0, reserved = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    }
    if (error != cudaSuccess) return cudaGetErrorString(error);

    const int64_t most = available / kBlocksPerMultiprocessor - reserved;
    const int stages = MmaKernel::shared_bytes(4, problem.tasks) <= most ? 4 : 3;
    const int bytes = static_cast<int>(MmaKernel::shared_bytes(stages, problem.tasks));
    const Kernel kernel =
        problem.element == Element::bfloat16 ? choose<BFloat16>(problem, stages) : choose<Float16>(problem, stages);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const int blocks = static_cast<int>(least(items, int64_t{multiprocessors} * kBlocksPerMultiprocessor));
    kernel<<<blocks, MmaKernel::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(problem);
    error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tikmix_fast::gpu
