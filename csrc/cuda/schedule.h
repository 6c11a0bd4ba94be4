// Which block works on what, and when: (tile of the weights, range of rows) by the number of a work item.
#pragma once

#include "target.h"

namespace tikmix_fast::gpu {

struct Tile {
    int64_t row, column;  // in tiles
};

// Blocks that run at the same time should read the same rows of few tiles from L2: tiles are numbered in bands of
// `band` tile rows, down the band first.
TIKMIX_FAST_ANYWHERE Tile tile_at(int64_t index, int64_t tile_rows, int64_t tile_columns, int64_t band) {
    const int64_t per_band = band * tile_columns;
    const int64_t first = index / per_band * band;
    const int64_t height = least(band, tile_rows - first);
    const int64_t within = index % per_band;
    return {first + within % height, within / height};
}

// Ranges of rows begin at multiples of this.
constexpr int64_t kRowBlock = 64;

struct RowRange {
    int64_t begin, end;
};

// Rows of one split: as equal as whole blocks of rows allow. A split may cut a domain; its parts are summed at the end.
TIKMIX_FAST_ANYWHERE RowRange rows_of_split(int64_t rows, int64_t splits, int64_t split, int64_t block) {
    const int64_t blocks = divide_up(rows, block);
    return {least(blocks * split / splits * block, rows), least(blocks * (split + 1) / splits * block, rows)};
}

struct WorkItem {
    int64_t tile;  // as tile_at numbers them
    int64_t split;
};

// Items of one split come one after the other, so that all multiprocessors read the same rows.
TIKMIX_FAST_ANYWHERE WorkItem work_item(int64_t item, int64_t tiles) { return {item % tiles, item / tiles}; }

// Into how many ranges the rows are cut: enough for every multiprocessor to have work, no more than keeps a range
// `least_rows` long, since every range ends with products that the others take too.
inline int64_t count_splits(int64_t tiles, int64_t rows, int64_t multiprocessors, int64_t least_rows) {
    if (tiles == 0 || tiles >= multiprocessors) return 1;
    return most(1, least(multiprocessors / tiles, rows / least_rows));
}

}  // namespace tikmix_fast::gpu
