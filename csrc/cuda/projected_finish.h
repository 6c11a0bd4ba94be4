// Ordered sums of what the splits of a ProjectedProblem found: the same bits in every run.
#pragma once

#include "finish_kernel.h"
#include "problem.h"
#include "ptx.h"
#include "schedule.h"
#include "segments.h"

namespace tikmix_fast::gpu {

// The splits from `first` on, up to before `end`, have rows of a domain.
struct SplitRange {
    int64_t first, end;
};

// A split may have no row only if it is the only one.
TIKMIX_FAST_ANYWHERE int64_t split_of_row(int64_t rows, int64_t splits, int64_t row) {
    int64_t split = row / kRowBlock * splits / divide_up(rows, kRowBlock);  // or one before it
    while (split + 1 < splits && rows_of_split(rows, splits, split, kRowBlock).end <= row) ++split;
    return split;
}

TIKMIX_FAST_ANYWHERE SplitRange splits_of_domain(const ProjectedProblem& problem, int64_t domain) {
    const int64_t begin = clamp(problem.domains.offsets[domain], 0, problem.rows);
    const int64_t end = clamp(problem.domains.offsets[domain + 1], 0, problem.rows);
    if (begin >= end) return {0, 0};
    return {split_of_row(problem.rows, problem.splits, begin), split_of_row(problem.rows, problem.splits, end - 1) + 1};
}

// One warp for each (task, domain) at a time.
TIKMIX_FAST_DEVICE void finish_projected(const ProjectedProblem& problem, unsigned char* shared) {
    const bool is_wrong = offsets_are_wrong(problem.domains, problem.rows, shared);
    if (is_wrong && first_of_grid() == 0) atomic_or(problem.flag, kWrongOffsets);
    const int lane = thread_index() % kLanes;
    const int64_t pairs = problem.tasks * problem.domains.count;
    for (int64_t pair = first_of_grid() / kLanes; pair < pairs; pair += threads_of_grid() / kLanes) {
        double sum = is_wrong ? not_a_number() : 0.0;
        if (!is_wrong) {
            const SplitRange splits = splits_of_domain(problem, pair % problem.domains.count);
            for (int64_t split = splits.first + lane; split < splits.end; split += kLanes) {
                sum += problem.partials[pair * problem.splits + split];
            }
        }
        TIKMIX_FAST_UNROLL
        for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == 0) problem.values[pair] = sum;
    }
}

// gradients = scale times the sums of the slots. What is wrong with the offsets is finish_projected's to tell.
TIKMIX_FAST_DEVICE void add_slots(const ProjectedProblem& problem, unsigned char* shared) {
    const bool is_wrong = offsets_are_wrong(problem.domains, problem.rows, shared);
    const int64_t size = problem.k_out * problem.k_in;
    for (int64_t index = first_of_grid(); index < problem.domains.count * size; index += threads_of_grid()) {
        const int64_t domain = index / size;
        double sum = is_wrong ? not_a_number() : 0.0;
        if (!is_wrong) {
            const SplitRange splits = splits_of_domain(problem, domain);
            for (int64_t split = splits.first; split < splits.end; ++split) {
                sum += problem.slots[(domain + split) * size + index % size];
            }
        }
        problem.gradients[index] = static_cast<float>(sum * problem.scale);
    }
}

// After these: every warp that meets a wrong entry overwrites all values and gradients.
TIKMIX_FAST_DEVICE void check_projected_order(const ProjectedProblem& problem) {
    if (!meets_wrong_order(problem.domains, problem.rows, problem.flag)) return;
    const int lane = thread_index() % kLanes;
    const int64_t values = problem.tasks * problem.domains.count;
    const int64_t gradients = problem.slots ? problem.domains.count * problem.k_out * problem.k_in : 0;
    for (int64_t i = lane; i < values; i += kLanes) problem.values[i] = not_a_number();
    for (int64_t i = lane; i < gradients; i += kLanes) problem.gradients[i] = static_cast<float>(not_a_number());
}

}  // namespace tikmix_fast::gpu
