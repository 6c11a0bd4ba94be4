// What the Python binding fills in, and what each instruction set provides. Plain data: see kernel.h for why.
//
// Legend: T rows (tokens), O x I weights, m domains, n tasks. Sizes, strides and offsets are int64 and count elements.
#pragma once

#include <cstdint>

namespace tikmix_fast {

constexpr int64_t kCacheLine = 64;

// Static, so that every file has its own: see kernel.h.
static inline int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

enum class Element : int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Matrix {
    const void* data;
    Element element;
    int64_t row_stride;
    int64_t column_stride;
};

// The task gradients. Plain: row-major matrices, one after the other. Packed: panels[column micro-tile][row micro-tile]
// [task][micro-tile], padded with zeros, of the element that Kernel::packed_element names.
struct Queries {
    const void* data;
    Element element;
    int64_t tasks;  // n
    bool packed;
    int64_t stride;      // plain: from one task to the next
    int64_t row_stride;  // plain: the columns are contiguous
};

struct Problem {
    int64_t rows;            // T
    int64_t height;          // O
    int64_t width;           // I
    int64_t domains;         // m
    Matrix input;            // [T, I]
    Matrix grad_output;      // [T, O]
    Queries queries;         // [n, O, I]
    const int64_t* offsets;  // [m + 1]
    const int64_t* order;    // [T], or null for the identity
    float* grad_weight;      // [O, I], or null when not wanted
    int64_t grad_weight_row_stride;
    int64_t grad_weight_column_stride;
};

// A rectangle of the weights.
struct Tile {
    int64_t first_row;
    int64_t rows;
    int64_t first_column;
    int64_t columns;
};

// Consecutive packed rows of one domain.
struct Segment {
    int64_t domain;
    int64_t start;
    int64_t end;
    bool whole;  // all of them
};

// Some consecutive rows of both inputs. A packed row is one row as float32, or two rows of one domain as pairs of
// bfloat16; either way, one 32-bit word per column.
struct Block {
    const int64_t* sources;  // rows of the inputs that each packed row holds; a negative one stands for zeros
    const Segment* segments;
    int64_t segment_count;
    Tile part;           // the weights whose columns of grad_output and input are packed
    float* grad_output;  // panels of micro_rows columns, panel[k][r]
    int64_t grad_output_panel_stride;
    float* input;  // panels of micro_columns columns, panel[k][c]
    int64_t input_panel_stride;
};

// A multiple of every kernel's micro_rows. Panels of so many columns of grad_output, of one block, stay in the L2 cache
// while the panels of the input pass by them.
constexpr int64_t kTileRows = 48;
// A multiple of every kernel's micro_columns: tiles are no narrower.
constexpr int64_t kSmallestTileColumns = 64;

// The memory of one thread, aligned to cache lines.
struct Scratch {
    float* queries;  // a column of micro-tiles of a tile, as in packed queries
    float* total;    // a micro-tile of the sum over the block's segments
    float* partial;  // a micro-tile of a long segment
};

// Sums [m, n] of a tile have rows of this stride: kernels add whole vectors of tasks.
constexpr int64_t kTasksAtOnce = 4;
static inline int64_t sum_stride(int64_t tasks) { return tasks + kTasksAtOnce - 1; }

struct Kernel {
    const char* name;
    int64_t micro_rows;
    int64_t micro_columns;
    int64_t rows_together;      // in a packed row
    const Kernel* for_float32;  // takes over where an input is not bfloat16; null if this kernel takes every dtype
    // The element of packed queries, by the element of the plain ones.
    Element (*packed_element)(Element);
    // Writes the packed queries of one tile; `panels` are those of all tiles.
    void (*pack_queries)(const Queries&, int64_t height, const Tile&, void* panels);
    // Both fill `count` packed rows, from packed row `first` of the block on.
    void (*pack_grad_output)(const Problem&, const Block&, int64_t first, int64_t count);
    void (*pack_input)(const Problem&, const Block&, int64_t first, int64_t count);
    // Adds a tile's inner products over the rows of the block to sums [m, n], and its total gradient to grad_weight.
    void (*accumulate_tile)(const Problem&, const Block&, const Tile&, const Scratch&, double* sums);
};

extern const Kernel generic_kernel;
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;
extern const Kernel avx512_bf16_kernel;

}  // namespace tikmix_fast
