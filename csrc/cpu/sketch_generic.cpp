// The baseline that every processor of this architecture runs.
#define TIKMIX_FAST_VECTOR_BYTES 16
#define TIKMIX_FAST_SKETCH_ROWS 2
#include "sketch_kernel.h"

void tikmix_fast::sketch_generic(const SketchProblem& problem, const SketchTables& tables, int64_t first,
                                 int64_t count) {
    sketch(problem, tables, first, count);
}
