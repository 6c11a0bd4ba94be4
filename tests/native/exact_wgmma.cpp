// The wgmma kernel and what it computes addresses with, for test_gpu_exact_wgmma.py.
#include "exact_wgmma.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;
using namespace tikmix_fast::gpu;

namespace {

template <class Number>
Number* pointer(int64_t address) {
    return reinterpret_cast<Number*>(address);
}

int64_t bytes_of(const Rows& rows, int64_t count, int64_t width) {
    return count == 0 ? 0 : ((count - 1) * rows.stride + width) * kElementBytes;
}

int64_t tiles_of(const ExactProblem& problem) {
    return divide_up(problem.height, kTileWgmma.rows) * divide_up(problem.width, kTileWgmma.columns);
}

template <class Number, int kCluster>
void run(const ExactProblem& problem, int64_t clusters, uint64_t seed) {
    const TensorMap grad_output = {problem.grad_output, problem.rows, problem.height};
    const TensorMap input = {problem.input, problem.rows, problem.width};
    simt::allow(problem.grad_output.data, bytes_of(problem.grad_output, problem.rows, problem.height));
    simt::allow(problem.input.data, bytes_of(problem.input, problem.rows, problem.width));
    const bool bfloat16_queries = problem.query_element == Element::bfloat16;
    simt::allow(problem.queries,
                problem.tasks * tiles_of(problem) * kTileWgmma.elements() * (bfloat16_queries ? 2 : 4));
    const auto body = [&](unsigned char* shared) {
        if (bfloat16_queries) {
            problem.grad_weight ? exact_wgmma<Number, kCluster, true, true>(problem, grad_output, input, shared)
                                : exact_wgmma<Number, kCluster, true, false>(problem, grad_output, input, shared);
        } else {
            problem.grad_weight ? exact_wgmma<Number, kCluster, false, true>(problem, grad_output, input, shared)
                                : exact_wgmma<Number, kCluster, false, false>(problem, grad_output, input, shared);
        }
    };
    const int64_t blocks = least(clusters, wgmma_cluster_items(problem, kCluster)) * kCluster;
    simt::launch_cluster(blocks, kCluster, kWgmmaThreads, exact_wgmma_bytes(problem.tasks), body, seed);
}

// Addresses of arrays on the CPU; 0 where there is none.
void exact(const std::vector<int64_t>& sizes, int element, const std::vector<int64_t>& input,
           const std::vector<int64_t>& grad_output, int64_t offsets, int64_t order, int query_element, int64_t queries,
           int64_t grad_weight, int grad_weight_element, int64_t grad_weight_stride, int64_t partials,
           int64_t split_totals, int cluster, int64_t clusters, uint64_t seed) {
    ExactProblem problem = {};
    problem.rows = sizes.at(0);
    problem.height = sizes.at(1);
    problem.width = sizes.at(2);
    problem.tasks = sizes.at(3);
    problem.domains = {pointer<int64_t>(offsets), pointer<int64_t>(order), sizes.at(4)};
    problem.splits = sizes.at(5);
    problem.element = static_cast<Element>(element);
    problem.input = {pointer<void>(input.at(0)), input.at(1)};
    problem.grad_output = {pointer<void>(grad_output.at(0)), grad_output.at(1)};
    problem.query_element = static_cast<Element>(query_element);
    problem.queries = pointer<void>(queries);
    problem.grad_weight = pointer<void>(grad_weight);
    problem.grad_weight_element = static_cast<Element>(grad_weight_element);
    problem.grad_weight_stride = grad_weight_stride;
    problem.partials = pointer<float>(partials);
    problem.split_totals = pointer<float>(split_totals);
    const bool bfloat16 = problem.element == Element::bfloat16;
    if (cluster == 1) {
        bfloat16 ? run<BFloat16, 1>(problem, clusters, seed) : run<Float16, 1>(problem, clusters, seed);
    } else {
        bfloat16 ? run<BFloat16, 2>(problem, clusters, seed) : run<Float16, 2>(problem, clusters, seed);
    }
}

// queries [tasks, height, width] in the order of the kernel, as they are.
template <class Number>
void pack(int64_t tasks, int64_t height, int64_t width, int64_t from, int64_t to) {
    const int64_t tile_columns = divide_up(width, kTileWgmma.columns);
    const int64_t count = divide_up(height, kTileWgmma.rows) * tile_columns * tasks * kTileWgmma.elements();
    for (int64_t position = 0; position < count; ++position) {
        const QueryPlace place = packed_element(kTileWgmma, 16 / sizeof(Number), tasks, tile_columns, position);
        const bool is_inside = place.row < height && place.column < width;
        pointer<Number>(to)[position] =
            is_inside ? pointer<Number>(from)[(place.task * height + place.row) * width + place.column] : Number{0};
    }
}

// Adds split_totals to total [height, width].
void add_split_totals(int64_t height, int64_t width, int64_t splits, int64_t from, int64_t to) {
    const int64_t tile_columns = divide_up(width, kTileWgmma.columns);
    const int64_t tiles = divide_up(height, kTileWgmma.rows) * tile_columns;
    for (int64_t split = 0; split < splits; ++split) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int warp = 0; warp < kTileWgmma.warps(); ++warp) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    for (int i = 0; i < kTileWgmma.registers(); ++i) {
                        const Place inside = kTileWgmma.place(warp, lane, i);
                        const int64_t row = tile / tile_columns * kTileWgmma.rows + inside.row;
                        const int64_t column = tile % tile_columns * kTileWgmma.columns + inside.column;
                        if (row >= height || column >= width) continue;
                        pointer<float>(to)[row * width + column] += pointer<float>(
                            from)[split_total_position(kTileWgmma, tiles, split, tile, warp, i / 4, lane) + i % 4];
                    }
                }
            }
        }
    }
}

