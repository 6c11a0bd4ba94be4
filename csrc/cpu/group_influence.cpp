// Cuts the weights into tiles, runs them on the threads, and sums their products in a fixed order.
#include "group_influence.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "workspace.h"

namespace tikmix_fast {
namespace {

// Packed rows of a block: the panels of grad_output of a tile and one of the input stay in the L2 cache together.
constexpr int64_t kBlockRows = 1024;
// Columns of each input that are packed at a time, so that memory grows with neither the rows nor the columns.
constexpr int64_t kPartColumns = 4096;
// Tiles are cut narrower until there are this many: enough work for the threads, by a rule that does not depend on
// them.
constexpr int64_t kWantedTiles = 16;
// Each group of neighbouring tiles has sums of its own, so that their memory does not grow with the weights, and little
// with the domains and tasks.
constexpr int64_t kMostGroups = 256;
constexpr int64_t kMostSums = int64_t{4} << 20;
constexpr double kFewestProductsPerThread = 1 << 20;
// Rows one thread packs at a time.
constexpr int64_t kSliceRows = 64;

// Floats between the parts of a workspace: the distance of two panels is no multiple of the page size, so that panels
// do not all compete for the same cache sets.
constexpr int64_t kLine = kCacheLine / sizeof(float);
constexpr int64_t kGap = 5 * kLine;
int64_t whole_lines_and_gap(int64_t floats) { return divide_up(floats, kLine) * kLine + kGap; }

// Cuts memory into `count` parts, each with its gap, and returns where they end.
float* cut(float* memory, int64_t count, int64_t stride) {
    for (int64_t part = 1; part <= count; ++part) leave_empty(memory + part * stride - kGap, kGap);
    return memory + count * stride;
}

// A part of the weights, cut into tiles.
struct Grid {
    Tile part;
    int64_t tile_columns;
    int64_t across;
    int64_t tiles;

    explicit Grid(const Tile& whole)
        : part(whole),
          tile_columns(std::max<int64_t>(divide_up(whole.columns, kSmallestTileColumns), 1) * kSmallestTileColumns) {
        const int64_t down = divide_up(part.rows, kTileRows);
        while (down * divide_up(part.columns, tile_columns) < kWantedTiles && tile_columns > kSmallestTileColumns) {
            tile_columns = divide_up(tile_columns / 2, kSmallestTileColumns) * kSmallestTileColumns;
        }
        across = divide_up(part.columns, tile_columns);
        tiles = down * across;
    }

    Tile operator[](int64_t index) const {
        const int64_t row = index / across * kTileRows;
        const int64_t column = index % across * tile_columns;
        return {part.first_row + row, std::min(kTileRows, part.rows - row), part.first_column + column,
                std::min(tile_columns, part.columns - column)};
    }
};

// Some of the rows, packed: the rows that each packed row holds, and the domains that they belong to.
class PackedRows {
  public:
    PackedRows(const Problem& problem, int64_t together) : problem_(problem), together_(together) {}

    // Takes the next rows; false if there are none. A domain is cut only where it is long.
    bool next() {
        sources_.clear();
        segments_.clear();
        while (domain_ < problem_.domains && count() < kBlockRows) {
            const int64_t end = problem_.offsets[domain_ + 1];
            const int64_t left = divide_up(end - position_, together_);
            if (left > kBlockRows - count() && left <= kBlockRows && count() >= kBlockRows / 2) break;
            const int64_t packed = std::min(left, kBlockRows - count());
            const int64_t last = std::min(end, position_ + packed * together_);
            const bool whole = position_ == problem_.offsets[domain_] && last == end;
            if (packed > 0) segments_.push_back({domain_, count(), count() + packed, whole});
            for (; position_ < last; ++position_) {
                sources_.push_back(problem_.order ? problem_.order[position_] : position_);
            }
            sources_.resize(divide_up(sources_.size(), together_) * together_, -1);
            if (position_ == end) ++domain_;
        }
        return !segments_.empty();
    }

    int64_t count() const { return sources_.size() / together_; }
    const int64_t* sources() const { return sources_.data(); }
    const std::vector<Segment>& segments() const { return segments_; }

