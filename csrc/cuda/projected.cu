#include <cuda_runtime.h>

#include "projected.h"
#include "projected_finish.h"
#include "projected_launch.h"

namespace tikmix_fast::gpu {
namespace {

constexpr int kFinishBlocks = 2048 / kFinishThreads;  // of a multiprocessor

template <class Shape, class Number>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    projected_kernel(const __grid_constant__ ProjectedProblem problem) {
    extern __shared__ __align__(128) unsigned char shared[];
    projected<Shape, Number>(problem, shared);
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_projected_kernel(const __grid_constant__ ProjectedProblem problem) {
    __shared__ __align__(16) unsigned char shared[kFinishBytes];
    finish_projected(problem, shared);
}

__global__ void __launch_bounds__(kFinishThreads) add_slots_kernel(const __grid_constant__ ProjectedProblem problem) {
    __shared__ __align__(16) unsigned char shared[kFinishBytes];
    add_slots(problem, shared);
}

__global__ void __launch_bounds__(kFinishThreads)
    check_projected_order_kernel(const __grid_constant__ ProjectedProblem problem) {
    check_projected_order(problem);
}

template <class Shape>
cudaError_t launch(const ProjectedProblem& problem, int blocks, cudaStream_t stream) {
    const auto kernel =
        problem.element == Element::bfloat16 ? &projected_kernel<Shape, BFloat16> : &projected_kernel<Shape, Float16>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(problem);
    return cudaGetLastError();
}

int blocks_for(int64_t threads, int multiprocessors) {
    return static_cast<int>(clamp(divide_up(threads, kFinishThreads), 1, int64_t{multiprocessors} * kFinishBlocks));
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* plan_projected_on(int device, int64_t rows, int64_t k_out, int64_t k_in, ProjectedPlan* plan) {
    int multiprocessors = 0, shared_bytes = 0;
    cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) *plan = plan_projected(rows, k_out, k_in, multiprocessors, shared_bytes);
    return text(error);
}

const char* launch_projected(const ProjectedProblem& problem, int multiprocessors, void* stream) {
    const int blocks = static_cast<int>(least(problem.splits, multiprocessors));
    const auto is_for = [&](int dim, int rows) { return problem.dim == dim && problem.rows_at_once == rows; };
    const auto on = static_cast<cudaStream_t>(stream);
    if (is_for(64, 128)) return text(launch<Projected64>(problem, blocks, on));
    if (is_for(64, 64)) return text(launch<ProjectedSmall64>(problem, blocks, on));
    if (is_for(128, 128)) return text(launch<Projected128>(problem, blocks, on));
    if (is_for(128, 64)) return text(launch<ProjectedMedium128>(problem, blocks, on));
    if (is_for(128, 32)) return text(launch<ProjectedSmall128>(problem, blocks, on));
    return "projections have kernels for k_out and k_in of at most 128, with the sizes that plan_projected gives";
}

const char* launch_finish_projected(const ProjectedProblem& problem, int multiprocessors, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const int64_t pairs = problem.tasks * problem.domains.count;
    finish_projected_kernel<<<blocks_for(pairs * kLanes, multiprocessors), kFinishThreads, 0, on>>>(problem);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess && problem.slots) {
        const int64_t numbers = problem.domains.count * problem.k_out * problem.k_in;
        add_slots_kernel<<<blocks_for(numbers, multiprocessors), kFinishThreads, 0, on>>>(problem);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess && problem.domains.order) {
        check_projected_order_kernel<<<blocks_for(problem.rows, multiprocessors), kFinishThreads, 0, on>>>(problem);
        error = cudaGetLastError();
    }
    return text(error);
}

}  // namespace tikmix_fast::gpu
