// Where the numbers of an O x I tile lie in the registers of a block, and the order in which queries are packed for it.
//
// The tile is cut into one part per warp, the part into blocks of 16 x 8, and a lane holds four numbers of every block,
// as mma.m16n8 and wgmma.m64nNk16 leave them (PTX ISA, "Matrix fragments"; one warp of wgmma has 16 of the 64 rows).
// Packed queries follow the registers, so that a lane reads 16 bytes at a time, and a warp 512 bytes in a row:
//
//     [tile][task][warp][register / per_load][lane][register % per_load]
//
// with tiles in row-major order of the matrix, and zeros where the tile leaves it.
#pragma once

#include "target.h"

namespace tikmix_fast::gpu {

constexpr int kLanes = 32;

struct Place {
    int row, column;
};

// Where register `index` of a lane lies in a warp's part that is `columns` wide.
TIKMIX_FAST_ANYWHERE constexpr Place place_of_register(int columns, int lane, int index) {
    const int block = index / 4, blocks_across = columns / 8;
    return {block / blocks_across * 16 + index % 4 / 2 * 8 + lane / 4,
            block % blocks_across * 8 + lane % 4 * 2 + index % 2};
}

struct TileShape {
    int rows, columns;            // of the tile, O x I
    int warp_rows, warp_columns;  // of a warp's part; warps are numbered row-major

    TIKMIX_FAST_ANYWHERE constexpr int warps_across() const { return columns / warp_columns; }
    TIKMIX_FAST_ANYWHERE constexpr int warps() const { return rows / warp_rows * warps_across(); }
    TIKMIX_FAST_ANYWHERE constexpr int registers() const { return warp_rows * warp_columns / kLanes; }
    TIKMIX_FAST_ANYWHERE constexpr int64_t elements() const { return int64_t{rows} * columns; }
    // Where a warp's part starts in the tile.
    TIKMIX_FAST_ANYWHERE constexpr Place warp_origin(int warp) const {
        return {warp / warps_across() * warp_rows, warp % warps_across() * warp_columns};
    }
    TIKMIX_FAST_ANYWHERE constexpr Place place(int warp, int lane, int index) const {
        const Place origin = warp_origin(warp), inside = place_of_register(warp_columns, lane, index);
        return {origin.row + inside.row, origin.column + inside.column};
    }
};

// 128 x 128 by four warps of mma, since smaller parts would read shared memory for longer than they multiply; 128 x 256
// by two warpgroups of wgmma.
constexpr TileShape kTileMma = {128, 128, 64, 64};
constexpr TileShape kTileWgmma = {128, 256, 16, 256};

// The same as template arguments.
struct MmaShape {
    TIKMIX_FAST_ANYWHERE static constexpr TileShape value() { return kTileMma; }
};
struct WgmmaShape {
    TIKMIX_FAST_ANYWHERE static constexpr TileShape value() { return kTileWgmma; }
};

// Element number of one lane's registers `load * per_load` ... in the packed queries.
TIKMIX_FAST_ANYWHERE constexpr int64_t packed_position(const TileShape& shape, int per_load, int64_t tasks,
                                                       int64_t tile, int64_t task, int warp, int load, int lane) {
    const int64_t loads = shape.registers() / per_load;
    return ((((tile * tasks + task) * shape.warps() + warp) * loads + load) * kLanes + lane) * per_load;
}

struct QueryPlace {
    int64_t task, row, column;  // row and column may lie outside of the matrix: then it is padding
};

// The inverse: what lies at an element number of the packed queries.
TIKMIX_FAST_ANYWHERE QueryPlace packed_element(const TileShape& shape, int per_load, int64_t tasks,
                                               int64_t tile_columns, int64_t position) {
    const int in_load = static_cast<int>(position % per_load);
    const int lane = static_cast<int>(position / per_load % kLanes);
    int64_t rest = position / per_load / kLanes;
    const int loads = shape.registers() / per_load;
    const int load = static_cast<int>(rest % loads);
    rest /= loads;
    const int warp = static_cast<int>(rest % shape.warps());
    rest /= shape.warps();
    const int64_t tile = rest / tasks;
    const Place inside = shape.place(warp, lane, load * per_load + in_load);
    return {rest % tasks, tile / tile_columns * shape.rows + inside.row,
            tile % tile_columns * shape.columns + inside.column};
}

}  // namespace tikmix_fast::gpu
