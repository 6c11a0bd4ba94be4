// The CountSketch of the rows of a matrix: every column is added to, or subtracted from, one of `dim` buckets.
//
// Columns come in blocks of `dim`, a power of two. Column j of block b goes to bucket (j mod dim) ^ mask_b, so that a
// vector of neighbouring columns stays together: the high bits of the mask say where it goes, the low bits permute it.
#pragma once

#include <cstdint>

#include "problem.h"

namespace tikmix_fast {

struct SketchProblem {
    int64_t rows;          // T
    int64_t columns;       // D
    int64_t dim;           // buckets, a power of two in kSmallestSketch ... kLargestSketch
    Matrix input;          // [T, D]
    const int32_t* codes;  // [D]; the bucket where the column is added, ~bucket where it is subtracted
    float* output;         // [T, dim]
};

constexpr int64_t kSmallestSketch = 16;
constexpr int64_t kLargestSketch = 1024;

// The codes as the kernels read them.
struct SketchTables {
    const int32_t* masks;    // [blocks]
    const uint32_t* signs;   // [blocks * dim] sign bits of float32
    const uint32_t* paired;  // [blocks * dim / 2] sign bits of pairs of bfloat16
};

// Writes `count` rows of the output from `first` on.
using SketchKernel = void (*)(const SketchProblem&, const SketchTables&, int64_t first, int64_t count);

void sketch_generic(const SketchProblem&, const SketchTables&, int64_t first, int64_t count);
void sketch_avx2(const SketchProblem&, const SketchTables&, int64_t first, int64_t count);
void sketch_avx512(const SketchProblem&, const SketchTables&, int64_t first, int64_t count);

// Writes the sketch of all rows; throws std::invalid_argument where the codes are no block-permuted sketch. The result
// does not depend on the number of threads.
void sketch_rows(const SketchProblem& problem, const char* instruction_set, int threads);

}  // namespace tikmix_fast
