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
constexpr int kMicroFloats = kMicroRows * kMicroColumns;
constexpr int kTasksAtOnce = 4;
// Packed rows multiplied at a time: an input panel of this depth stays in the L1 cache. Every time, sums start again at
// zero, which also bounds the rounding error of a long domain.
constexpr int64_t kDepth = 192;
// Packed rows of the input panel, and rows of the queries, that are asked for in advance: they come from afar.
constexpr int kAhead = 8;
// Packed rows filled at a time: reads run along rows, writes along panels, and this many lines of each stay in the L1
// cache.
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
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "same bits");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

// Both work on one number and on a vector of them; Words are of uint32_t, Floats of float.
template <class Floats, class Words>
inline Floats widen_bfloat16(Words bits) {
    return bits_as<Floats>(bits << 16);
}

template <class Floats, class Words>
inline Floats widen_float16(Words bits) {
    const Words magnitude = bits & 0x7fff;
    // The exponents' biases differ by 112. Multiplying, not adding, is exact for denormals as well.
    const Words finite = bits_as<Words>(bits_as<Floats>(magnitude << 13) * 0x1p112f);
    // The exponent of infinity and NaN, and no other, carries over.
    const Words infinite = ((magnitude + 0x400) >> 15) * 0x7f800000;
    return bits_as<Floats>(finite | infinite | (bits & 0x8000) << 16);
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

// Calls use(element of the dtype) to choose a template by the dtype.
template <class Use>
void with_element(Element element, Use use) {
    if (element == Element::bfloat16) {
        use(Bfloat16{});
    } else if (element == Element::float16) {
        use(Float16{});
    } else {
        use(0.0f);
    }
}

// A packed row: how many rows of the inputs it holds, the word it holds for a column, and sum + the product of two
// words.
#ifdef TIKMIX_FAST_ROW_PAIRS
constexpr int kRowsTogether = 2;

inline float to_word(const Bfloat16 (&values)[2]) {
    return bits_as<float>(static_cast<uint32_t>(values[0].bits) | static_cast<uint32_t>(values[1].bits) << 16);
}

template <class Use>
void with_input_element(Element, Use use) {
    use(Bfloat16{});
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

template <class Use>
void with_input_element(Element element, Use use) {
    with_element(element, use);
}

inline Vector multiply_add(float a, Vector b, Vector sum) { return sum + a * b; }
#endif

inline void store(float* target, Vector value) { memcpy(target, &value, sizeof value); }

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

void pack_rows(const Problem& problem, const Block& block, int64_t first, int64_t count) {
    for (int64_t k = first; k < first + count; k += kPackedRows) {
        const int64_t together = smaller(kPackedRows, first + count - k);
        const int64_t* sources = block.sources + k * kRowsTogether;
        with_input_element(problem.grad_output.element, [&](auto element) {
            pack_matrix<kMicroRows, decltype(element)>(problem.grad_output, problem.height, sources, together,
                                                       block.grad_output + k * kMicroRows,
                                                       block.grad_output_panel_stride);
        });
        with_input_element(problem.input.element, [&](auto element) {
            pack_matrix<kMicroColumns, decltype(element)>(problem.input, problem.width, sources, together,
                                                          block.input + k * kMicroColumns, block.input_panel_stride);
        });
    }
}

int64_t micro_tiles_down(const Tile& tile) { return (tile.rows + kMicroRows - 1) / kMicroRows; }
int64_t micro_tiles_across(const Tile& tile) { return (tile.columns + kMicroColumns - 1) / kMicroColumns; }

// Copies a tile of all queries to panels[micro-tile][task], padded with zeros.
template <class T>
void pack_queries(const Problem& problem, const Tile& tile, float* panels) {
    const int64_t down = micro_tiles_down(tile);
    const int64_t across = micro_tiles_across(tile);
    if (down * kMicroRows != tile.rows || across * kMicroColumns != tile.columns) {
        memset(panels, 0, sizeof(float) * down * across * problem.tasks * kMicroFloats);
    }
    for (int64_t i = 0; i < problem.tasks; ++i) {
        const T* source = static_cast<const T*>(problem.queries.data) + i * problem.query_stride +
                          tile.first_row * problem.queries.row_stride + tile.first_column;
        for (int64_t r = 0; r < tile.rows; ++r, source += problem.queries.row_stride) {
            float* target =
                panels + (r / kMicroRows * problem.tasks + i) * kMicroFloats + r % kMicroRows * kMicroColumns;
            int64_t c = 0;
            for (; c + kMicroColumns <= tile.columns; c += kMicroColumns) {
                for (int v = 0; v < kMicroVectors; ++v) {
                    store(target + v * kLanes, load_vector(source + c + v * kLanes));
                    __builtin_prefetch(source + kAhead * problem.queries.row_stride + c + v * kLanes);
                }
                target += down * problem.tasks * kMicroFloats;
            }
            for (int64_t k = c; k < tile.columns; ++k) target[k - c] = to_float(source[k]);
        }
    }
}

typedef Vector MicroTile[kMicroRows][kMicroVectors];

// Adds the micro-tile's products with each of kTasks queries: lanes are summed in float32, micro-tiles in float64.
template <int kTasks>
inline __attribute__((always_inline)) void take_products(const MicroTile& gradient, const float* queries,
                                                         double* products) {
    Vector narrow[kTasks] = {};
#pragma GCC unroll 12
    for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kMicroVectors; ++v) {
            const float* place = queries + r * kMicroColumns + v * kLanes;
#pragma GCC unroll 4
            for (int i = 0; i < kTasks; ++i) narrow[i] += gradient[r][v] * load_vector(place + i * kMicroFloats);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTasks; ++i) {
        WideVector wide;
        memcpy(&wide, products + i * kLanes, sizeof wide);
        wide += __builtin_convertvector(narrow[i], WideVector);
        memcpy(products + i * kLanes, &wide, sizeof wide);
    }
}

// What one micro-tile reads and writes besides the panels.
struct Places {
    float* gradient;       // sums of the earlier packed rows of the domain
    float* total;          // of all domains, or null
    const float* queries;  // [n] micro-tiles
    double* products;      // [n, lanes]
    int64_t tasks;
};

// Multiplies `depth` packed rows of two panels, a^T b, and adds that to the earlier ones of the domain. The last time,
// the sum goes into the total and the products while it is in registers.
void multiply(int64_t depth, const float* a, const float* b, bool first, bool last, const Places& places) {
    MicroTile sum = {};
    for (int64_t k = 0; k < depth; ++k, a += kMicroRows, b += kMicroColumns) {
        Vector column[kMicroVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kMicroVectors; ++v) {
            column[v] = load_vector(b + v * kLanes);
            __builtin_prefetch(b + kAhead * kMicroColumns + v * kLanes);
        }
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
            const int place = r * kMicroColumns + v * kLanes;
            if (!first) sum[r][v] += load_vector(places.gradient + place);
            if (!last) store(places.gradient + place, sum[r][v]);
            if (last && places.total) store(places.total + place, load_vector(places.total + place) + sum[r][v]);
        }
    }
    if (!last) return;
    int64_t i = 0;
    for (; i + kTasksAtOnce <= places.tasks; i += kTasksAtOnce) {
        take_products<kTasksAtOnce>(sum, places.queries + i * kMicroFloats, places.products + i * kLanes);
    }
    for (; i < places.tasks; ++i) {
        take_products<1>(sum, places.queries + i * kMicroFloats, places.products + i * kLanes);
    }
}

