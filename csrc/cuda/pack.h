// Bringing queries into the order of a kernel's registers (fragments.h). See exact.h for what is returned and promised.
#pragma once

#include "fragments.h"
#include "problem.h"

namespace tikmix_fast::gpu {

struct PackProblem {
    int64_t tasks, height, width;  // n, O, I
    const void* queries;           // [n, O, I]
    Element element;               // of the queries: any
    int64_t task_stride, row_stride, column_stride;
    void* packed;            // [tiles, n, tile elements], at a multiple of 16 bytes
    Element packed_element;  // bfloat16 or float32
};

const char* launch_pack_queries(const PackProblem& problem, const TileShape& shape, void* stream);

}  // namespace tikmix_fast::gpu
