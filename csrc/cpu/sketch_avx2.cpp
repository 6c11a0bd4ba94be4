// Compiled with AVX2: 8 of 16 registers hold sums.
#define TIKMIX_FAST_VECTOR_BYTES 32
#define TIKMIX_FAST_SKETCH_ROWS 2
#include "sketch_kernel.h"

void tikmix_fast::sketch_avx2(const SketchProblem& problem, const SketchTables& tables, int64_t first, int64_t count) {
    sketch(problem, tables, first, count);
}
