// Influence between projected gradients: every row of X and dY is read once, and nothing of its size is written.
//
// A block takes kRows rows at a time, regardless of their domains. It streams X through shared memory in slices of 64
// columns and multiplies it by P_in^T, then dY by P_out^T. The projected rows, x [kRows, k_in] and y [kRows, k_out],
// stay in shared memory. From there it multiplies the rows of one domain after the other, y^T x, and adds the product
// to a k_out x k_in matrix in registers. It carries this matrix on to the next rows until the domain or the block's
// range of rows ends. Then it writes the products of the matrix with the n queries as partial sums, or the matrix
// itself.
//
// Only y^T x tells domains apart, by zeros in place of foreign rows. Before that, a row that is not finite spoils only
// its own x and y.
//
// Bytes. X and dY are 2 T (I + O) from device memory, 268 MB and 62 us at 4.3 TB/s for T = 16384, O = I = 4096. For
// every kRows rows all of P comes from L2, kDim / kRows bytes for each byte of the inputs: half of them at 64 of 128
// (1.5 times 4.3 TB/s through L2), as many again at 128 of 128. For every domain that a block meets, the end of the
// segment reads the queries from L2, 4 n k_out k_in bytes: 147 KB for n = 9 and k = 64.
//
// A slice of kDim = 64 and kRows = 128 brings 16 KB of inputs, 880 clocks at 132 x 1.75 GHz and 4.3 TB/s. It takes 576
// clocks of shared memory at 128 bytes (24 KB written, 48 KB read by ldmatrix), 256 to 416 of the tensor cores, and 280
// of the schedulers (6 copies, 12 ldmatrix, 32 mma and some 90 others per warp). That is why two groups of four warps
// halve the columns of a slice: a warp with all of the 64 sums of 32 rows reads less than one with half of them.
//
// y^T x keeps x and y to 16 bits, as the sum of two bfloat16 numbers, in three products: 192 mma of every tensor core
// per 128 rows, some 1300 clocks of 113000. A single bfloat16, as torch's product returns it, would save 2/3 of that.
// Its rounding would be 2e-5 of |W| |G|, a thousandth of the projection's own error, but exceed the budget of float16
// inputs.
#pragma once

#include "epilogue.h"
#include "fragments.h"
#include "problem.h"
#include "projected_loader.h"
#include "projected_plan.h"
#include "ptx.h"
#include "schedule.h"
#include "segments.h"
#include "target.h"

namespace tikmix_fast::gpu {

// One range of rows. Number is BFloat16 or Float16.
template <class Shape, class Number>
class ProjectedRange {
    static constexpr int kProductBlocks = Shape::product().registers() / 4,
                         kProductAcross = Shape::product().warp_columns / 8;
    static constexpr int kProductDown = Shape::product().warp_rows / 16;
    static constexpr int kPairs = kProductBlocks * 2;
    static constexpr int kDown = Shape::kWarpRows / 16, kAcross = Shape::kWarpDim / 8;

    struct alignas(8) Pair {
        float first, second;
    };

  public:
    TIKMIX_FAST_DEVICE ProjectedRange(const ProjectedProblem& problem, unsigned char* shared, int64_t split)
        : problem_(problem),
          split_(split),
          stages_(shared_address(shared)),
          small_(shared + Shape::kStages * Shape::kStageBytes),
          sums_(reinterpret_cast<float*>(small_ + 4 * Shape::kPartBytes)),
          thread_(thread_index()),
          lane_(thread_ % kLanes),
          warp_(thread_ / kLanes) {}

    TIKMIX_FAST_DEVICE void run() {
        const Domains& domains = problem_.domains;
        const RowRange range = rows_of_split(problem_.rows, problem_.splits, split_, kRowBlock);
        SliceLoader<Shape> loader(problem_, range, stages_);
        TIKMIX_FAST_UNROLL
        for (int stage = 0; stage + 1 < Shape::kStages; ++stage) loader.load(stage);
        // Found while the first slices are under way.
        int64_t domain = first_domain(range.begin);
        float product[kProductBlocks][4] = {};
        for (int64_t begin = range.begin; begin < range.end; begin += Shape::kRows) {
            project(loader, problem_.width, x());
            project(loader, problem_.height, y());
            sync_block();
            const int64_t end = least(begin + Shape::kRows, range.end);
            while (true) {
                const Segment segment = next_segment(domains, range, domain);
                domain = segment.domain;
                if (segment.begin >= end) break;
                add_product(product, static_cast<int>(most(segment.begin - begin, 0)),
                            static_cast<int>(most(least(segment.end, end) - begin, 0)));
                if (Shape::kCarried && segment.end > end) break;
                write(product, domain, Shape::kCarried || segment.begin >= begin);
                zero(product);
                if (segment.end > end) break;
                ++domain;
            }
        }
    }