  private:
    const Problem& problem_;
    int64_t together_;
    int64_t domain_ = 0;
    int64_t position_ = 0;
    std::vector<int64_t> sources_;
    std::vector<Segment> segments_;
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

void pack_queries(const Queries& queries, const Kernel& kernel, int64_t height, int64_t width, int threads,
                  void* panels) {
    const int64_t tiles = divide_up(height, kTileRows);
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile * kTileRows;
        kernel.pack_queries(queries, height, {row, std::min(kTileRows, height - row), 0, width}, panels);
    }
}

void group_influence(const Problem& problem, const Kernel& wanted, int threads, double* values) {
    const bool pairs = problem.input.element == Element::bfloat16 && problem.grad_output.element == Element::bfloat16;
    const Kernel& kernel = pairs || !wanted.for_float32 ? wanted : *wanted.for_float32;
    const int64_t together = kernel.rows_together;
    const int64_t tasks = problem.queries.tasks;
    // Waking a thread for less than this costs more than it saves.
    const double products = static_cast<double>(problem.rows) * problem.height * problem.width;
    threads = static_cast<int>(std::max(1.0, std::min<double>(threads, products / kFewestProductsPerThread)));

    const int64_t block_rows = std::min(kBlockRows, divide_up(problem.rows, together) + problem.domains);
    const int64_t part_rows = std::min(divide_up(problem.height, kTileRows), kPartColumns / kTileRows) * kTileRows;
    const int64_t part_columns =
        std::min(divide_up(problem.width, kSmallestTileColumns), kPartColumns / kSmallestTileColumns) *
        kSmallestTileColumns;
    const int64_t grad_output_panels = part_rows / kernel.micro_rows;
    const int64_t grad_output_stride = whole_lines_and_gap(block_rows * kernel.micro_rows);
    const int64_t input_panels = part_columns / kernel.micro_columns;
    const int64_t input_stride = whole_lines_and_gap(block_rows * kernel.micro_columns);
    const int64_t query_floats = problem.queries.packed ? 0 : kTileRows * kernel.micro_columns * tasks;
    const int64_t micro_floats = kernel.micro_rows * kernel.micro_columns;
    const int64_t scratch_stride = whole_lines_and_gap(query_floats + 2 * micro_floats);
    const Workspace workspace(
        (grad_output_panels * grad_output_stride + input_panels * input_stride + threads * scratch_stride) *
        sizeof(float));
    float* const grad_output = static_cast<float*>(workspace.data());
    float* const input = cut(grad_output, grad_output_panels, grad_output_stride);
    float* const scratch_parts = cut(input, input_panels, input_stride);
    cut(scratch_parts, threads, scratch_stride);

    const int64_t cells = problem.domains * sum_stride(tasks);
    const Grid largest({0, std::min(part_rows, problem.height), 0, std::min(part_columns, problem.width)});
    const int64_t affordable = std::max(kWantedTiles, kMostSums / std::max<int64_t>(cells, 1));
    const int64_t groups = std::min({largest.tiles, kMostGroups, affordable});
    std::vector<double> sums(groups * cells, 0.0);

    PackedRows rows(problem, together);
    while (rows.next()) {
        const int64_t slices = divide_up(rows.count(), kSliceRows);
        for (int64_t column = 0; column < problem.width; column += part_columns) {
            for (int64_t row = 0; row < problem.height; row += part_rows) {
                const Tile part = {row, std::min(part_rows, problem.height - row), column,
                                   std::min(part_columns, problem.width - column)};
                const Block block = {rows.sources(),
                                     rows.segments().data(),
                                     static_cast<int64_t>(rows.segments().size()),
                                     part,
                                     grad_output,
                                     grad_output_stride,
                                     input,
                                     input_stride};
                const Grid grid(part);
#pragma omp parallel num_threads(threads)
                {
#pragma omp for schedule(static)
                    for (int64_t slice = 0; slice < slices; ++slice) {
                        const int64_t start = slice * kSliceRows;
                        const int64_t count = std::min(kSliceRows, rows.count() - start);
                        if (row == 0) kernel.pack_input(problem, block, start, count);
                        kernel.pack_grad_output(problem, block, start, count);
                    }
                    float* own = scratch_parts + this_thread() * scratch_stride;
                    const Scratch scratch = {own, own + query_floats, own + query_floats + micro_floats};
#pragma omp for schedule(dynamic, 1)
                    for (int64_t group = 0; group < groups; ++group) {
                        const int64_t last = (group + 1) * grid.tiles / groups;
                        for (int64_t tile = group * grid.tiles / groups; tile < last; ++tile) {
                            kernel.accumulate_tile(problem, block, grid[tile], scratch, sums.data() + group * cells);
                        }
                    }
                }
            }
        }
    }

    std::fill(values, values + tasks * problem.domains, 0.0);
    for (int64_t group = 0; group < groups; ++group) {
        const double* own = sums.data() + group * cells;
        for (int64_t j = 0; j < problem.domains; ++j, own += sum_stride(tasks)) {
            for (int64_t i = 0; i < tasks; ++i) values[i * problem.domains + j] += own[i];
        }
    }
}

}  // namespace tikmix_fast
