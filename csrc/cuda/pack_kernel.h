// Packs queries, 16 bytes of one lane at a time.
#pragma once

#include "fragments.h"
#include "pack.h"
#include "problem.h"
#include "ptx.h"

namespace tikmix_fast::gpu {

constexpr int kPackThreads = 256;

TIKMIX_FAST_DEVICE float read_number(const void* numbers, Element element, int64_t position) {
    if (element == Element::float32) return static_cast<const float*>(numbers)[position];
    const uint16_t bits = static_cast<const uint16_t*>(numbers)[position];
    return element == Element::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

template <int kPerLoad>
struct alignas(16) PackedLoad;
template <>
struct alignas(16) PackedLoad<4> {
    float number[4];
    TIKMIX_FAST_DEVICE void set(int i, float value) { number[i] = value; }
};
template <>
struct alignas(16) PackedLoad<8> {
    uint16_t number[8];
    TIKMIX_FAST_DEVICE void set(int i, float value) { number[i] = bfloat16_bits(value); }
};

// kPerLoad is 8 for bfloat16, 4 for float32.
template <int kPerLoad>
TIKMIX_FAST_DEVICE void pack_queries(const PackProblem& problem, const TileShape& shape) {
    const int64_t tile_columns = divide_up(problem.width, shape.columns);
    const int64_t loads =
        divide_up(problem.height, shape.rows) * tile_columns * problem.tasks * (shape.elements() / kPerLoad);
    for (int64_t load = block_index() * kPackThreads + thread_index(); load < loads;
         load += block_count() * kPackThreads) {
        PackedLoad<kPerLoad> packed;
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kPerLoad; ++i) {
            const QueryPlace at = packed_element(shape, kPerLoad, problem.tasks, tile_columns, load * kPerLoad + i);
            const bool is_inside = at.row < problem.height && at.column < problem.width;
            packed.set(i, is_inside ? read_number(problem.queries, problem.element,
                                                  at.task * problem.task_stride + at.row * problem.row_stride +
                                                      at.column * problem.column_stride)
                                    : 0.0f);
        }
        static_cast<PackedLoad<kPerLoad>*>(problem.packed)[load] = packed;
    }
}

}  // namespace tikmix_fast::gpu
