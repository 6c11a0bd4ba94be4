// Cuts the weights into tiles, runs them on the threads, and sums their products in a fixed order.
#include "group_influence.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tikmix_fast {
namespace {

// Tiles are cut smaller until there are this many: enough work for the threads, by a rule that does not depend on them.
constexpr int64_t kWantedTiles = 32;
constexpr int64_t kSmallestTileRows = 48;
constexpr int64_t kSmallestTileColumns = 64;
// Each group of neighbouring tiles has sums [n, m] of its own, so that their memory does not grow with the weights.
constexpr int64_t kMostGroups = 256;

int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Grid {
    int64_t tile_rows = kTileRows;
    int64_t tile_columns = kTileColumns;
    int64_t across = 0;
    int64_t tiles = 0;

    explicit Grid(const Problem& problem) {
        count(problem);
        while (tiles < kWantedTiles && (tile_rows > kSmallestTileRows || tile_columns > kSmallestTileColumns)) {
            const bool widest = tile_columns > kSmallestTileColumns && tile_columns >= tile_rows;
            (tile_rows <= kSmallestTileRows || widest ? tile_columns : tile_rows) /= 2;
            count(problem);
        }
    }

    void count(const Problem& problem) {
        across = divide_up(problem.width, tile_columns);
        tiles = divide_up(problem.height, tile_rows) * across;
    }

    Tile operator()(const Problem& problem, int64_t index) const {
        const int64_t row = index / across * tile_rows;
        const int64_t column = index % across * tile_columns;
        return {row, std::min(tile_rows, problem.height - row), column, std::min(tile_columns, problem.width - column)};
    }
};

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};

constexpr int64_t kScratchFloats = kDepth * (kTileRows + kTileColumns) + 2 * kTileRows * kTileColumns;

std::unique_ptr<float, Free> allocate_scratch(int threads) {
    void* memory = std::aligned_alloc(64, sizeof(float) * kScratchFloats * threads);
    if (!memory) throw std::bad_alloc();
    return std::unique_ptr<float, Free>(static_cast<float*>(memory));
}

Scratch scratch_of(float* memory, int thread) {
    float* grad_output_panel = memory + thread * kScratchFloats;
    float* input_panel = grad_output_panel + kDepth * kTileRows;
    float* gradient = input_panel + kDepth * kTileColumns;
    return {grad_output_panel, input_panel, gradient, gradient + kTileRows * kTileColumns};
}

int this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace

std::vector<Kernel> usable_kernels() {
    std::vector<Kernel> kernels;
#ifdef TIKMIX_FAST_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        kernels.push_back(avx512_kernel);
    }
#endif
#ifdef TIKMIX_FAST_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(avx2_kernel);
#endif
    kernels.push_back(generic_kernel);
    return kernels;
}

void group_influence(const Problem& problem, const Kernel& kernel, int threads, double* values) {
    const Grid grid(problem);
    const int64_t cells = problem.tasks * problem.domains;
    const int64_t groups = std::min(grid.tiles, kMostGroups);
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, groups)));
    const auto memory = allocate_scratch(threads);
    std::vector<double> sums(groups * cells, 0.0);

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; ++group) {
        const Scratch scratch = scratch_of(memory.get(), this_thread());
        for (int64_t tile = group * grid.tiles / groups; tile < (group + 1) * grid.tiles / groups; ++tile) {
            kernel.accumulate_tile(problem, grid(problem, tile), scratch, sums.data() + group * cells);
        }
    }

    std::fill(values, values + cells, 0.0);
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t cell = 0; cell < cells; ++cell) values[cell] += sums[group * cells + cell];
    }
}

}  // namespace tikmix_fast
