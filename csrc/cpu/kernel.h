// The tile kernel, compiled once per instruction set: the including file defines TIKMIX_FAST_VECTOR_BYTES and
// TIKMIX_FAST_MICRO_ROWS first, and TIKMIX_FAST_ROW_PAIRS where it multiplies two bfloat16 rows at a time.
//
// Everything is in an anonymous namespace and nothing of the standard library is called but memcpy and memset: the
// linker merges equal inline functions of two files, and would let a machine without AVX-512 run the AVX-512 copy.
#include "panels.h"

namespace {

using tikmix_fast::kCacheLine;
using tikmix_fast::kTasksAtOnce;
using tikmix_fast::Scratch;
using tikmix_fast::Segment;
using tikmix_fast::sum_stride;

// Packed rows summed in one go: starting again at zero bounds the rounding error of a long domain. That of bfloat16
// inputs is larger anyway.
#ifdef TIKMIX_FAST_ROW_PAIRS
constexpr int64_t kLongestSum = 1024;
#else
constexpr int64_t kLongestSum = 128;
#endif

typedef Vector MicroTile[kMicroRows][kMicroVectors];

// Adds the four products' sums of lanes to `sums`.
inline void add_products(const Quad (&products)[kTasksAtOnce], double* sums) {
    WideQuad wide;
    memcpy(&wide, sums, sizeof wide);
    wide += __builtin_convertvector(sums_of(products), WideQuad);
    memcpy(sums, &wide, sizeof wide);
}

// A micro-tile of a gradient as it is multiplied with queries.
template <class Panel>
struct ExactFactor {
    const MicroTile& gradient;

    // Adds the products with kTasks queries: lanes are summed in float32, micro-tiles in float64.
    template <int kTasks>
    void add(const Panel* queries, double* sums) const {
        Vector products[kTasks] = {};
#pragma GCC unroll 12
        for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kMicroVectors; ++v) {
                const Panel* place = queries + r * kMicroColumns + v * kLanes;
#pragma GCC unroll 4
                for (int i = 0; i < kTasks; ++i) products[i] += gradient[r][v] * load_vector(place + i * kMicroFloats);
            }
        }
        Quad quads[kTasksAtOnce] = {};
#pragma GCC unroll 4
        for (int i = 0; i < kTasks; ++i) quads[i] = fold(products[i]);
        add_products(quads, sums);
    }
};

// sum + the product of two words of a packed row.
#ifdef TIKMIX_FAST_ROW_PAIRS
inline Vector multiply_add(float a, Vector b, Vector sum) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}

// Rounded to bfloat16, as torch would round the gradient.
struct RoundedFactor {
    __m512bh gradient[kMicroRows];

    explicit RoundedFactor(const MicroTile& exact) {
#pragma GCC unroll 12
        for (int r = 0; r < kMicroRows; ++r) {
            gradient[r] = _mm512_cvtne2ps_pbh((__m512)exact[r][1], (__m512)exact[r][0]);
        }
    }

    template <int kTasks>
    void add(const Bfloat16* queries, double* sums) const {
        __m512 products[kTasks] = {};
#pragma GCC unroll 12
        for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 4
            for (int i = 0; i < kTasks; ++i) {
                const __m512i query = _mm512_loadu_si512(queries + i * kMicroFloats + r * kMicroColumns);
                products[i] = _mm512_dpbf16_ps(products[i], gradient[r], (__m512bh)query);
            }
        }
        Quad quads[kTasksAtOnce] = {};
#pragma GCC unroll 4
        for (int i = 0; i < kTasks; ++i) quads[i] = fold((Vector)products[i]);
        add_products(quads, sums);
    }
};
#else
inline Vector multiply_add(float a, Vector b, Vector sum) { return sum + a * b; }
#endif