// Forms the tile of the gradient of the packed rows start ... end, and adds it to the total and the products.
void accumulate_domain(const Problem& problem, const Block& block, const Tile& tile, int64_t start, int64_t end,
                       const Scratch& scratch) {
    const float* grad_output = block.grad_output + tile.first_row / kMicroRows * block.grad_output_panel_stride;
    const float* input = block.input + tile.first_column / kMicroColumns * block.input_panel_stride;
    const int64_t down = micro_tiles_down(tile);
    for (int64_t k = start; k < end; k += kDepth) {
        const int64_t depth = smaller(kDepth, end - k);
        Places places = {scratch.gradient, problem.grad_weight ? scratch.total : nullptr, scratch.queries,
                         scratch.products, problem.tasks};
        const float* b = input + k * kMicroColumns;
        for (int64_t c = 0; c < tile.columns; c += kMicroColumns, b += block.input_panel_stride) {
            const float* a = grad_output + k * kMicroRows;
            for (int64_t r = 0; r < down; ++r, a += block.grad_output_panel_stride) {
                multiply(depth, a, b, k == start, k + depth == end, places);
                places.gradient += kMicroFloats;
                if (places.total) places.total += kMicroFloats;
                places.queries += problem.tasks * kMicroFloats;
            }
        }
    }
}

void add_to_grad_weight(const Problem& problem, const Tile& tile, const float* total) {
    const int64_t step = problem.grad_weight_column_stride;
    float* first = problem.grad_weight + tile.first_row * problem.grad_weight_row_stride + tile.first_column * step;
    for (int64_t c = 0; c < tile.columns; c += kMicroColumns) {
        const int64_t columns = smaller(kMicroColumns, tile.columns - c);
        for (int64_t r = 0; r < micro_tiles_down(tile) * kMicroRows; ++r, total += kMicroColumns) {
            if (r >= tile.rows) continue;
            float* row = first + r * problem.grad_weight_row_stride + c * step;
            for (int64_t l = 0; l < columns; ++l) row[l * step] += total[l];
        }
    }
}

void accumulate_tile(const Problem& problem, const Block& block, const Tile& tile, const Scratch& scratch,
                     double* sums) {
    if (problem.grad_weight) {
        memset(scratch.total, 0, sizeof(float) * micro_tiles_down(tile) * micro_tiles_across(tile) * kMicroFloats);
    }
    with_element(problem.queries.element,
                 [&](auto element) { pack_queries<decltype(element)>(problem, tile, scratch.queries); });
    for (int64_t j = 0; j < problem.domains; ++j) {
        if (block.bounds[j] == block.bounds[j + 1]) continue;
        memset(scratch.products, 0, sizeof(double) * problem.tasks * kLanes);
        accumulate_domain(problem, block, tile, block.bounds[j], block.bounds[j + 1], scratch);
        for (int64_t i = 0; i < problem.tasks; ++i) {
            for (int lane = 0; lane < kLanes; ++lane) {
                sums[i * problem.domains + j] += scratch.products[i * kLanes + lane];
            }
        }
    }
    if (problem.grad_weight) add_to_grad_weight(problem, tile, scratch.total);
}

}  // namespace