// (number, split, tile row, tile column, first row, end) of every item of every block of a cluster.
std::vector<std::vector<int64_t>> items(int64_t rows, int64_t height, int64_t width, int64_t splits, int cluster) {
    ExactProblem problem = {};
    problem.rows = rows;
    problem.height = height;
    problem.width = width;
    problem.splits = splits;
    std::vector<std::vector<int64_t>> found;
    for (int64_t index = 0; index < wgmma_cluster_items(problem, cluster); ++index) {
        for (int rank = 0; rank < cluster; ++rank) {
            const WgmmaItem item = wgmma_item(problem, cluster, index, rank);
            found.push_back({item.number, item.split, item.tile.row, item.tile.column, item.rows.begin, item.rows.end});
        }
    }
    return found;
}

// Bits of elements [rows, columns] of an operand after copying boxes of `matrix` with the map, read by its descriptor.
std::vector<int> box_by_descriptor(const std::vector<int64_t>& matrix, int64_t count, int64_t width, int row,
                                   int column, int boxes, int first_row, uint64_t seed) {
    std::vector<int> found;
    const TensorMap map = {{pointer<void>(matrix.at(0)), matrix.at(1)}, count, width};
    simt::launch(
        1, 128, 8 * kBoxBytes + 8,
        [&](unsigned char* shared) {
            const SharedAddress start = shared_address(shared), barrier = start + 8 * kBoxBytes;
            if (thread_index() == 0) {
                barrier_init(barrier, 1);
                fence_barrier_init();
                barrier_arrive_expect(barrier, boxes * kBoxBytes);
                for (int box = 0; box < boxes; ++box) {
                    copy_box(start + box * kBoxBytes, map, column + box * kBoxColumns, row, barrier);
                }
            }
            sync_block();
            barrier_wait(barrier, 0);
            if (thread_index() != 0) return;
            const uint64_t descriptor = matrix_descriptor(start + first_row * kBoxRowBytes);
            for (int r = 0; r < 16; ++r) {
                for (int c = 0; c < boxes * kBoxColumns; ++c) {
                    found.push_back(simt::operand_element(simt::block(), descriptor, r, c));
                }
            }
        },
        seed);
    return found;
}

// Two blocks of a warpgroup each multiply ones, 64 rows by threads, with one mistake. Returns the first accumulator of
// each thread of the first block.
std::vector<float> small_kernel(const std::string& mistake, uint64_t seed) {
    std::vector<float> found(128);
    std::vector<uint16_t> ones(8 + 8, 0x3f80);
    const void* const source = ones.data() + (16 - reinterpret_cast<uintptr_t>(ones.data()) % 16) % 16 / 2;
    const auto is = [&](const char* name) { return mistake == name; };
    simt::launch_cluster(
        2, 2, 128, 6 * kBoxBytes + 16,
        [&](unsigned char* shared) {
            const int thread = thread_index();
            const SharedAddress start = shared_address(shared), full = start + 6 * kBoxBytes, empty = full + 8;
            if (thread == 0) {
                barrier_init(full, 128);
                barrier_init(empty, is("too few arrivals") ? 9 : 8);
                if (!is("barrier not shown")) fence_barrier_init();
            }
            sync_cluster();
            for (uint32_t place = 16 * thread; place < 6 * kBoxBytes; place += 16 * 128) {
                copy_async_16(start + place, source, 16);
            }
            copy_async_commit();
            copy_async_wait<0>();
            if (!is("no fence after copies")) fence_async_proxy();
            if (is("bytes do not come") && thread == 0) {
                barrier_arrive_expect(full, 16);
            } else {
                barrier_arrive(full);
            }
            barrier_wait(full, 0);
            ProductTile tile = {};
            if (!is("no products_begin")) products_begin(tile);
            for (int row = 0; row < kBoxRows; row += 16) {
                multiply_add(BFloat16(), tile, matrix_descriptor(start + row * kBoxRowBytes),
                             matrix_descriptor(start + 2 * kBoxBytes + row * kBoxRowBytes));
            }
            if (!is("products not committed")) products_commit();
            if (is("accumulators touched")) tile[0][0] = 0.0f;
            products_wait(tile);
            if (cluster_rank() == 0) found[thread] = tile[0][0];
            if (thread % kLanes < 2) barrier_arrive_at(empty, thread % kLanes);
            if (is("leaves early")) return;
            barrier_wait(empty, 0);
            sync_cluster();
        },
        seed);
    return found;
}

}  // namespace

PYBIND11_MODULE(exact_wgmma, module) {
    module.def("exact", &exact);
    module.def("pack_bfloat16", &pack<uint16_t>);
    module.def("pack_float32", &pack<float>);
    module.def("add_split_totals", &add_split_totals);
    module.def("items", &items);
    module.def("box_by_descriptor", &box_by_descriptor);
    module.def("small_kernel", &small_kernel);
    module.def("swizzle128", &swizzle128);
    module.def("place_in_box", &place_in_box);
    module.def("matrix_descriptor", &matrix_descriptor);
}
