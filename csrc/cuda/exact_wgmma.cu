#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "exact.h"
#include "exact_wgmma.h"

namespace tikmix_fast::gpu {
namespace {

template <class Number, int kCluster, bool kBfloat16Queries, bool kTotal>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    exact_wgmma_kernel(const __grid_constant__ ExactProblem problem, const __grid_constant__ TensorMap grad_output,
                       const __grid_constant__ TensorMap input) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char shared[];
    exact_wgmma<Number, kCluster, kBfloat16Queries, kTotal>(problem, grad_output, input, shared);
#else
    __trap();  // no other architecture has the instructions
#endif
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver is asked for it at run time, so that the module loads where there is no driver.
const char* find_encoder(EncodeTiled* encode) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (result != cudaDriverEntryPointSuccess) return "the CUDA driver is too old for tensor maps";
    *encode = reinterpret_cast<EncodeTiled>(found);
    return nullptr;
}

const char* make_map(TensorMap* map, const Rows& rows, int64_t count, int64_t width, Element element) {
    EncodeTiled encode = nullptr;
    if (const char* error = find_encoder(&encode)) return error;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(least(count, kMostMapRows))};
    const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(rows.stride * kElementBytes)};
    const cuuint32_t box[] = {kBoxColumns, kBoxRows}, steps[] = {1, 1};
    CUtensorMap made;
    static_assert(sizeof(made) == sizeof(*map));
    const CUresult result =
        encode(&made, element == Element::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
               2, const_cast<void*>(rows.data), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return "the CUDA driver refused a tensor map: rows must begin at multiples of 16 bytes";
    std::memcpy(map, &made, sizeof(made));
    return nullptr;
}

template <class Number, int kCluster, bool kBfloat16Queries, bool kTotal>
const char* launch(const ExactProblem& problem, int64_t multiprocessors, cudaStream_t stream) {
    const auto kernel = exact_wgmma_kernel<Number, kCluster, kBfloat16Queries, kTotal>;
    const auto shared_bytes = static_cast<int>(exact_wgmma_bytes(problem.tasks));
    // First, since it makes the device's context this thread's, if none of its calls has done so.
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    TensorMap grad_output, input;
    if (const char* wrong =
            make_map(&grad_output, problem.grad_output, problem.rows, problem.height, problem.element)) {
        return wrong;
    }
    if (const char* wrong = make_map(&input, problem.input, problem.rows, problem.width, problem.element)) return wrong;

    const int64_t clusters = least(wgmma_cluster_items(problem, kCluster), most(1, multiprocessors / kCluster));
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(clusters * kCluster);
    config.blockDim = kWgmmaThreads;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kCluster, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, problem, grad_output, input);
    if (error == cudaSuccess) error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Number, int kCluster>
const char* launch(const ExactProblem& problem, int64_t multiprocessors, cudaStream_t stream) {
    const bool total = problem.grad_weight != nullptr;
    if (problem.query_element == Element::bfloat16) {
        return total ? launch<Number, kCluster, true, true>(problem, multiprocessors, stream)
                     : launch<Number, kCluster, true, false>(problem, multiprocessors, stream);
    }
    return total ? launch<Number, kCluster, false, true>(problem, multiprocessors, stream)
                 : launch<Number, kCluster, false, false>(problem, multiprocessors, stream);
}

}  // namespace

const char* launch_exact_wgmma(const ExactProblem& problem, int multiprocessors, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const bool paired = wgmma_cluster(problem) == 2;
    if (wgmma_cluster_items(problem, 1) == 0) return nullptr;
    if (problem.element == Element::bfloat16) {
        return paired ? launch<BFloat16, 2>(problem, multiprocessors, on)
                      : launch<BFloat16, 1>(problem, multiprocessors, on);
    }
    return paired ? launch<Float16, 2>(problem, multiprocessors, on) : launch<Float16, 1>(problem, multiprocessors, on);
}

}  // namespace tikmix_fast::gpu
