// Where 16-byte chunks lie in shared memory, and who copies and reads which, for operands stored row by row, 128
// numbers of 16 bits to a row. Eight lanes read or write at a time; they have to meet eight different groups of four
// banks.
#pragma once

#include "target.h"

namespace tikmix_fast::gpu {

constexpr int kChunkBytes = 16;
constexpr int kChunks = 16;  // to a row
constexpr int kOperandRowBytes = kChunkBytes * kChunks;

struct Chunk {
    int row, column;  // the column counts chunks
};

// A column of chunks lies in all groups of banks, and so does a row.
TIKMIX_FAST_ANYWHERE constexpr int chunk_offset(Chunk chunk) {
    return chunk.row * kOperandRowBytes + (chunk.column ^ chunk.row % 8) * kChunkBytes;
}

// The place `columns` chunks to the right of one whose column is a multiple of 8, or one more; for columns 0, 2, 4, 6
// and an address whose row begins at a multiple of 128.
TIKMIX_FAST_ANYWHERE constexpr uint32_t chunks_right(uint32_t address, int columns) {
    return address ^ static_cast<uint32_t>(columns * kChunkBytes);
}

// What a thread copies, `index` in turn: a row of device memory is read by neighbours.
TIKMIX_FAST_ANYWHERE constexpr Chunk copied_chunk(int threads, int thread, int index) {
    return {thread / kChunks + index * (threads / kChunks), thread % kChunks};
}

// The row of an 8 x 8 matrix that a lane points at, for load_matrices_transposed, so that the words are fragments of
// mma.m16n8k16. The operands lie as [16 of k][columns], for a of 16 columns and for b of twice 8.
TIKMIX_FAST_ANYWHERE constexpr Chunk chunk_for_a(int lane) { return {lane / 16 * 8 + lane % 8, lane / 8 % 2}; }
TIKMIX_FAST_ANYWHERE constexpr Chunk chunk_for_b(int lane) { return {lane / 8 % 2 * 8 + lane % 8, lane / 16}; }

}  // namespace tikmix_fast::gpu
