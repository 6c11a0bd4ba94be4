// What follows an exact kernel on its stream. See exact.h for what is returned and promised.
#pragma once

#include "fragments.h"
#include "problem.h"

namespace tikmix_fast::gpu {

// Adds up problem.partials to problem.values, and the split totals to the total where there are several; where offsets
// or order were wrong, all values are NaN and problem.flag says so. `shape` is the tile of the kernel that ran.
const char* launch_finish_exact(const ExactProblem& problem, const TileShape& shape, int multiprocessors, void* stream);

}  // namespace tikmix_fast::gpu
