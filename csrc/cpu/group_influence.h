// The group influence of one layer on a CPU.
#pragma once

#include <vector>

#include "problem.h"

namespace tikmix_fast {

// The kernels that were compiled in and that this processor can run, best first.
std::vector<Kernel> usable_kernels();

// Writes packed queries [I / micro_columns, O / micro_rows, n, micro_rows, micro_columns], sizes rounded up.
void pack_queries(const Queries& queries, const Kernel& kernel, int64_t height, int64_t width, int threads,
                  void* panels);

// Writes values [n, m]; the result does not depend on the number of threads.
void group_influence(const Problem& problem, const Kernel& kernel, int threads, double* values);

}  // namespace tikmix_fast
