// The CountSketch of a few rows, compiled once per instruction set: the including file defines
// TIKMIX_FAST_VECTOR_BYTES and TIKMIX_FAST_SKETCH_ROWS first.
//
// Everything is in an anonymous namespace and nothing of the standard library is called but memcpy and memset, for the
// reason given in kernel.h.
#include "sketch.h"
#include "vectors.h"

namespace {

using tikmix_fast::kLargestSketch;
using tikmix_fast::Matrix;
using tikmix_fast::SketchProblem;
using tikmix_fast::SketchTables;

// Rows that share the loads of signs and masks, and vectors of sums of each that stay in registers.
constexpr int kRows = TIKMIX_FAST_SKETCH_ROWS;
constexpr int kVectors = 4;

template <class V>
inline V load(const void* source) {
    V result;
    memcpy(&result, source, sizeof result);
    return result;
}

// Permute moves word l ^ mask to word l, and PermutePairs the same with the halves of the words.
#if defined(__AVX512BW__)
struct Permute {
    __m512i from;
    explicit Permute(int32_t mask)
        : from(_mm512_xor_si512(_mm512_set1_epi32(mask),
                                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))) {}
    Bits operator()(Bits words) const { return (Bits)_mm512_permutexvar_epi32(from, (__m512i)words); }
};

struct PermutePairs {
    __m512i from;
    explicit PermutePairs(int32_t mask)
        : from(_mm512_xor_si512(_mm512_set1_epi16(static_cast<int16_t>(mask)),
                                _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                                                 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))) {}
    Bits operator()(Bits words) const { return (Bits)_mm512_permutexvar_epi16(from, (__m512i)words); }
};
#else
#if defined(__AVX2__)
struct Permute {
    __m256i from;
    explicit Permute(int32_t mask)
        : from(_mm256_xor_si256(_mm256_set1_epi32(mask), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0))) {}
    Bits operator()(Bits words) const { return (Bits)_mm256_permutevar8x32_epi32((__m256i)words, from); }
};
#else
static_assert(kLanes == 4, "two swaps");
struct Permute {
    int32_t mask;
    explicit Permute(int32_t mask) : mask(mask) {}
    Bits operator()(Bits words) const {
        if (mask & 1) words = Bits{words[1], words[0], words[3], words[2]};
        if (mask & 2) words = Bits{words[2], words[3], words[0], words[1]};
        return words;
    }
};
#endif

struct PermutePairs {
    bool swap;
    Permute permute;
    explicit PermutePairs(int32_t mask) : swap(mask & 1), permute(mask >> 1) {}
    Bits operator()(Bits words) const {
        words = permute(words);
        return swap ? words << 16 | words >> 16 : words;
    }
};
#endif

// Columns as float32. A vector of them is one vector of sums.
struct Floats {
    using Stored = float;
    using Permutation = Permute;
    static constexpr int kSums = 1;
    static constexpr int kColumns = kLanes;

    static const uint32_t* signs(const SketchTables& tables, int64_t column) { return tables.signs + column; }
    static void add(Bits words, Vector* sums) { sums[0] += bits_as<Vector>(words); }
    static int place_of(int column) { return column; }
};

// Columns as pairs of bfloat16. A vector of pairs has two vectors of sums: of the even columns, and of the odd ones.
struct Pairs {
    using Stored = uint16_t;
    using Permutation = PermutePairs;
    static constexpr int kSums = 2;
    static constexpr int kColumns = 2 * kLanes;

    static const uint32_t* signs(const SketchTables& tables, int64_t column) { return tables.paired + column / 2; }
    static void add(Bits words, Vector* sums) {
        sums[0] += bits_as<Vector>(words << 16);
        sums[1] += bits_as<Vector>(words & 0xffff0000);
    }
    static int place_of(int column) { return column % 2 * kLanes + column / 2; }
};

// Some whole blocks of kRows rows; rows[r] points at the first column of first_block.
template <class Stored>
struct Strip {
    const Stored* rows[kRows];
    int64_t first_block;
    int64_t blocks;
    int64_t ahead;  // numbers from a row to the one that is read next: hardware does not see rows as one stream
};

