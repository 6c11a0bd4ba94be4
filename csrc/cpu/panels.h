// Panels: some columns of many rows, in the order in which the micro-tiles read them.
#include "vectors.h"

namespace {

using tikmix_fast::Block;
using tikmix_fast::kSmallestTileColumns;
using tikmix_fast::kTileRows;
using tikmix_fast::Matrix;
using tikmix_fast::Problem;
using tikmix_fast::Queries;
using tikmix_fast::Tile;

constexpr int kMicroRows = TIKMIX_FAST_MICRO_ROWS;
constexpr int kMicroVectors = 2;
constexpr int kMicroColumns = kMicroVectors * kLanes;
constexpr int kMicroFloats = kMicroRows * kMicroColumns;
static_assert(kTileRows % kMicroRows == 0 && kSmallestTileColumns % kMicroColumns == 0, "a tile is whole micro-tiles");

// Packed rows filled at a time: reads run along rows, writes along panels, and this many lines of each stay in the L1
// cache.
constexpr int64_t kPackedRows = 8;

// Columns that are asked for in advance: more rows are read side by side than a processor follows on its own.
constexpr int64_t kAhead = 256;

// A packed row: how many rows of the inputs it holds, and the word it holds for one column or for a vector of them.
#ifdef TIKMIX_FAST_ROW_PAIRS
constexpr int kRowsTogether = 2;

inline float to_word(const Bfloat16 (&values)[2]) {
    return bits_as<float>(static_cast<uint32_t>(values[0].bits) | static_cast<uint32_t>(values[1].bits) << 16);
}

inline Vector load_words(const Bfloat16* const (&rows)[2]) {
    return bits_as<Vector>(load_bits(rows[0]) | load_bits(rows[1]) << 16);
}

template <class Use>
void with_input_element(Element, Use use) {
    use(Bfloat16{});
}
#else
constexpr int kRowsTogether = 1;

template <class T>
inline float to_word(const T (&values)[1]) {
    return to_float(values[0]);
}

template <class T>
inline Vector load_words(const T* const (&rows)[1]) {
    return load_vector(rows[0]);
}

template <class Use>
void with_input_element(Element element, Use use) {
    with_element(element, use);
}
#endif

// A row of a matrix, or zeros where its number is negative.
template <class T>
struct Row {
    const T* data;
    int64_t step;