  private:
    // The first domain that may have rows from `row` on: right where offsets never decrease, and in range anyway.
    TIKMIX_FAST_DEVICE int64_t first_domain(int64_t row) const {
        int64_t low = 0, high = problem_.domains.count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (problem_.domains.offsets[middle + 1] <= row) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

    TIKMIX_FAST_DEVICE unsigned char* x() const { return small_; }
    TIKMIX_FAST_DEVICE unsigned char* y() const { return small_ + 2 * Shape::kPartBytes; }

    // Registers of a thread in shared memory, four of all threads after another.
    template <int threads, int blocks>
    TIKMIX_FAST_DEVICE static void store_registers(const float (&registers)[blocks][4], unsigned char* to, int thread) {
        TIKMIX_FAST_UNROLL
        for (int block = 0; block < blocks; ++block) {
            const float (&four)[4] = registers[block];
            reinterpret_cast<Floats4*>(to)[block * threads + thread] = {{four[0], four[1], four[2], four[3]}};
        }
    }
    template <int threads, int blocks>
    TIKMIX_FAST_DEVICE static void add_registers(float (&registers)[blocks][4], const unsigned char* from, int thread) {
        TIKMIX_FAST_UNROLL
        for (int block = 0; block < blocks; ++block) {
            const Floats4 four = reinterpret_cast<const Floats4*>(from)[block * threads + thread];
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < 4; ++i) registers[block][i] += four.value[i];
        }
    }

    template <int blocks>
    TIKMIX_FAST_DEVICE static void zero(float (&registers)[blocks][4]) {
        TIKMIX_FAST_UNROLL
        for (int block = 0; block < blocks; ++block) {
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < 4; ++i) registers[block][i] = 0.0f;
        }
    }

    // Multiplies the rows' next `columns` columns by the matrix, and leaves the parts of the products at `to`.
    TIKMIX_FAST_DEVICE void project(SliceLoader<Shape>& loader, int64_t columns, unsigned char* to) {
        float sums[kDown * kAcross][4] = {};
        for (int slices = count_slices<Shape>(columns); slices > 0; --slices) {
            // After the barrier this slice is there for all, and all have used the one before it.
            copy_async_wait<Shape::kStages - 2>();
            sync_block();
            loader.load(stage_ == 0 ? Shape::kStages - 1 : stage_ - 1);
            add_slice(sums, stages_ + stage_ * Shape::kStageBytes);
            stage_ = stage_ + 1 == Shape::kStages ? 0 : stage_ + 1;
        }
        // No one reads the rows before these any more: there was a barrier in the loop.
        const int thread = opaque(thread_);
        if (thread >= Shape::kGroupThreads) {
            store_registers<Shape::kGroupThreads>(sums, to, thread - Shape::kGroupThreads);
        }
        sync_block();
        if (thread >= Shape::kGroupThreads) return;
        add_registers<Shape::kGroupThreads>(sums, to, thread);
        sync_some(1, Shape::kGroupThreads);
        store_parts(sums, to);
    }

    TIKMIX_FAST_DEVICE static int first_row(int warp) {
        return warp % 4 * Shape::kWarpDim / Shape::kDim * Shape::kWarpRows;
    }
    TIKMIX_FAST_DEVICE static int first_column(int warp) { return warp % 4 * Shape::kWarpDim % Shape::kDim; }

