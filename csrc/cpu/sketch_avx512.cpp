// Compiled with AVX-512 F and BW: 16 of 32 registers hold sums.
#define TIKMIX_FAST_VECTOR_BYTES 64
#define TIKMIX_FAST_SKETCH_ROWS 4
#include "sketch_kernel.h"

void tikmix_fast::sketch_avx512(const SketchProblem& problem, const SketchTables& tables, int64_t first,
                                int64_t count) {
    sketch(problem, tables, first, count);
}
