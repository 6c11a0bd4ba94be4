// Launching the kernels of the projected influence; without CUDA's headers, streams are cudaStream_t.
//
// Every launch returns null or what is wrong. None waits, allocates or reads device memory on the host, so that CUDA
// graphs can capture them. There must be rows, columns and domains.
#pragma once

#include "problem.h"
#include "projected_plan.h"

namespace tikmix_fast::gpu {

// Fills the plan for a device.
const char* plan_projected_on(int device, int64_t rows, int64_t k_out, int64_t k_in, ProjectedPlan* plan);

// Writes problem.matrix, of any factor of a projection.
const char* launch_factor(const FactorProblem& problem, int multiprocessors, void* stream);

// Fills problem.partials, and problem.slots unless null.
const char* launch_projected(const ProjectedProblem& problem, int multiprocessors, void* stream);

// Then problem.values, and problem.gradients if there are slots. Where offsets or order were wrong all of them are NaN
// and problem.flag says so.
const char* launch_finish_projected(const ProjectedProblem& problem, int multiprocessors, void* stream);

}  // namespace tikmix_fast::gpu
