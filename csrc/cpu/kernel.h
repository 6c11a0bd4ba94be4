// The tile kernel, compiled once per instruction set: the including file defines TIKMIX_FAST_VECTOR_BYTES and
// TIKMIX_FAST_MICRO_ROWS first.
//
// Everything is in an anonymous namespace and nothing of the standard library is called but memcpy and memset: the
// linker merges equal inline functions of two files, and would let a machine without AVX-512 run the AVX-512 copy.
#include <cstring>

#include "problem.h"

namespace {

using tikmix_fast::Element;
using tikmix_fast::kDepth;
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
static_assert(kTileRows % kMicroRows == 0 && kTileColumns % kMicroColumns == 0, "a tile is whole micro-tiles");

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

inline void store(float* target, float value) { *target = value; }

inline void store(Bfloat16* target, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    // Round to nearest even; a NaN keeps its upper half, made quiet, since rounding could carry it into infinity.
    const bool nan = value != value;
    target->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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

// Copies columns first ... first + count of `depth` rows, from row `start` on, to float32 panels of kPanel columns:
// panel[p][k][c], padded with zeros to whole panels.
template <int kPanel, class T>
void pack(const Problem& problem, const Matrix& matrix, int64_t start, int64_t depth, int64_t first, int64_t count,
          float* panels) {
    const int64_t step = matrix.column_stride;
    for (int64_t k = 0; k < depth; ++k) {
        const int64_t row = problem.order ? problem.order[start + k] : start + k;
        const T* source = static_cast<const T*>(matrix.data) + row * matrix.row_stride + first * step;
        float* target = panels + k * kPanel;
        int64_t c = 0;
        if (step == 1) {
            for (; c + kPanel <= count; c += kPanel, target += depth * kPanel) {
                for (int i = 0; i < kPanel; ++i) target[i] = to_float(source[c + i]);
            }
        } else {
            for (; c + kPanel <= count; c += kPanel, target += depth * kPanel) {
                for (int i = 0; i < kPanel; ++i) target[i] = to_float(source[(c + i) * step]);
            }
        }
        if (c < count) {
            for (int i = 0; i < kPanel; ++i) target[i] = c + i < count ? to_float(source[(c + i) * step]) : 0.0f;
        }
    }
}

template <int kPanel>
void pack(const Problem& problem, const Matrix& matrix, int64_t start, int64_t depth, int64_t first, int64_t count,
          float* panels) {
    if (matrix.element == Element::bfloat16) {
        pack<kPanel, Bfloat16>(problem, matrix, start, depth, first, count, panels);
    } else {
        pack<kPanel, float>(problem, matrix, start, depth, first, count, panels);
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

// Forms the tile of one domain's gradient in scratch.gradient.
void form_gradient(const Problem& problem, const Tile& tile, int64_t start, int64_t end, const Scratch& scratch) {
    for (int64_t k = start; k < end; k += kDepth) {
        const int64_t depth = smaller(kDepth, end - k);
        pack<kMicroRows>(problem, problem.grad_output, k, depth, tile.first_row, tile.rows, scratch.grad_output_panel);
        pack<kMicroColumns>(problem, problem.input, k, depth, tile.first_column, tile.columns, scratch.input_panel);
        for (int64_t c = 0; c < tile.columns; c += kMicroColumns) {
            for (int64_t r = 0; r < tile.rows; r += kMicroRows) {
                multiply(depth, scratch.grad_output_panel + r * depth, scratch.input_panel + c * depth,
                         scratch.gradient + r * kTileColumns + c, k == start);
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

template <class T>
void add_to_grad_weight(const Matrix& grad_weight, const Tile& tile, const float* total) {
    T* first = static_cast<T*>(grad_weight.data) + tile.first_row * grad_weight.row_stride +
               tile.first_column * grad_weight.column_stride;
    for (int64_t r = 0; r < tile.rows; ++r, total += kTileColumns, first += grad_weight.row_stride) {
        for (int64_t c = 0; c < tile.columns; ++c) {
            T* place = first + c * grad_weight.column_stride;
            store(place, to_float(*place) + total[c]);
        }
    }
}

void accumulate_tile(const Problem& problem, const Tile& tile, const Scratch& scratch, double* sums) {
    const bool total_wanted = problem.grad_weight.data != nullptr;
    if (total_wanted) memset(scratch.total, 0, sizeof(float) * tile.rows * kTileColumns);
    for (int64_t j = 0; j < problem.domains; ++j) {
        const int64_t start = problem.offsets[j];
        const int64_t end = problem.offsets[j + 1];
        if (start == end) continue;
        form_gradient(problem, tile, start, end, scratch);
        if (problem.queries.element == Element::bfloat16) {
            take_all_products<Bfloat16>(problem, tile, scratch.gradient, sums + j);
        } else {
            take_all_products<float>(problem, tile, scratch.gradient, sums + j);
        }
        if (total_wanted) add_tile(tile, scratch.gradient, scratch.total);
    }
    if (!total_wanted) return;
    if (problem.grad_weight.element == Element::bfloat16) {
        add_to_grad_weight<Bfloat16>(problem.grad_weight, tile, scratch.total);
    } else {
        add_to_grad_weight<float>(problem.grad_weight, tile, scratch.total);
    }
}

}  // namespace
