// The tile kernel, compiled once per instruction set: the including file defines TIKMIX_FAST_VECTOR_BYTES and
// TIKMIX_FAST_MICRO_ROWS first, and TIKMIX_FAST_ROW_PAIRS where it multiplies two bfloat16 rows at a time.
//
// Everything is in an anonymous namespace and nothing of the standard library is called but memcpy and memset: the
// linker merges equal inline functions of two files, and would let a machine without AVX-512 run the AVX-512 copy.
#include <cstring>
#ifdef TIKMIX_FAST_ROW_PAIRS
#include <immintrin.h>
#endif

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
// Packed rows multiplied at a time: an input panel of this depth stays in the L1 cache. Every time, sums start again at zero,
// which also bounds the rounding error of a long domain.
constexpr int64_t kDepth = 192;
// Packed rows filled at a time: reads run along rows, writes along panels, and this many lines of each stay in the L1 cache.
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

struct Float16 {
    uint16_t bits;
};

template <class To, class From>
inline To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From), "same bits");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

// Both work on one number and on a vector of them; Words are of uint32_t, Floats of float.
template <class Floats, class Words>
inline Floats widen_bfloat16(Words bits) {
    return reinterpret<Floats>(bits << 16);
}

template <class Floats, class Words>
inline Floats widen_float16(Words bits) {
    const Words magnitude = bits & 0x7fff;
    // The exponents' biases differ by 112. Multiplying, not adding, is exact for denormals as well.
    const Words finite = reinterpret<Words>(reinterpret<Floats>(magnitude << 13) * 0x1p112f);
    // The exponent of infinity and NaN, and no other, carries over.
    const Words infinite = ((magnitude + 0x400) >> 15) * 0x7f800000;
    return reinterpret<Floats>(finite | infinite | (bits & 0x8000) << 16);
}

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) { return widen_bfloat16<float, uint32_t>(value.bits); }
inline float to_float(Float16 value) { return widen_float16<float, uint32_t>(value.bits); }

inline Bits load_bits(const void* source) {
    HalfBits half;
    memcpy(&half, source, sizeof half);
    return __builtin_convertvector(half, Bits);
}

inline Vector load_vector(const float* source) {
    Vector result;
    memcpy(&result, source, sizeof result);
    return result;
}

inline Vector load_vector(const Bfloat16* source) { return widen_bfloat16<Vector>(load_bits(source)); }
inline Vector load_vector(const Float16* source) { return widen_float16<Vector>(load_bits(source)); }

// A packed row: how many rows of the inputs it holds, the word it holds for a column, and sum + the product of two words.
#ifdef TIKMIX_FAST_ROW_PAIRS
constexpr int kRowsTogether = 2;

inline float to_word(const Bfloat16 (&values)[2]) {
    return reinterpret<float>(static_cast<uint32_t>(values[0].bits) | static_cast<uint32_t>(values[1].bits) << 16);
}

inline Vector multiply_add(float a, Vector b, Vector sum) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}
#else
constexpr int kRowsTogether = 1;

template <class T>
inline float to_word(const T (&values)[1]) {
    return to_float(values[0]);
}

inline Vector multiply_add(float a, Vector b, Vector sum) { return sum + a * b; }
#endif

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A row of a matrix, or zeros where its number is negative.
template <class T>
struct Row {
    const T* data;
    int64_t step;

    static Row of(const Matrix& matrix, int64_t number) {
        static const T zero{};
        if (number < 0) return {&zero, 0};
        return {static_cast<const T*>(matrix.data) + number * matrix.row_stride, matrix.column_stride};
    }
};

// The words of one packed row in the panel that begins at column `first`, padded with zeros.
template <int kPanel, class T>
void pack_words(const Row<T>* rows, int64_t first, int64_t columns, float* panel) {
    bool plain = first + kPanel <= columns;
    for (int r = 0; r < kRowsTogether; ++r) plain = plain && rows[r].step == 1;
    float words[kPanel];
    for (int i = 0; plain && i < kPanel; ++i) {
        T values[kRowsTogether];
        for (int r = 0; r < kRowsTogether; ++r) values[r] = rows[r].data[first + i];
        words[i] = to_word(values);
    }
    for (int i = 0; !plain && i < kPanel; ++i) {
        T values[kRowsTogether] = {};
        for (int r = 0; r < kRowsTogether && first + i < columns; ++r) {
            values[r] = rows[r].data[(first + i) * rows[r].step];
        }
        words[i] = to_word(values);
    }
    memcpy(panel, words, sizeof words);
}

// Fills up to kPackedRows packed rows of the panels of a matrix with `columns` columns.
template <int kPanel, class T>
void pack_matrix(const Matrix& matrix, int64_t columns, const int64_t* sources, int64_t count, float* panel,
                 int64_t panel_stride) {
    Row<T> rows[kPackedRows * kRowsTogether];
    for (int64_t k = 0; k < count * kRowsTogether; ++k) rows[k] = Row<T>::of(matrix, sources[k]);
    for (int64_t c = 0; c < columns; c += kPanel, panel += panel_stride) {
        for (int64_t k = 0; k < count; ++k) {
            pack_words<kPanel>(rows + k * kRowsTogether, c, columns, panel + k * kPanel);
        }
    }
}

template <int kPanel>
void pack_matrix(const Matrix& matrix, int64_t columns, const int64_t* sources, int64_t count, float* panel,
                 int64_t panel_stride) {
    if constexpr (kRowsTogether == 2) {
        pack_matrix<kPanel, Bfloat16>(matrix, columns, sources, count, panel, panel_stride);
    } else if (matrix.element == Element::bfloat16) {
        pack_matrix<kPanel, Bfloat16>(matrix, columns, sources, count, panel, panel_stride);
    } else if (matrix.element == Element::float16) {
        pack_matrix<kPanel, Float16>(matrix, columns, sources, count, panel, panel_stride);
    } else {
        pack_matrix<kPanel, float>(matrix, columns, sources, count, panel, panel_stride);
    }
}

void pack_rows(const Problem& problem, const Block& block, int64_t first, int64_t count) {
    for (int64_t k = first; k < first + count; k += kPackedRows) {
        const int64_t together = smaller(kPackedRows, first + count - k);
        const int64_t* sources = block.sources + k * kRowsTogether;
        pack_matrix<kMicroRows>(problem.grad_output, problem.height, sources, together,
                                block.grad_output + k * kMicroRows, block.grad_output_panel_stride);
        pack_matrix<kMicroColumns>(problem.input, problem.width, sources, together, block.input + k * kMicroColumns,
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
            for (int v = 0; v < kMicroVectors; ++v) sum[r][v] = multiply_add(a[r], column[v], sum[r][v]);
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
        const int64_t start = block.bounds[j];
        const int64_t end = block.bounds[j + 1];
        if (start == end) continue;
        form_gradient(block, tile, start, end, scratch.gradient);
        if (problem.queries.element == Element::bfloat16) {
            take_all_products<Bfloat16>(problem, tile, scratch.gradient, sums + j);
        } else if (problem.queries.element == Element::float16) {
            take_all_products<Float16>(problem, tile, scratch.gradient, sums + j);
        } else {
            take_all_products<float>(problem, tile, scratch.gradient, sums + j);
        }
        if (problem.grad_weight) add_tile(tile, scratch.gradient, scratch.total);
    }
    if (problem.grad_weight) add_to_grad_weight(problem, tile, scratch.total);
}

}  // namespace