// Adds the strip to sums [kRows, dim], which hold vectors as Format orders them. kTogether vectors of columns share
// what is loaded for a block.
template <class Format, int kTogether>
void add_strip(const Strip<typename Format::Stored>& strip, const SketchTables& tables, int64_t dim, float* sums) {
    constexpr int kGroup = kTogether * Format::kColumns;
    for (int64_t group = 0; group < dim; group += kGroup) {
        Vector total[kRows][kTogether * Format::kSums];
        for (int r = 0; r < kRows; ++r) memcpy(total[r], sums + r * dim + group, sizeof total[r]);
        for (int64_t b = 0; b < strip.blocks; ++b) {
            const int32_t mask = tables.masks[strip.first_block + b];
            const int64_t from = b * dim + (group ^ (mask & -kGroup));
            const uint32_t* signs = Format::signs(tables, strip.first_block * dim + from);
            const int away = mask & (kGroup - 1) & -Format::kColumns;
            const typename Format::Permutation permute(mask & (Format::kColumns - 1));
#pragma GCC unroll 4
            for (int v = 0; v < kTogether; ++v) {
                const int column = v * Format::kColumns ^ away;
                const Bits sign = load<Bits>(signs + column / Format::kSums);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    const typename Format::Stored* place = strip.rows[r] + from + column;
                    __builtin_prefetch(place + strip.ahead);
                    const Bits words = load<Bits>(place);
                    Format::add(permute(words ^ sign), total[r] + v * Format::kSums);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) memcpy(sums + r * dim + group, total[r], sizeof total[r]);
    }
}

template <class Format>
void add_strip(const Strip<typename Format::Stored>& strip, const SketchTables& tables, int64_t dim, float* sums) {
    constexpr int kMost = kVectors / Format::kSums;
    if (dim >= kMost * Format::kColumns) {
        add_strip<Format, kMost>(strip, tables, dim, sums);
    } else if (dim >= kMost / 2 * Format::kColumns) {
        add_strip<Format, kMost / 2>(strip, tables, dim, sums);
    } else {
        add_strip<Format, 1>(strip, tables, dim, sums);
    }
}

inline void convert(uint16_t value, uint16_t* target) { *target = value; }

template <class Source>
inline void convert(Source value, float* target) {
    *target = to_float(value);
}

template <class Stored, class Source>
void copy_columns(const Source* source, int64_t step, int64_t count, Stored* target) {
    if (step == 1) {
        for (int64_t c = 0; c < count; ++c) convert(source[c], target + c);
    } else {
        for (int64_t c = 0; c < count; ++c) convert(source[c * step], target + c);
    }
}

// Whole blocks are read where they lie if they lie there as Format stores them; the rest is copied, and padded.
template <class Format, class Source>
void sketch(const SketchProblem& problem, const SketchTables& tables, int64_t first, int64_t count) {
    using Stored = typename Format::Stored;
    constexpr bool kSame = sizeof(Source) == sizeof(Stored);
    const Matrix& input = problem.input;
    const int64_t dim = problem.dim;
    float sums[kRows * kLargestSketch];
    Stored copies[kRows][kLargestSketch];
    for (int64_t done = 0; done < count; done += kRows) {
        // Where fewer rows are left, the last one is sketched again, and not written.
        const int64_t together = smaller(kRows, count - done);
        const Source* rows[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
            rows[r] =
                static_cast<const Source*>(input.data) + (first + done + smaller(r, together - 1)) * input.row_stride;
        }
        memset(sums, 0, sizeof(float) * kRows * dim);
        Strip<Stored> strip{};
        int64_t column = 0;
        if (kSame && input.column_stride == 1) {
            for (int r = 0; r < kRows; ++r) strip.rows[r] = reinterpret_cast<const Stored*>(rows[r]);
            strip.blocks = problem.columns / dim;
            strip.ahead = kRows * input.row_stride;
            add_strip<Format>(strip, tables, dim, sums);
            column = strip.blocks * dim;
        }
        strip.ahead = 0;
        while (column < problem.columns) {
            const int64_t columns = smaller(kLargestSketch, problem.columns - column);
            strip.first_block = column / dim;
            strip.blocks = divide_up(columns, dim);
            for (int r = 0; r < kRows; ++r) {
                copy_columns(rows[r] + column * input.column_stride, input.column_stride, columns, copies[r]);
                memset(copies[r] + columns, 0, sizeof(Stored) * (strip.blocks * dim - columns));
                strip.rows[r] = copies[r];
            }
            add_strip<Format>(strip, tables, dim, sums);
            column += columns;
        }
        for (int64_t r = 0; r < together; ++r) {
            float* target = problem.output + (first + done + r) * dim;
            for (int64_t group = 0; group < dim; group += Format::kColumns) {
                float ordered[Format::kColumns];
                float stored[Format::kColumns];
                memcpy(stored, sums + r * dim + group, sizeof stored);
                for (int c = 0; c < Format::kColumns; ++c) ordered[c] = stored[Format::place_of(c)];
                memcpy(target + group, ordered, sizeof ordered);
            }
        }
    }
}

void sketch(const SketchProblem& problem, const SketchTables& tables, int64_t first, int64_t count) {
    const Element element = problem.input.element;
    if (element == Element::bfloat16 && problem.dim >= Pairs::kColumns) {
        sketch<Pairs, uint16_t>(problem, tables, first, count);
    } else if (element == Element::bfloat16) {
        sketch<Floats, Bfloat16>(problem, tables, first, count);
    } else if (element == Element::float16) {
        sketch<Floats, Float16>(problem, tables, first, count);
    } else {
        sketch<Floats, float>(problem, tables, first, count);
    }
}

}  // namespace