    TIKMIX_FAST_DEVICE void add_slice(float (&sums)[kDown * kAcross][4], SharedAddress stage) const {
        constexpr int kSteps = Shape::kSliceColumns / 16 / Shape::kGroups;
        const SharedAddress rows = stage + first_row(warp_) * Shape::kRowBytes;
        const SharedAddress matrix = stage + (Shape::kRows + first_column(warp_)) * Shape::kRowBytes;
        TIKMIX_FAST_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            const int chunk = (warp_ / 4 * kSteps + step) * 2;
            uint32_t a[kDown][4];
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kDown; ++i) {
                load_matrices(a[i], rows + swizzled(Shape::kRowBytes, i * 16 + lane_ % 16, chunk + lane_ / 16));
            }
            TIKMIX_FAST_UNROLL
            for (int j = 0; j < kAcross; j += 2) {
                uint32_t b[4];
                const int row = j * 8 + lane_ / 16 * 8 + lane_ % 8;
                load_matrices(b, matrix + swizzled(Shape::kRowBytes, row, chunk + lane_ / 8 % 2));
                TIKMIX_FAST_UNROLL
                for (int i = 0; i < kDown; ++i) {
                    multiply_add(Number{}, sums[i * kAcross + j], a[i], {b[0], b[1]});
                    multiply_add(Number{}, sums[i * kAcross + j + 1], a[i], {b[2], b[3]});
                }
            }
        }
    }

    TIKMIX_FAST_DEVICE static uint32_t both(uint16_t low, uint16_t high) {
        return low | static_cast<uint32_t>(high) << 16;
    }

    TIKMIX_FAST_DEVICE void store_parts(const float (&sums)[kDown * kAcross][4], unsigned char* to) const {
        const int thread = opaque(thread_), lane = thread % kLanes, warp = thread / kLanes;
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kDown * 2; ++i) {
            TIKMIX_FAST_UNROLL
            for (int j = 0; j < kAcross; ++j) {
                const float (&four)[4] = sums[i / 2 * kAcross + j];
                const float first = four[i % 2 * 2], second = four[i % 2 * 2 + 1];
                const uint16_t high[2] = {bfloat16_bits(first), bfloat16_bits(second)};
                const uint16_t low[2] = {bfloat16_bits(first - from_bfloat16(high[0])),
                                         bfloat16_bits(second - from_bfloat16(high[1]))};
                const int row = first_row(warp) + i * 8 + lane / 4;
                unsigned char* const word =
                    to + swizzled(Shape::kSmallRowBytes, row, first_column(warp) / 8 + j) + lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(word) = both(high[0], high[1]);
                *reinterpret_cast<uint32_t*>(word + Shape::kPartBytes) = both(low[0], low[1]);
            }
        }
    }

    // Of two rows that lie in one word, those that are among the rows `first` ... `last` - 1.
    TIKMIX_FAST_DEVICE static uint32_t mask(int row, int first, int last) {
        return (row >= first && row < last ? 0xffffu : 0u) | (row + 1 >= first && row + 1 < last ? 0xffff0000u : 0u);
    }

    // Adds y^T x of the rows `first` ... `last` - 1 of the block.
    TIKMIX_FAST_DEVICE void add_product(float (&product)[kProductBlocks][4], int first, int last) const {
        const int thread = opaque(thread_), lane = thread % kLanes;
        const Place origin = Shape::product().warp_origin(thread / kLanes);
        const SharedAddress x = shared_address(this->x()), y = shared_address(this->y());
        for (int begin = first / 16 * 16; begin < last; begin += 16) {
            const uint32_t masks[2] = {mask(begin + lane % 4 * 2, first, last),
                                       mask(begin + 8 + lane % 4 * 2, first, last)};
            uint32_t a[2][kProductDown][4];
            TIKMIX_FAST_UNROLL
            for (int part = 0; part < 2; ++part) {
                TIKMIX_FAST_UNROLL
                for (int i = 0; i < kProductDown; ++i) {
                    const int row = begin + lane / 16 * 8 + lane % 8;
                    load_matrices_transposed(
                        a[part][i], y + part * Shape::kPartBytes +
                                        swizzled(Shape::kSmallRowBytes, row, origin.row / 8 + i * 2 + lane / 8 % 2));
                    TIKMIX_FAST_UNROLL
                    for (int word = 0; word < 4; ++word) a[part][i][word] &= masks[word / 2];
                }
            }
            TIKMIX_FAST_UNROLL
            for (int j = 0; j < kProductAcross; j += 2) {
                uint32_t b[2][4];
                TIKMIX_FAST_UNROLL
                for (int part = 0; part < 2; ++part) {
                    load_matrices_transposed(b[part], x + part * Shape::kPartBytes +
                                                          swizzled(Shape::kSmallRowBytes, begin + lane % 16,
                                                                   origin.column / 8 + j + lane / 16));
                    TIKMIX_FAST_UNROLL
                    for (int word = 0; word < 4; ++word) b[part][word] &= masks[word % 2];
                }
                // The product of the low parts is left out: 2^-18 of the whole.
                TIKMIX_FAST_UNROLL
                for (int parts = 2; parts >= 0; --parts) {
                    const uint32_t (&four)[4] = b[parts % 2];
                    TIKMIX_FAST_UNROLL
                    for (int i = 0; i < kProductDown; ++i) {
                        float (&left)[4] = product[i * kProductAcross + j];
                        float (&right)[4] = product[i * kProductAcross + j + 1];
                        multiply_add(BFloat16{}, left, a[parts / 2][i], {four[0], four[1]});
                        multiply_add(BFloat16{}, right, a[parts / 2][i], {four[2], four[3]});
                    }
                }
            }
        }
    }

    // Writes what a domain's product says, or adds it to what was written before.
    TIKMIX_FAST_DEVICE void write(const float (&product)[kProductBlocks][4], int64_t domain, bool is_first) {
        if (problem_.slots) write_slot(product, domain, is_first);
        if (problem_.k_in % 2 == 0) {
            write_partials<true>(product, domain, is_first);
        } else {
            write_partials<false>(product, domain, is_first);
        }
    }

    // Calls visit(number, offset, count) for all pairs of neighbours that the lane holds of the product: where they lie
    // in a matrix [k_out, k_in], and how many of them.
    template <class Visit>
    TIKMIX_FAST_DEVICE void visit_pairs(Visit visit) const {
        const int thread = opaque(thread_), lane = thread % kLanes;
        const Place origin = Shape::product().warp_origin(thread / kLanes);
        const int height = static_cast<int>(problem_.k_out), width = static_cast<int>(problem_.k_in);
        const int column = origin.column + lane % 4 * 2;
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kProductDown * 2; ++i) {
            const int row = origin.row + i * 8 + lane / 4;
            const int left = row < height ? width - column : 0;
            TIKMIX_FAST_UNROLL
            for (int j = 0; j < kProductAcross; ++j) {
                const int number = (i / 2 * kProductAcross + j) * 2 + i % 2;
                visit(number, row * width + column + j * 8, static_cast<int>(clamp(left - j * 8, 0, 2)));
            }
        }
    }

    // Domains and splits both rise with the rows, so that no two pairs of them have the same sum.
    TIKMIX_FAST_DEVICE void write_slot(const float (&product)[kProductBlocks][4], int64_t domain, bool is_first) const {
        float* const slot = problem_.slots + (domain + split_) * problem_.k_out * problem_.k_in;
        visit_pairs([&](int number, int offset, int count) {
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (i >= count) continue;
                const float before = is_first ? 0.0f : slot[offset + i];
                slot[offset + i] = before + product[number / 2][number % 2 * 2 + i];
            }
        });
    }

    // With an even width pairs are aligned.
    template <bool is_even>
    TIKMIX_FAST_DEVICE void load_pairs(Pair (&pairs)[kPairs], const float* query) const {
        visit_pairs([&](int number, int offset, int count) {
            Pair& pair = pairs[number];
            pair = {0.0f, 0.0f};
            if (is_even) {
                if (count > 0) pair = *reinterpret_cast<const Pair*>(query + offset);
            } else {
                if (count > 0) pair.first = query[offset];
                if (count > 1) pair.second = query[offset + 1];
            }
        });
    }

    template <bool is_even>
    TIKMIX_FAST_DEVICE void write_partials(const float (&product)[kProductBlocks][4], int64_t domain, bool is_first) {
        for (int64_t first = 0; first < problem_.tasks; first += Shape::kTasks) {
            // All of them are asked for before one is used.
            Pair pairs[Shape::kTasks][kPairs];
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < Shape::kTasks; ++i) {
                const int64_t task = least(first + i, problem_.tasks - 1);
                const float* const query = problem_.queries + task * problem_.k_out * problem_.k_in;
                load_pairs<is_even>(pairs[i], query);
            }
            // Sums lie in two buffers by turns: when one is written again, all threads have passed the barrier of the
            // other, and with it read this one.
            float* const buffer = sums_ + buffer_ * Shape::kTasks * Shape::kWarps;
            buffer_ = 1 - buffer_;
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < Shape::kTasks; ++i) {
                float sum = 0.0f, other = 0.0f;
                TIKMIX_FAST_UNROLL
                for (int j = 0; j < kPairs; ++j) {
                    sum += product[j / 2][j % 2 * 2] * pairs[i][j].first;
                    other += product[j / 2][j % 2 * 2 + 1] * pairs[i][j].second;
                }
                sum += other;
                TIKMIX_FAST_UNROLL
                for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
                if (lane_ == 0) buffer[i * Shape::kWarps + warp_] = sum;
            }
            sync_block();
            const int64_t task = first + thread_;
            if (thread_ >= Shape::kTasks || task >= problem_.tasks) continue;
            double sum = 0.0;
            for (int warp = 0; warp < Shape::kWarps; ++warp) sum += buffer[thread_ * Shape::kWarps + warp];
            // This thread wrote it before.
            float& partial = problem_.partials[(task * problem_.domains.count + domain) * problem_.splits + split_];
            partial = static_cast<float>(sum * problem_.scale) + (is_first ? 0.0f : partial);
        }
    }

    const ProjectedProblem& problem_;
    const int64_t split_;
    const SharedAddress stages_;
    unsigned char* const small_;
    float* const sums_;
    const int thread_, lane_, warp_;
    int stage_ = 0, buffer_ = 0;
};

// Blocks of Shape::kThreads with Shape::kSharedBytes, aligned to 16.
template <class Shape, class Number>
TIKMIX_FAST_DEVICE void projected(const ProjectedProblem& problem, unsigned char* shared) {
    for (int64_t split = block_index(); split < problem.splits; split += block_count()) {
        ProjectedRange<Shape, Number>(problem, shared, split).run();
    }
}

}  // namespace tikmix_fast::gpu
