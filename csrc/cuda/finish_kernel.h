// Ordered sums of what the items of an ExactProblem found: the same bits in every run.
#pragma once

#include "epilogue.h"
#include "fragments.h"
#include "problem.h"
#include "ptx.h"
#include "schedule.h"
#include "segments.h"

namespace tikmix_fast::gpu {

constexpr int kFinishThreads = 256;
constexpr int kFinishWarps = kFinishThreads / kLanes;
constexpr int64_t kFinishBytes = kFinishWarps * 4;  // shared memory of finish_values
constexpr int32_t kWrongOffsets = 1, kWrongOrder = 2;

TIKMIX_FAST_DEVICE double not_a_number() { return as_float(0x7fc00000u); }
TIKMIX_FAST_DEVICE int64_t first_of_grid() { return block_index() * kFinishThreads + thread_index(); }
TIKMIX_FAST_DEVICE int64_t threads_of_grid() { return block_count() * kFinishThreads; }

// The same answer for all threads of the block.
TIKMIX_FAST_DEVICE bool offsets_are_wrong(const Domains& domains, int64_t rows, unsigned char* shared) {
    bool is_wrong = domains.offsets[0] != 0 || domains.offsets[domains.count] != rows;
    for (int64_t domain = thread_index(); domain < domains.count; domain += kFinishThreads) {
        is_wrong = is_wrong || domains.offsets[domain] > domains.offsets[domain + 1];
    }
    int32_t* const wrong_warps = reinterpret_cast<int32_t*>(shared);
    is_wrong = any_lane(is_wrong);
    if (thread_index() % kLanes == 0) wrong_warps[thread_index() / kLanes] = is_wrong;
    sync_block();
    for (int warp = 0; warp < kFinishWarps; ++warp) is_wrong = is_wrong || wrong_warps[warp];
    return is_wrong;
}

// What this lane adds to the sum of a task's partials of one domain.
TIKMIX_FAST_DEVICE double sum_of_lane(const ExactProblem& problem, int64_t tiles, int64_t pair) {
    constexpr int kTogether = 4;  // loads that overlap
    const int lane = thread_index() % kLanes;
    const int64_t domain = pair % problem.domains.count;
    double sums[kTogether] = {};
    for (int64_t split = 0; split < problem.splits; ++split) {
        const RowRange range = rows_of_split(problem.rows, problem.splits, split, kRowBlock);
        const int64_t begin = clamp(problem.domains.offsets[domain], range.begin, range.end);
        const int64_t end = clamp(problem.domains.offsets[domain + 1], range.begin, range.end);
        if (begin >= end) continue;  // as next_segment, so that nothing was written
        const float* const partials = problem.partials + (pair * problem.splits + split) * tiles;
        for (int64_t first = lane; first < tiles; first += kTogether * kLanes) {
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kTogether; ++i) {
                const int64_t tile = first + i * kLanes;
                if (tile < tiles) sums[i] += partials[tile];
            }
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One warp for each (task, domain) at a time.
TIKMIX_FAST_DEVICE void finish_values(const ExactProblem& problem, const TileShape& shape, unsigned char* shared) {
    const bool is_wrong = offsets_are_wrong(problem.domains, problem.rows, shared);
    if (is_wrong && first_of_grid() == 0) atomic_or(problem.flag, kWrongOffsets);
    const int64_t tiles = divide_up(problem.height, shape.rows) * divide_up(problem.width, shape.columns);
    const int64_t pairs = problem.tasks * problem.domains.count;
    for (int64_t pair = first_of_grid() / kLanes; pair < pairs; pair += threads_of_grid() / kLanes) {
        double sum = is_wrong ? not_a_number() : sum_of_lane(problem, tiles, pair);
        TIKMIX_FAST_UNROLL
        for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (thread_index() % kLanes == 0) problem.values[pair] = sum;
    }
}

// Whether this warp met a wrong entry of the order; the flag is set then.
TIKMIX_FAST_DEVICE bool meets_wrong_order(const Domains& domains, int64_t rows, int32_t* flag) {
    bool is_wrong = false;
    for (int64_t row = first_of_grid(); row < rows; row += threads_of_grid()) {
        is_wrong = is_wrong || domains.order[row] < 0 || domains.order[row] >= rows;
    }
    is_wrong = any_lane(is_wrong);
    if (is_wrong && thread_index() % kLanes == 0) atomic_or(flag, kWrongOrder);
    return is_wrong;
}

// After finish_values: every warp that meets a wrong entry overwrites all values.
TIKMIX_FAST_DEVICE void check_order(const ExactProblem& problem) {
    if (!meets_wrong_order(problem.domains, problem.rows, problem.flag)) return;
    const int lane = thread_index() % kLanes;
    const int64_t pairs = problem.tasks * problem.domains.count;
    for (int64_t pair = lane; pair < pairs; pair += kLanes) problem.values[pair] = not_a_number();
}

// Adds the split totals to the total, four registers of a lane at a time.
TIKMIX_FAST_DEVICE void finish_total(const ExactProblem& problem, const TileShape& shape) {
    const int64_t tile_columns = divide_up(problem.width, shape.columns);
    const int64_t tiles = divide_up(problem.height, shape.rows) * tile_columns;
    const int blocks = shape.registers() / 4;
    for (int64_t four = first_of_grid(); four < tiles * shape.elements() / 4; four += threads_of_grid()) {
        const int lane = static_cast<int>(four % kLanes);
        const int block = static_cast<int>(four / kLanes % blocks);
        const int warp = static_cast<int>(four / kLanes / blocks % shape.warps());
        const int64_t tile = four / kLanes / blocks / shape.warps();
        Floats4 sum = {};
        for (int64_t split = 0; split < problem.splits; ++split) {
            const Floats4 part = *reinterpret_cast<const Floats4*>(
                problem.split_totals + split_total_position(shape, tiles, split, tile, warp, block, lane));
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < 4; ++i) sum.value[i] += part.value[i];
        }
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < 4; ++i) {
            const Place place = shape.place(warp, lane, block * 4 + i);
            const int64_t row = tile / tile_columns * shape.rows + place.row;
            const int64_t column = tile % tile_columns * shape.columns + place.column;
            if (row >= problem.height || column >= problem.width) continue;
            const int64_t position = row * problem.grad_weight_stride + column;
            if (problem.grad_weight_element == Element::float32) {
                static_cast<float*>(problem.grad_weight)[position] += sum.value[i];
            } else {
                uint16_t* const number = static_cast<uint16_t*>(problem.grad_weight) + position;
                *number = bfloat16_bits(from_bfloat16(*number) + sum.value[i]);
            }
        }
    }
}

}  // namespace tikmix_fast::gpu
