// What the Python binding fills in. Plain data, passed to kernels by value; every address is on the device.
//
// Legend: T rows (tokens), O x I weights, m domains, n tasks. Sizes, strides and offsets are int64 and count elements.
#pragma once

#include <cstdint>

namespace tikmix_fast::gpu {

enum class Element : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// Rows of 16-bit elements with unit column stride; every row starts at a multiple of 16 bytes.
struct Rows {
    const void* data;
    int64_t stride;
};

// How the rows fall on domains. Neither is trusted: a kernel clamps what it reads, and the last one says what was
// wrong.
struct Domains {
    const int64_t* offsets;  // [m + 1]
    const int64_t* order;    // [T], or null
    int64_t count;           // m
};

struct ExactProblem {
    int64_t rows, height, width, tasks;  // T, O, I, n
    Element element;                     // of both inputs: bfloat16 or float16
    Rows input, grad_output;             // [T, I], [T, O]
    Domains domains;
    Element query_element;  // bfloat16 or float32
    const void* queries;    // packed as fragments.h says
    // The total is added to [O, I] with unit column stride, or is not wanted (null).
    void* grad_weight;
    Element grad_weight_element;  // float32 or bfloat16
    int64_t grad_weight_stride;
    int64_t splits;       // how many ranges of rows the work on one tile is cut into; see schedule.h
    float* partials;      // [n, m, items]: what each work item found; only what it touches is written
    float* split_totals;  // [splits, tiles, tile elements] in fragment order, where splits > 1 and the total is wanted
    double* values;       // [n, m]
    int32_t* flag;        // 1 is set where offsets are wrong, 2 where an entry of order is
};

struct ProjectedProblem {
    int64_t rows, height, width, tasks;  // T, O, I, n
    int64_t k_out, k_in;
    Element element;          // of both inputs: bfloat16 or float16
    Rows input, grad_output;  // [T, I], [T, O]
    Domains domains;
    const float* queries;  // [n, k_out, k_in]
    // Matrices in the inputs' element, as factor.h writes them: zeros in the rows from k_in or k_out on, row stride
    // matrix_stride(I) or (O).
    const void* input_matrix;   // [dim, I]
    const void* output_matrix;  // [dim, O]
    double scale;
    int64_t dim, rows_at_once, splits;  // as plan_projected in projected_plan.h says
    float* partials;  // [n, m, splits]: what the rows of each split add, scaled; only what a split touches is written
    double* values;   // [n, m]
    // Projected gradients, where they are wanted (else null): [m + splits, k_out, k_in], of which domain d of split s
    // has number d + s, and the sum [m, k_out, k_in].
    float* slots;
    float* gradients;
    int32_t* flag;
};

enum class Factor : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, codes = 4 };

struct FactorProblem {
    // codes: int32 [columns], the row of a column's entry 1, or ~row of an entry -1. Else [k, columns], contiguous.
    const void* factor;
    Factor kind;
    int64_t k, columns;
    Element element;  // of the matrix: bfloat16 or float16
    void* matrix;     // [dim, stride] as projected_plan.h says; stride is a multiple of 8
    int64_t dim, stride;
};

}  // namespace tikmix_fast::gpu
