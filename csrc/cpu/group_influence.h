// The group influence of one layer on a CPU.
#pragma once

#include <vector>

#include "problem.h"

namespace tikmix_fast {

// The kernels that were compiled in and that this processor can run, best first.
std::vector<Kernel> usable_kernels();

// Writes values [n, m]; the result does not depend on the number of threads.
void group_influence(const Problem& problem, const Kernel& kernel, int threads, double* values);

}  // namespace tikmix_fast
