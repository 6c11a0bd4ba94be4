// The pure functions of the kernels' headers over whole ranges, for test_gpu_layouts.py. Results go to arrays of int64
// whose addresses come as integers.
#include <pybind11/pybind11.h>

#include "fragments.h"
#include "problem.h"
#include "schedule.h"
#include "segments.h"
#include "swizzle.h"

namespace py = pybind11;
using namespace tikmix_fast::gpu;

namespace {

using Address = uintptr_t;

int64_t* numbers(Address address) { return reinterpret_cast<int64_t*>(address); }

// out[warp][lane][register] = (row, column)
void places(const TileShape& shape, Address out) {
    int64_t* next = numbers(out);
    for (int warp = 0; warp < shape.warps(); ++warp) {
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int index = 0; index < shape.registers(); ++index) {
                const Place place = shape.place(warp, lane, index);
                *next++ = place.row;
                *next++ = place.column;
            }
        }
    }
}

// out[tile][task][warp][load][lane]
void packed_positions(const TileShape& shape, int per_load, int64_t tasks, int64_t tiles, Address out) {
    int64_t* next = numbers(out);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t task = 0; task < tasks; ++task) {
            for (int warp = 0; warp < shape.warps(); ++warp) {
                for (int load = 0; load < shape.registers() / per_load; ++load) {
                    for (int lane = 0; lane < kLanes; ++lane) {
                        *next++ = packed_position(shape, per_load, tasks, tile, task, warp, load, lane);
                    }
                }
            }
        }
    }
}

// out[position] = (task, row, column)
void packed_elements(const TileShape& shape, int per_load, int64_t tasks, int64_t tile_columns, int64_t begin,
                     int64_t end, Address out) {
    int64_t* next = numbers(out);
    for (int64_t position = begin; position < end; ++position) {
        const QueryPlace place = packed_element(shape, per_load, tasks, tile_columns, position);
        *next++ = place.task;
        *next++ = place.row;
        *next++ = place.column;
    }
}

// out[index] = (row, column)
void tiles(int64_t tile_rows, int64_t tile_columns, int64_t band, Address out) {
    int64_t* next = numbers(out);
    for (int64_t index = 0; index < tile_rows * tile_columns; ++index) {
        const Tile tile = tile_at(index, tile_rows, tile_columns, band);
        *next++ = tile.row;
        *next++ = tile.column;
    }
}

// out[item] = (tile, split)
void items(int64_t tiles, int64_t splits, Address out) {
    int64_t* next = numbers(out);
    for (int64_t item = 0; item < tiles * splits; ++item) {
        const WorkItem work = work_item(item, tiles);
        *next++ = work.tile;
        *next++ = work.split;
    }
}

// out[split] = (begin, end)
void splits(int64_t rows, int64_t count, int64_t block, Address out) {
    int64_t* next = numbers(out);
    for (int64_t split = 0; split < count; ++split) {
        const RowRange range = rows_of_split(rows, count, split, block);
        *next++ = range.begin;
        *next++ = range.end;
    }
}

// out[segment] = (domain, begin, end), at most one for every domain; returns how many.
int64_t segments(Address offsets, int64_t domains, int64_t rows, int64_t begin, int64_t end, Address out) {
    const Domains all = {numbers(offsets), nullptr, domains};
    int64_t *next = numbers(out), count = 0;
    for (Segment segment = next_segment(all, {begin, end}, 0); segment.domain < domains && count < domains;
         segment = next_segment(all, {begin, end}, segment.domain + 1), ++count) {
        *next++ = segment.domain;
        *next++ = segment.begin;
        *next++ = segment.end;
    }
    return count;
}

// out[row]
void rows_by_order(Address order, int64_t rows, Address out) {
    const Domains all = {nullptr, order == 0 ? nullptr : numbers(order), 0};
    for (int64_t row = 0; row < rows; ++row) numbers(out)[row] = place_of_row(all, rows, row);
}

// out[chunk] = offset, row by row
void chunk_offsets(int rows, Address out) {
    int64_t* next = numbers(out);
    for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < kChunks; ++column) *next++ = chunk_offset({row, column});
    }
}

// out[thread][index] = (row, column)
void copied_chunks(int threads, int count, Address out) {
    int64_t* next = numbers(out);
    for (int thread = 0; thread < threads; ++thread) {
        for (int index = 0; index < count; ++index) {
            const Chunk chunk = copied_chunk(threads, thread, index);
            *next++ = chunk.row;
            *next++ = chunk.column;
        }
    }
}

// out[lane] = (row, column) for a, (row, column) for b
void chunks_of_fragments(Address out) {
    int64_t* next = numbers(out);
    for (int lane = 0; lane < kLanes; ++lane) {
        for (const Chunk chunk : {chunk_for_a(lane), chunk_for_b(lane)}) {
            *next++ = chunk.row;
            *next++ = chunk.column;
        }
    }
}

}  // namespace

PYBIND11_MODULE(layouts, module) {
    py::class_<TileShape>(module, "TileShape")
        .def(py::init([](int rows, int columns, int warp_rows, int warp_columns) {
            return TileShape{rows, columns, warp_rows, warp_columns};
        }))
        .def_readonly("rows", &TileShape::rows)
        .def_readonly("columns", &TileShape::columns)
        .def_readonly("warp_rows", &TileShape::warp_rows)
        .def_readonly("warp_columns", &TileShape::warp_columns)
        .def_property_readonly("warps", &TileShape::warps)
        .def_property_readonly("registers", &TileShape::registers)
        .def_property_readonly("elements", &TileShape::elements);
    module.attr("TILE_MMA") = kTileMma;
    module.attr("TILE_WGMMA") = kTileWgmma;
    module.def("places", places);
    module.def("packed_positions", packed_positions);
    module.def("packed_elements", packed_elements);
    module.def("tiles", tiles);
    module.def("items", items);
    module.def("splits", splits);
    module.def("count_splits", count_splits);
    module.def("segments", segments);
    module.def("rows_by_order", rows_by_order);
    module.def("chunk_offsets", chunk_offsets);
    module.def("copied_chunks", copied_chunks);
    module.def("chunks_of_fragments", chunks_of_fragments);
}
