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
constexpr int64_t kWantedTiles = 16;
// The tiles of all tasks, of a domain and of the total stay in the L2 cache while all domains pass by.
constexpr int64_t kTileFloats = 136 << 10;
// Each group of neighbouring tiles has sums [n, m] of its own, so that their memory does not grow with the weights.
constexpr int64_t kMostGroups = 256;
// Rows are packed in blocks of about this many floats, so that memory does not grow with the number of rows either.
constexpr int64_t kPackedFloats = int64_t{2} << 20;
constexpr int64_t kFewestBlockRows = 1024;
constexpr double kFewestProductsPerThread = 1 << 20;
// Rows one thread packs at a time.
constexpr int64_t kSliceRows = 64;

int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Grid {
    int64_t tile_rows = kTileRows;
    int64_t tile_columns = kTileColumns;
    int64_t across = 0;
    int64_t tiles = 0;

    explicit Grid(const Problem& problem) {
        count(problem);
        while (crowded(problem) && (tile_rows > kSmallestTileRows || tile_columns > kSmallestTileColumns)) {
            const bool widest = tile_columns > kSmallestTileColumns && tile_columns >= tile_rows;
            (tile_rows <= kSmallestTileRows || widest ? tile_columns : tile_rows) /= 2;
            count(problem);
        }
    }

    bool crowded(const Problem& problem) const {
        return tiles < kWantedTiles || (problem.tasks + 2) * tile_rows * tile_columns > kTileFloats;
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
using Floats = std::unique_ptr<float, Free>;

constexpr int64_t kCacheLine = 64;

Floats allocate(int64_t count) {
    void* memory = std::aligned_alloc(kCacheLine, divide_up(count * sizeof(float), kCacheLine) * kCacheLine);
    if (!memory) throw std::bad_alloc();
    return Floats(static_cast<float*>(memory));
}

// Floats from one panel of a block to the next: whole cache lines, and not a multiple of the page size, so that the
// panels do not all compete for the same cache sets.
int64_t panel_stride(int64_t rows, int64_t columns) {
    constexpr int64_t line = kCacheLine / sizeof(float);
    constexpr int64_t apart = 5 * line;
    return divide_up(rows * columns, line) * line + apart;
}

// The packed rows of the rows start ... end: the rows that each holds, and where each domain begins and ends.
struct PackedRows {
    std::vector<int64_t> sources;
    std::vector<int64_t> bounds;

    PackedRows(const Problem& problem, int64_t start, int64_t end, int64_t together) {
        for (int64_t j = 0; j < problem.domains; ++j) {
            bounds.push_back(sources.size() / together);
            const int64_t last = std::min(problem.offsets[j + 1], end);
            for (int64_t position = std::max(problem.offsets[j], start); position < last; ++position) {
                sources.push_back(problem.order ? problem.order[position] : position);
            }
            sources.resize(divide_up(sources.size(), together) * together, -1);
        }
        bounds.push_back(sources.size() / together);
    }

    int64_t count() const { return bounds.back(); }
};

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
#ifdef TIKMIX_FAST_AVX512_BF16
        if (__builtin_cpu_supports("avx512bf16")) kernels.push_back(avx512_bf16_kernel);
#endif
        kernels.push_back(avx512_kernel);
    }
#endif
#ifdef TIKMIX_FAST_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(avx2_kernel);
#endif
    kernels.push_back(generic_kernel);
    return kernels;
}

void group_influence(const Problem& problem, const Kernel& wanted, int threads, double* values) {
    const bool pairs = problem.input.element == Element::bfloat16 && problem.grad_output.element == Element::bfloat16;
    const Kernel& kernel = pairs || !wanted.for_float32 ? wanted : *wanted.for_float32;
    const int64_t together = kernel.rows_together;
    const Grid grid(problem);
    const int64_t cells = problem.tasks * problem.domains;
    const int64_t groups = std::min(grid.tiles, kMostGroups);
    // Waking a thread for less than this costs more than it saves.
    const double products = static_cast<double>(problem.rows) * problem.height * problem.width;
    threads = static_cast<int>(std::max(1.0, std::min<double>(threads, products / kFewestProductsPerThread)));
    std::vector<double> sums(groups * cells, 0.0);

    const int64_t fitting = kPackedFloats / std::max<int64_t>(problem.height + problem.width, 1);
    const int64_t block_rows = std::min(problem.rows, std::max(fitting, kFewestBlockRows) * together);
    // Each domain may leave its last packed row part empty.
    const int64_t packed_rows =
        divide_up(block_rows + (together - 1) * std::min(problem.domains, block_rows), together);
    Block block{};
    block.grad_output_panel_stride = panel_stride(packed_rows, kernel.micro_rows);
    block.input_panel_stride = panel_stride(packed_rows, kernel.micro_columns);
    const int64_t grad_output_floats = divide_up(problem.height, kernel.micro_rows) * block.grad_output_panel_stride;
    const int64_t input_floats = divide_up(problem.width, kernel.micro_columns) * block.input_panel_stride;
    const Floats panels = allocate(grad_output_floats + input_floats);
    block.grad_output = panels.get();
    block.input = panels.get() + grad_output_floats;
    const int64_t tile_floats =
        std::min(grid.tile_rows, divide_up(problem.height, kernel.micro_rows) * kernel.micro_rows) *
        std::min(grid.tile_columns, divide_up(problem.width, kernel.micro_columns) * kernel.micro_columns);
    const int64_t product_floats = problem.tasks * kMostLanes * (sizeof(double) / sizeof(float));
    const int64_t scratch_floats = panel_stride(1, (2 + problem.tasks) * tile_floats + product_floats);
    const Floats scratch = allocate(scratch_floats * threads);

    for (int64_t start = 0; start < problem.rows; start += block_rows) {
        const PackedRows rows(problem, start, std::min(problem.rows, start + block_rows), together);
        block.sources = rows.sources.data();
        block.bounds = rows.bounds.data();
        const int64_t slices = divide_up(rows.count(), kSliceRows);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t slice = 0; slice < slices; ++slice) {
                const int64_t first = slice * kSliceRows;
                kernel.pack_rows(problem, block, first, std::min(kSliceRows, rows.count() - first));
            }
            float* memory = scratch.get() + this_thread() * scratch_floats;
            const Scratch own = {memory, memory + tile_floats, memory + 2 * tile_floats,
                                 reinterpret_cast<double*>(memory + (2 + problem.tasks) * tile_floats)};
#pragma omp for schedule(dynamic, 1)
            for (int64_t group = 0; group < groups; ++group) {
                for (int64_t tile = group * grid.tiles / groups; tile < (group + 1) * grid.tiles / groups; ++tile) {
                    kernel.accumulate_tile(problem, block, grid(problem, tile), own, sums.data() + group * cells);
                }
            }
        }
    }

    std::fill(values, values + cells, 0.0);
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t cell = 0; cell < cells; ++cell) values[cell] += sums[group * cells + cell];
    }
}

}  // namespace tikmix_fast
