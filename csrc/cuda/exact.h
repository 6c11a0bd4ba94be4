// Launching the kernels of the exact influence; without CUDA's headers, streams are cudaStream_t. Queries are packed
// before (pack.h), and what the kernels found is added up after (finish.h).
//
// Every function returns null or the runtime's error text. None waits, allocates or reads device memory on the host, so
// that CUDA graphs can capture them.
#pragma once

#include "fragments.h"
#include "problem.h"

namespace tikmix_fast::gpu {

// For kTileMma and sm_80 or newer. Fills problem.partials, and the total where it is wanted.
const char* launch_exact_mma(const ExactProblem& problem, int multiprocessors, void* stream);

// For kTileWgmma and sm_90a.
const char* launch_exact_wgmma(const ExactProblem& problem, int multiprocessors, void* stream);

}  // namespace tikmix_fast::gpu