    static Row of(const Matrix& matrix, int64_t number) {
        static const T zeros[kMicroColumns + kLanes] = {};
        if (number < 0) return {zeros, 0};
        return {static_cast<const T*>(matrix.data) + number * matrix.row_stride, matrix.column_stride};
    }
};

// Writes the first kPanel words of some vectors: all of the last one too if `beyond`, which is quicker.
template <int kPanel, int kVectors>
inline void store_words(const Vector (&words)[kVectors], bool beyond, float* panel) {
    constexpr int kBefore = (kVectors - 1) * kLanes;
    for (int v = 0; v < kVectors - 1; ++v) store(panel + v * kLanes, words[v]);
    if (beyond || kPanel % kLanes == 0) {
        store(panel + kBefore, words[kVectors - 1]);
    } else {
        memcpy(panel + kBefore, &words[kVectors - 1], (kPanel - kBefore) * sizeof(float));
    }
}

// The words of one packed row for the columns first ... first + kPanel, padded with zeros. What lies beyond them may be
// overwritten if `beyond`.
template <int kPanel, class T>
inline void pack_words(const Row<T>* rows, bool contiguous, bool beyond, int64_t first, int64_t columns, float* panel) {
    constexpr int kVectors = (kPanel + kLanes - 1) / kLanes;
    if (contiguous && first + kVectors * kLanes <= columns) {
        Vector words[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const T* places[kRowsTogether];
            for (int r = 0; r < kRowsTogether; ++r) places[r] = rows[r].data + first * rows[r].step + v * kLanes;
            words[v] = load_words(places);
        }
        store_words<kPanel>(words, beyond, panel);
        return;
    }
    for (int i = 0; i < kPanel; ++i) {
        T values[kRowsTogether] = {};
        for (int r = 0; r < kRowsTogether && first + i < columns; ++r) {
            values[r] = rows[r].data[(first + i) * rows[r].step];
        }
        panel[i] = to_word(values);
    }
}

// Fills up to kPackedRows packed rows of the panels that begin at the columns first ... last of a matrix with `columns`
// columns, and nothing else: other threads fill the rows before and after them.
template <int kPanel, class T>
void pack_rows(const Matrix& matrix, int64_t first, int64_t last, int64_t columns, const int64_t* sources,
               int64_t count, float* panel, int64_t panel_stride) {
    Row<T> rows[kPackedRows * kRowsTogether];
    const bool contiguous = matrix.column_stride == 1;
    for (int64_t k = 0; k < count * kRowsTogether; ++k) rows[k] = Row<T>::of(matrix, sources[k]);
    for (int64_t c = first; c < last; c += kPanel, panel += panel_stride) {
        for (int64_t k = 0; k < count; ++k) {
            for (int r = 0; r < kRowsTogether; ++r) __builtin_prefetch(rows[k * kRowsTogether + r].data + c + kAhead);
            pack_words<kPanel>(rows + k * kRowsTogether, contiguous, k + 1 < count, c, columns, panel + k * kPanel);
        }
    }
}

// Panels of kPanel columns from `first` on.
template <int kPanel>
void pack_slice(const Matrix& matrix, int64_t first, int64_t columns, int64_t width, const int64_t* sources,
                int64_t start, int64_t count, float* panels, int64_t panel_stride) {
    with_input_element(matrix.element, [&](auto element) {
        for (int64_t k = start; k < start + count; k += kPackedRows) {
            pack_rows<kPanel, decltype(element)>(matrix, first, first + columns, width, sources + k * kRowsTogether,
                                                 smaller(kPackedRows, start + count - k), panels + k * kPanel,
                                                 panel_stride);
        }
    });
}

void pack_grad_output(const Problem& problem, const Block& block, int64_t first, int64_t count) {
    pack_slice<kMicroRows>(problem.grad_output, block.part.first_row, block.part.rows, problem.height, block.sources,
                           first, count, block.grad_output, block.grad_output_panel_stride);
}

void pack_input(const Problem& problem, const Block& block, int64_t first, int64_t count) {
    pack_slice<kMicroColumns>(problem.input, block.part.first_column, block.part.columns, problem.width, block.sources,
                              first, count, block.input, block.input_panel_stride);
}

// Calls use(element of the panels, element of the plain queries): in pairs, bfloat16 stays what it is.
template <class Use>
void with_query_elements(Element element, Use use) {
#ifdef TIKMIX_FAST_ROW_PAIRS
    if (element == Element::bfloat16) return use(Bfloat16{}, Bfloat16{});
#endif
    with_element(element, [&](auto plain) { use(0.0f, plain); });
}

// Calls use(element of the panels): both kinds of panels are read by every kernel.
template <class Use>
void with_query_panel(Element element, Use use) {
    if (element == Element::bfloat16) {
        use(Bfloat16{});
    } else {
        use(0.0f);
    }
}

Element packed_element(Element element) {
    Element packed = Element::float32;
    with_query_elements(element, [&](auto panel, auto) { packed = sizeof panel == 2 ? Element::bfloat16 : packed; });
    return packed;
}

inline void copy_vector(const Bfloat16* source, Bfloat16* target) { memcpy(target, source, kLanes * sizeof *source); }
inline void copy_number(const Bfloat16* source, Bfloat16* target) { *target = *source; }

template <class T>
inline void copy_vector(const T* source, float* target) {
    store(target, load_vector(source));
}

template <class T>
inline void copy_number(const T* source, float* target) {
    *target = to_float(*source);
}

// Copies a column of micro-tiles of all queries to panels[row micro-tile][task][micro-tile], padded with zeros.
template <class Panel, class T>
void pack_query_column(const Queries& queries, const Tile& tile, Panel* panels) {
    const int64_t micro_tiles = divide_up(tile.rows, kMicroRows);
    if (queries.tasks > 0 && (micro_tiles * kMicroRows != tile.rows || tile.columns != kMicroColumns)) {
        memset(panels, 0, sizeof(Panel) * micro_tiles * queries.tasks * kMicroFloats);
    }
    for (int64_t i = 0; i < queries.tasks; ++i) {
        const T* source = static_cast<const T*>(queries.data) + i * queries.stride +
                          tile.first_row * queries.row_stride + tile.first_column;
        for (int64_t r = 0; r < tile.rows; ++r, source += queries.row_stride) {
            Panel* target =
                panels + (r / kMicroRows * queries.tasks + i) * kMicroFloats + r % kMicroRows * kMicroColumns;
            if (tile.columns == kMicroColumns) {
                for (int v = 0; v < kMicroColumns; v += kLanes) copy_vector(source + v, target + v);
            } else {
                for (int64_t c = 0; c < tile.columns; ++c) copy_number(source + c, target + c);
            }
        }
    }
}

void pack_queries(const Queries& queries, int64_t height, const Tile& tile, void* panels) {
    const int64_t micro_tiles = divide_up(height, kMicroRows);
    with_query_elements(queries.element, [&](auto panel, auto plain) {
        typedef decltype(panel) Panel;
        for (int64_t c = 0; c < tile.columns; c += kMicroColumns) {
            const int64_t place = (tile.first_column + c) / kMicroColumns * micro_tiles + tile.first_row / kMicroRows;
            const Tile column = {tile.first_row, tile.rows, tile.first_column + c,
                                 smaller(kMicroColumns, tile.columns - c)};
            pack_query_column<Panel, decltype(plain)>(
                queries, column, static_cast<Panel*>(panels) + place * queries.tasks * kMicroFloats);
        }
    });
}

}  // namespace
