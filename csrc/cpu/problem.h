// What the Python binding fills in, and what each instruction set provides. Plain data: see kernel.h for why.
//
// Legend: T rows (tokens), O x I weights, m domains, n tasks. Sizes, strides and offsets are int64 and count elements.
#pragma once

#include <cstdint>

namespace tikmix_fast {

enum class Element : int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Matrix {
    const void* data;
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
    float* grad_weight;      // [O, I], or null when not wanted
    int64_t grad_weight_row_stride;
    int64_t grad_weight_column_stride;
};

// Some consecutive rows of both inputs, cut into panels of a few columns: panel[k][c]. A packed row k is one row as
// float32, or two rows of one domain as pairs of bfloat16; either way, one 32-bit word per column.
struct Block {
    const int64_t* sources;  // rows of the inputs that each packed row holds; a negative one stands for zeros
    const int64_t* bounds;   // [m + 1] packed rows of the domains
    float* grad_output;      // panels of micro_rows columns
    int64_t grad_output_panel_stride;
    float* input;  // panels of micro_columns columns
    int64_t input_panel_stride;
};

// One rectangle of the weights.
struct Tile {
    int64_t first_row;
    int64_t rows;
    int64_t first_column;
    int64_t columns;
};

constexpr int64_t kTileRows = 192;
constexpr int64_t kTileColumns = 256;
// Small layers are cut into smaller tiles, to give every thread some, and so are layers with many tasks.
constexpr int64_t kSmallestTileRows = 48;
constexpr int64_t kSmallestTileColumns = 64;

// The memory of one thread for a tile, cut into whole micro-tiles column by column, aligned to 64 bytes.
struct Scratch {
    float* gradient;   // of one domain
    float* total;      // of all domains
    float* queries;    // of all tasks, one micro-tile of each after the other
    double* products;  // [n, lanes] of one domain
};
// Floats in the widest vector of any kernel.
constexpr int64_t kMostLanes = 16;

struct Kernel {
    const char* name;
    int64_t micro_rows;
    int64_t micro_columns;
    int64_t rows_together;      // in a packed row
    const Kernel* for_float32;  // takes over where an input is not bfloat16; null if this kernel takes every dtype
    // Fills `count` packed rows of both inputs, from packed row `first` of the block on.
    void (*pack_rows)(const Problem&, const Block&, int64_t first, int64_t count);
    // Adds a tile's inner products over the rows of the block to sums [n, m], and its total gradient to grad_weight.
    void (*accumulate_tile)(const Problem&, const Block&, const Tile&, const Scratch&, double* sums);
};

extern const Kernel generic_kernel;
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;
extern const Kernel avx512_bf16_kernel;

}  // namespace tikmix_fast
