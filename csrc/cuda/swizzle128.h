// How sm_90 lays 16-bit operands out in shared memory: boxes of 64 rows by 64 columns with the 128-byte swizzle, and
// the descriptor by which the tensor cores find them (PTX ISA, "Matrix descriptor format" and "Strides", MN-major).
//
// A row of a box is 128 bytes, eight chunks of 16. Chunk c of row r lies at chunk c ^ (r % 8), so that the eight rows
// which the tensor cores read at a time fall on different banks. Boxes begin at multiples of 1024 bytes.
#pragma once

#include "target.h"

namespace tikmix_fast::gpu {

constexpr int kBoxColumns = 64, kBoxRows = 64;
constexpr int kBoxRowBytes = 128, kBoxBytes = kBoxRows * kBoxRowBytes;
constexpr int kChunkBytes = 16, kChunkElements = 8, kBoxChunks = 8;

// Where the byte `offset` of a box without swizzle lies; its own inverse.
TIKMIX_FAST_ANYWHERE constexpr uint32_t swizzle128(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Where chunk `chunk` of row `row` begins in a box.
TIKMIX_FAST_ANYWHERE constexpr uint32_t place_in_box(int row, int chunk) {
    return swizzle128(static_cast<uint32_t>(row * kBoxRowBytes + chunk * kChunkBytes));
}

// An operand stored row by row (K rows of M or N columns): the 16 rows from `start` on, one row of boxes wide. The
// leading offset leads to the next 64 columns, the stride offset to the next 8 rows; both, and the address, in units of
// 16 bytes. Bits 62 and 63 say 128-byte swizzle; the base offset (49 to 51) is zero, as 16 rows from a box' start on
// are a multiple of 1024 bytes.
TIKMIX_FAST_ANYWHERE constexpr uint64_t matrix_descriptor(uint32_t start) {
    constexpr uint64_t leading = kBoxBytes, stride = 8 * kBoxRowBytes, swizzled = 1;
    return (start & 0x3ffffu) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzled << 62;
}

}  // namespace tikmix_fast::gpu
