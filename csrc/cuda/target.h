// Functions that run on the device and, as they stand, on a CPU, where the tests call them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TIKMIX_FAST_ANYWHERE __host__ __device__ __forceinline__
#define TIKMIX_FAST_DEVICE __device__ __forceinline__
// Before a loop over registers: every index into them has to be a constant.
#define TIKMIX_FAST_UNROLL _Pragma("unroll")
#else
#define TIKMIX_FAST_ANYWHERE inline
#define TIKMIX_FAST_DEVICE inline
#define TIKMIX_FAST_UNROLL
#endif

namespace tikmix_fast::gpu {

TIKMIX_FAST_ANYWHERE constexpr int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }
TIKMIX_FAST_ANYWHERE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TIKMIX_FAST_ANYWHERE constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace tikmix_fast::gpu
