#include <cuda_runtime_api.h>

#include "device.h"

namespace tikmix_fast {

int toolkit_version() { return CUDART_VERSION; }

const char* compute_capability(int device, int* major, int* minor) {
    cudaError_t error = cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tikmix_fast
