// Checks the codes, lays them out for the kernels, and runs the rows on the threads.
#include "sketch.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace tikmix_fast {
namespace {

// Rows a thread takes at a time, and the numbers for which waking a thread pays.
constexpr int64_t kSliceRows = 64;
constexpr int64_t kFewestNumbersPerThread = 1 << 18;

SketchKernel kernel_for(const std::string& instruction_set) {
#ifdef TIKMIX_FAST_AVX512
    if (instruction_set.rfind("avx512", 0) == 0) return sketch_avx512;
#endif
#ifdef TIKMIX_FAST_AVX2
    if (instruction_set == "avx2") return sketch_avx2;
#endif
    if (instruction_set == "generic") return sketch_generic;
    throw std::invalid_argument("no such instruction set here: " + instruction_set);
}

}  // namespace

void sketch_rows(const SketchProblem& problem, const char* instruction_set, int threads) {
    const SketchKernel kernel = kernel_for(instruction_set);
    const int64_t dim = problem.dim;
    if (dim < kSmallestSketch || dim > kLargestSketch || (dim & (dim - 1)) != 0) {
        throw std::invalid_argument("a CountSketch must have a power of two from 16 to 1024 rows; got " +
                                    std::to_string(dim));
    }
    const int64_t blocks = divide_up(problem.columns, dim);
    std::vector<int32_t> masks(blocks);
    std::vector<uint32_t> signs(blocks * dim);
    std::vector<uint32_t> paired(blocks * dim / 2);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * dim;
        for (int64_t j = first; j < std::min(first + dim, problem.columns); ++j) {
            const bool negative = problem.codes[j] < 0;
            const int32_t bucket = negative ? ~problem.codes[j] : problem.codes[j];
            if (j == first) masks[b] = bucket;
            if (bucket >= dim || bucket != ((j - first) ^ masks[b])) {
                throw std::invalid_argument("projection must send column j of a block of " + std::to_string(dim) +
                                            " columns to row j ^ mask, one mask per block; got row " +
                                            std::to_string(bucket) + " for column " + std::to_string(j));
            }
            signs[j] = uint32_t{negative} << 31;
            paired[j / 2] |= uint32_t{negative} << (j % 2 == 0 ? 15 : 31);
        }
    }
    const SketchTables tables = {masks.data(), signs.data(), paired.data()};
    const int64_t slices = divide_up(problem.rows, kSliceRows);
    threads = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(threads, problem.rows * problem.columns / kFewestNumbersPerThread)));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t first = slice * kSliceRows;
        kernel(problem, tables, first, std::min(kSliceRows, problem.rows - first));
    }
}

}  // namespace tikmix_fast