// Adds the products with all queries to sums [n]. An odd number of tasks is cut evenly: 9 into 3, 3 and 3.
template <class Factor, class Panel>
inline void add_all_products(const Factor& factor, const Panel* queries, int64_t tasks, double* sums) {
    for (int64_t groups = divide_up(tasks, kTasksAtOnce); groups > 0; --groups) {
        const int64_t together = divide_up(tasks, groups);
        if (together == 4) {
            factor.template add<4>(queries, sums);
        } else if (together == 3) {
            factor.template add<3>(queries, sums);
        } else if (together == 2) {
            factor.template add<2>(queries, sums);
        } else {
            factor.template add<1>(queries, sums);
        }
        queries += together * kMicroFloats;
        sums += together;
        tasks -= together;
    }
}

template <class Panel>
inline void take_products(const MicroTile& gradient, const Segment&, const Panel* queries, int64_t tasks,
                          double* sums) {
    add_all_products(ExactFactor<Panel>{gradient}, queries, tasks, sums);
}

#ifdef TIKMIX_FAST_ROW_PAIRS
// Parts of a long domain may cancel, so that each may be much larger than what rounding the whole would be measured by.
inline void take_products(const MicroTile& gradient, const Segment& segment, const Bfloat16* queries, int64_t tasks,
                          double* sums) {
    if (segment.whole) {
        add_all_products(RoundedFactor(gradient), queries, tasks, sums);
    } else {
        add_all_products(ExactFactor<Bfloat16>{gradient}, queries, tasks, sums);
    }
}
#endif

// Memory that is asked for while the processor multiplies, a cache line per packed row.
struct Ahead {
    const char* place;
    const char* end;

    inline void ask() {
        __builtin_prefetch(place);
        place = place + kCacheLine < end ? place + kCacheLine : place;
    }
};

// Adds to a micro-tile in memory, or fills it.
inline void put(const MicroTile& tile, bool add, float* target) {
#pragma GCC unroll 12
    for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kMicroVectors; ++v) {
            float* place = target + r * kMicroColumns + v * kLanes;
            store(place, add ? load_vector(place) + tile[r][v] : tile[r][v]);
        }
    }
}

// Forms a micro-tile of every segment's gradient, a^T b, and takes its products while it is in registers.
template <class Panel>
void accumulate_micro_tile(const Block& block, const float* a, const float* b, const Panel* queries, int64_t tasks,
                           const Scratch& scratch, bool with_total, double* sums, Ahead ahead) {
    for (int64_t s = 0; s < block.segment_count; ++s) {
        const Segment segment = block.segments[s];
        for (int64_t k = segment.start; k < segment.end;) {
            const int64_t end = smaller(segment.end, k + kLongestSum);
            MicroTile gradient = {};
            const bool first = k == segment.start;
            for (; k < end; ++k, a += kMicroRows, b += kMicroColumns) {
                ahead.ask();
                Vector column[kMicroVectors];
#pragma GCC unroll 2
                for (int v = 0; v < kMicroVectors; ++v) column[v] = load_vector(b + v * kLanes);
#pragma GCC unroll 12
                for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
                    for (int v = 0; v < kMicroVectors; ++v) {
                        gradient[r][v] = multiply_add(a[r], column[v], gradient[r][v]);
                    }
                }
            }
            if (end < segment.end) {
                put(gradient, !first, scratch.partial);
                continue;
            }
            if (!first) {
#pragma GCC unroll 12
                for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
                    for (int v = 0; v < kMicroVectors; ++v) {
                        gradient[r][v] += load_vector(scratch.partial + r * kMicroColumns + v * kLanes);
                    }
                }
            }
            if (with_total) put(gradient, s > 0, scratch.total);
            take_products(gradient, segment, queries, tasks, sums + segment.domain * sum_stride(tasks));
        }
    }
}

float* grad_weight_at(const Problem& problem, int64_t row, int64_t column) {
    return problem.grad_weight + row * problem.grad_weight_row_stride + column * problem.grad_weight_column_stride;
}

