// What the Python binding fills in, and what each instruction set provides. Plain data: see kernel.h for why.
//
// Legend: T rows (tokens), O x I weights, m domains, n queries. Sizes, strides and offsets are int64 and count
// elements.
#pragma once

#include <cstdint>

namespace tikmix_fast {

enum class Element : int64_t { float32 = 0, bfloat16 = 1 };

struct Matrix {
    void* data;
    Element element;
    int64_t row_stride;
    int64_t column_stride;
};

struct Problem {
    int64_t rows;            // T
    int64_t height;          // O
    int64_t width;           // I
    int64_t domains;         // m
    int64_t tasks;           // n
    Matrix input;            // [T, I]
    Matrix grad_output;      // [T, O]
    Matrix queries;          // [O, I] of the first task; the columns are contiguous
    int64_t query_stride;    // from one task to the next
    const int64_t* offsets;  // [m + 1]
    const int64_t* order;    // [T], or null for the identity
    Matrix grad_weight;      // [O, I]; data is null when not wanted
};

// One rectangle of the weights, with the leading dimension of its accumulator.
struct Tile {
    int64_t first_row;
    int64_t rows;
    int64_t first_column;
    int64_t columns;
};

// Scratch of one thread. All four are aligned to 64 bytes.
struct Scratch {
    float* grad_output_panel;  // [kDepth, kTileRows]
    float* input_panel;        // [kDepth, kTileColumns]
    float* gradient;           // [kTileRows, kTileColumns], one domain
    float* total;              // [kTileRows, kTileColumns], all domains
};

// A tile's accumulator and panels fit the L2 cache together with the query tiles of a few tasks.
constexpr int64_t kTileRows = 192;
constexpr int64_t kTileColumns = 256;
// Rows per packed panel. Sums are restarted at every panel, which also bounds the rounding error of long domains.
constexpr int64_t kDepth = 192;

// Adds a tile's inner products to sums [n, m] and its total gradient to the problem's grad_weight.
using AccumulateTile = void (*)(const Problem&, const Tile&, const Scratch&, double* sums);

struct Kernel {
    const char* name;
    AccumulateTile accumulate_tile;
};

extern const Kernel generic_kernel;
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;

}  // namespace tikmix_fast
