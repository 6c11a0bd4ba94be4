// The tile kernel, compiled once per instruction set: the including file defines TIKMIX_FAST_VECTOR_BYTES and
// TIKMIX_FAST_MICRO_ROWS first.
//
// Everything is in an anonymous namespace and nothing of the standard library is called but memcpy and memset: the
// linker merges equal inline functions of two files, and would let a machine without AVX-512 run the AVX-512 copy.
#include <cstring>

#include "problem.h"

namespace {

using tikmix_fast::Block;
using tikmix_fast::Element;
using tikmix_fast::kSmallestTileColumns;
using tikmix_fast::kSmallestTileRows;
using tikmix_fast::kTileColumns;
using tikmix_fast::kTileRows;
using tikmix_fast::Matrix;
using tikmix_fast::Problem;
using tikmix_fast::Scratch;
using tikmix_fast::Tile;

constexpr int kLanes = TIKMIX_FAST_VECTOR_BYTES / sizeof(float);
constexpr int kMicroRows = TIKMIX_FAST_MICRO_ROWS;
constexpr int kMicroVectors = 2;
constexpr int kMicroColumns = kMicroVectors * kLanes;
constexpr int kTasksAtOnce = 4;
// Rows multiplied at a time: an input panel of this depth stays in the L1 cache. Every time, sums start again at zero,
// which also bounds the rounding error of a long domain.
constexpr int64_t kDepth = 192;
// Rows packed at a time: reads run along rows, writes along panels, and this many lines of each stay in the L1 cache.
constexpr int64_t kPackedRows = 8;
static_assert(kSmallestTileRows % kMicroRows == 0 && kSmallestTileColumns % kMicroColumns == 0 &&
                  kTileRows % kSmallestTileRows == 0 && kTileColumns % kSmallestTileColumns == 0,
              "a tile is whole micro-tiles");

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef double WideVector __attribute__((vector_size(kLanes * sizeof(double))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));

struct Bfloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

inline Vector load_vector(const float* source) {
    Vector result;
    memcpy(&result, source, sizeof result);
    return result;
}

inline Vector load_vector(const Bfloat16* source) {
    HalfBits half;
    memcpy(&half, source, sizeof half);
    const Bits bits = __builtin_convertvector(half, Bits) << 16;
    Vector result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Copies up to kPackedRows rows of a matrix with `columns` columns to panels of kPanel columns, padded with zeros.
template <int kPanel, class T>
void pack_matrix(const Matrix& matrix, int64_t columns, const int64_t* rows, int64_t count, float* panel,
                 int64_t panel_stride) {
    const T* sources[kPackedRows];
    for (int64_t k = 0; k < count; ++k) sources[k] = static_cast<const T*>(matrix.data) + rows[k] * matrix.row_stride;
    const int64_t step = matrix.column_stride;
    int64_t c = 0;
    for (; c + kPanel <= columns; c += kPanel, panel += panel_stride) {
        for (int64_t k = 0; k < count; ++k) {
            const T* source = sources[k] + c * step;
            float copy[kPanel];
            if (step == 1) {
                for (int i = 0; i < kPanel; ++i) copy[i] = to_float(source[i]);
            } else {
                for (int i = 0; i < kPanel; ++i) copy[i] = to_float(source[i * step]);
            }
            memcpy(panel + k * kPanel, copy, sizeof copy);
        }
    }
    if (c == columns) return;
    for (int64_t k = 0; k < count; ++k) {
        for (int i = 0; i < kPanel; ++i) {
            panel[k * kPanel + i] = c + i < columns ? to_float(sources[k][(c + i) * step]) : 0.0f;
        }
    }
}

template <int kPanel>
void pack_matrix(const Matrix& matrix, int64_t columns, const int64_t* rows, int64_t count, float* panel,
                 int64_t panel_stride) {
    if (matrix.element == Element::bfloat16) {
        pack_matrix<kPanel, Bfloat16>(matrix, columns, rows, count, panel, panel_stride);
    } else {
        pack_matrix<kPanel, float>(matrix, columns, rows, count, panel, panel_stride);
    }
}

void pack_rows(const Problem& problem, const Block& block, int64_t first, int64_t count) {
    const int64_t end = first + count;
    for (int64_t row = first; row < end; row += kPackedRows) {
        const int64_t together = smaller(kPackedRows, end - row);
        int64_t rows[kPackedRows];
        for (int64_t k = 0; k < together; ++k) {
            const int64_t position = block.start + row + k;
            rows[k] = problem.order ? problem.order[position] : position;
        }
        pack_matrix<kMicroRows>(problem.grad_output, problem.height, rows, together,
                                block.grad_output + row * kMicroRows, block.grad_output_panel_stride);
        pack_matrix<kMicroColumns>(problem.input, problem.width, rows, together, block.input + row * kMicroColumns,
                                   block.input_panel_stride);
    }
}

// target [kMicroRows, kMicroColumns] = (or +=, unless it is the first panel) a^T b over `depth` packed rows.
void multiply(int64_t depth, const float* a, const float* b, float* target, bool first) {
    Vector sum[kMicroRows][kMicroVectors] = {};
    for (int64_t k = 0; k < depth; ++k, a += kMicroRows, b += kMicroColumns) {
        Vector column[kMicroVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kMicroVectors; ++v) column[v] = load_vector(b + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kMicroVectors; ++v) sum[r][v] += a[r] * column[v];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kMicroVectors; ++v) {
            float* place = target + r * kTileColumns + v * kLanes;
            if (!first) sum[r][v] += load_vector(place);
            memcpy(place, &sum[r][v], sizeof(Vector));
        }
    }
}

// Forms the tile of the gradient of the block's rows start ... end in scratch.gradient.
void form_gradient(const Block& block, const Tile& tile, int64_t start, int64_t end, float* gradient) {
    const float* grad_output = block.grad_output + tile.first_row / kMicroRows * block.grad_output_panel_stride;
    const float* input = block.input + tile.first_column / kMicroColumns * block.input_panel_stride;
    for (int64_t k = start; k < end; k += kDepth) {
        const int64_t depth = smaller(kDepth, end - k);
        const float* b = input + k * kMicroColumns;
        for (int64_t c = 0; c < tile.columns; c += kMicroColumns, b += block.input_panel_stride) {
            const float* a = grad_output + k * kMicroRows;
            for (int64_t r = 0; r < tile.rows; r += kMicroRows, a += block.grad_output_panel_stride) {
                multiply(depth, a, b, gradient + r * kTileColumns + c, k == start);
            }
        }
    }
}

// sums[i] += <gradient tile, tile of query first_task + i>. Lanes of one row are summed in float32, rows in float64.
template <int kTasks, class T>
void take_products(const Problem& problem, const Tile& tile, int64_t first_task, const float* gradient, double* sums) {
    WideVector wide[kTasks] = {};
    double tail[kTasks] = {};
    const T* queries = static_cast<const T*>(problem.queries.data) + first_task * problem.query_stride +
                       tile.first_row * problem.queries.row_stride + tile.first_column;
    for (int64_t r = 0; r < tile.rows; ++r, gradient += kTileColumns, queries += problem.queries.row_stride) {
        Vector narrow[kTasks] = {};
        int64_t c = 0;
        for (; c + kLanes <= tile.columns; c += kLanes) {
            const Vector value = load_vector(gradient + c);
#pragma GCC unroll 4
            for (int i = 0; i < kTasks; ++i) narrow[i] += value * load_vector(queries + i * problem.query_stride + c);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kTasks; ++i) wide[i] += __builtin_convertvector(narrow[i], WideVector);
        for (; c < tile.columns; ++c) {
            for (int i = 0; i < kTasks; ++i) {
                tail[i] += static_cast<double>(gradient[c]) * to_float(queries[i * problem.query_stride + c]);
            }
        }
    }
    for (int i = 0; i < kTasks; ++i) {
        double sum = tail[i];
        for (int lane = 0; lane < kLanes; ++lane) sum += wide[i][lane];
        sums[i * problem.domains] += sum;
    }
}

template <class T>
void take_all_products(const Problem& problem, const Tile& tile, const float* gradient, double* sums) {
    int64_t i = 0;
    for (; i + kTasksAtOnce <= problem.tasks; i += kTasksAtOnce) {
        take_products<kTasksAtOnce, T>(problem, tile, i, gradient, sums + i * problem.domains);
    }
    for (; i < problem.tasks; ++i) take_products<1, T>(problem, tile, i, gradient, sums + i * problem.domains);
}

void add_tile(const Tile& tile, const float* source, float* target) {
    for (int64_t r = 0; r < tile.rows; ++r, source += kTileColumns, target += kTileColumns) {
        for (int64_t c = 0; c < tile.columns; ++c) target[c] += source[c];
    }
}

void add_to_grad_weight(const Problem& problem, const Tile& tile, const float* total) {
    float* first = problem.grad_weight + tile.first_row * problem.grad_weight_row_stride +
                   tile.first_column * problem.grad_weight_column_stride;
    for (int64_t r = 0; r < tile.rows; ++r, total += kTileColumns, first += problem.grad_weight_row_stride) {
        for (int64_t c = 0; c < tile.columns; ++c) first[c * problem.grad_weight_column_stride] += total[c];
    }
}

void accumulate_tile(const Problem& problem, const Block& block, const Tile& tile, const Scratch& scratch,
                     double* sums) {
    if (problem.grad_weight) memset(scratch.total, 0, sizeof(float) * tile.rows * kTileColumns);
    for (int64_t j = 0; j < problem.domains; ++j) {
        const int64_t start = larger(problem.offsets[j] - block.start, 0);
        const int64_t end = smaller(problem.offsets[j + 1] - block.start, block.rows);
        if (start >= end) continue;
        form_gradient(block, tile, start, end, scratch.gradient);
        if (problem.queries.element == Element::bfloat16) {
            take_all_products<Bfloat16>(problem, tile, scratch.gradient, sums + j);
        } else {
            take_all_products<float>(problem, tile, scratch.gradient, sums + j);
        }
        if (problem.grad_weight) add_tile(tile, scratch.gradient, scratch.total);
    }
    if (problem.grad_weight) add_to_grad_weight(problem, tile, scratch.total);
}

}  // namespace