void ask_for_grad_weight(const Problem& problem, const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        for (int64_t c = 0; c < tile.columns; c += kCacheLine / sizeof(float)) {
            __builtin_prefetch(grad_weight_at(problem, tile.first_row + r, tile.first_column + c), 1);
        }
    }
}

void add_to_grad_weight(const Problem& problem, const Tile& tile, const float* total) {
    const int64_t step = problem.grad_weight_column_stride;
    float* first = grad_weight_at(problem, tile.first_row, tile.first_column);
    if (step == 1 && tile.rows == kMicroRows && tile.columns == kMicroColumns) {
        // All loads, then all stores: rows that are a power of two apart look to the processor like the same memory.
        MicroTile sum;
#pragma GCC unroll 12
        for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kMicroVectors; ++v) {
                sum[r][v] = load_vector(first + r * problem.grad_weight_row_stride + v * kLanes) +
                            load_vector(total + r * kMicroColumns + v * kLanes);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kMicroVectors; ++v) {
                store(first + r * problem.grad_weight_row_stride + v * kLanes, sum[r][v]);
            }
        }
        return;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
        float* row = first + r * problem.grad_weight_row_stride;
        for (int64_t c = 0; c < tile.columns; ++c) row[c * step] += total[r * kMicroColumns + c];
    }
}

// One column of micro-tiles of a tile.
template <class Panel>
void accumulate_column(const Problem& problem, const Block& block, const Tile& column, const Scratch& scratch,
                       const Panel* queries, double* sums) {
    const float* a =
        block.grad_output + (column.first_row - block.part.first_row) / kMicroRows * block.grad_output_panel_stride;
    const float* b =
        block.input + (column.first_column - block.part.first_column) / kMicroColumns * block.input_panel_stride;
    const int64_t tasks = problem.queries.tasks;
    for (int64_t r = 0; r < column.rows; r += kMicroRows, a += block.grad_output_panel_stride) {
        const Tile micro_tile = {column.first_row + r, smaller(kMicroRows, column.rows - r), column.first_column,
                                 column.columns};
        if (problem.grad_weight) ask_for_grad_weight(problem, micro_tile);
        const Panel* next = queries + tasks * kMicroFloats;
        const Ahead ahead = {reinterpret_cast<const char*>(next),
                             reinterpret_cast<const char*>(next + tasks * kMicroFloats)};
        accumulate_micro_tile(block, a, b, queries, tasks, scratch, problem.grad_weight, sums, ahead);
        if (problem.grad_weight) add_to_grad_weight(problem, micro_tile, scratch.total);
        queries = next;
    }
}

void accumulate_tile(const Problem& problem, const Block& block, const Tile& tile, const Scratch& scratch,
                     double* sums) {
    const Queries& queries = problem.queries;
    const int64_t micro_tiles = divide_up(problem.height, kMicroRows);
    for (int64_t c = tile.first_column; c < tile.first_column + tile.columns; c += kMicroColumns) {
        const Tile column = {tile.first_row, tile.rows, c,
                             smaller(kMicroColumns, tile.first_column + tile.columns - c)};
        if (queries.packed) {
            const int64_t place = (c / kMicroColumns * micro_tiles + tile.first_row / kMicroRows) * queries.tasks;
            with_query_panel(queries.element, [&](auto panel) {
                typedef decltype(panel) Panel;
                accumulate_column(problem, block, column, scratch,
                                  static_cast<const Panel*>(queries.data) + place * kMicroFloats, sums);
            });
        } else {
            with_query_elements(queries.element, [&](auto panel, auto plain) {
                typedef decltype(panel) Panel;
                Panel* panels = reinterpret_cast<Panel*>(scratch.queries);
                pack_query_column<Panel, decltype(plain)>(queries, column, panels);
                accumulate_column<Panel>(problem, block, column, scratch, panels, sums);
            });
        }
    }
}

}  // namespace
