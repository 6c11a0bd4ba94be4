// The factors of a projection as the matrices that projected.h multiplies by: rows padded with zeros, 16-bit numbers.
#pragma once

#include "problem.h"
#include "ptx.h"
#include "target.h"

namespace tikmix_fast::gpu {

TIKMIX_FAST_DEVICE float factor_entry(const FactorProblem& problem, int64_t row, int64_t column) {
    if (row >= problem.k || column >= problem.columns) return 0.0f;
    const int64_t index = row * problem.columns + column;
    switch (problem.kind) {
        case Factor::float32:
            return static_cast<const float*>(problem.factor)[index];
        case Factor::bfloat16:
            return from_bfloat16(static_cast<const uint16_t*>(problem.factor)[index]);
        case Factor::float16:
            return from_float16(static_cast<const uint16_t*>(problem.factor)[index]);
        case Factor::int8:
            return static_cast<const int8_t*>(problem.factor)[index];
        case Factor::codes:
            break;
    }
    const int32_t code = static_cast<const int32_t*>(problem.factor)[column];
    const int32_t target = code < 0 ? ~code : code;
    // A row that the matrix does not have must not pass unseen.
    if (target >= problem.k) return as_float(0x7fc00000u);
    return target != row ? 0.0f : code < 0 ? -1.0f : 1.0f;
}

constexpr int kFactorThreads = 256;

// A thread writes eight numbers at a time.
TIKMIX_FAST_DEVICE void write_factor(const FactorProblem& problem) {
    const int64_t across = problem.stride / 8;
    for (int64_t index = block_index() * kFactorThreads + thread_index(); index < problem.dim * across;
         index += block_count() * kFactorThreads) {
        const int64_t row = index / across, column = index % across * 8;
        Words4 words = {};
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < 8; ++i) {
            const float entry = factor_entry(problem, row, column + i);
            const uint32_t bits = problem.element == Element::bfloat16 ? bfloat16_bits(entry) : float16_bits(entry);
            words.word[i / 2] |= bits << i % 2 * 16;
        }
        static_cast<Words4*>(problem.matrix)[index] = words;
    }
}

}  // namespace tikmix_fast::gpu
