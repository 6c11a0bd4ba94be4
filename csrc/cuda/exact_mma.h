// Exact influence by mma.sync and cp.async, for sm_80 and newer.
//
// What 32 rows of a 128 x 128 tile cost a multiprocessor of an A100, counted in the machine code, not measured: 512
// cycles of the tensor cores; 384 of shared memory (256 to read fragments, 128 to write rows; parts of 64 x 32 would
// read for 384); about 220 slots of each scheduler, half of them for addresses and edges of the copies; 16 KiB from L2,
// 32 bytes a cycle of about 47. So the tensor cores limit it, with shared memory and L2 next. A bfloat16 query costs
// about 310 slots, as much as 19 rows: 9 queries are hidden behind the other block's rows where a domain has many times
// 170 rows, and limit the kernel where it has fewer.
#pragma once

#include "epilogue.h"
#include "fragments.h"
#include "problem.h"
#include "ptx.h"
#include "schedule.h"
#include "segments.h"
#include "swizzle.h"

namespace tikmix_fast::gpu {

struct MmaKernel {
    static constexpr int kThreads = MmaShape::value().warps() * kLanes;
    static constexpr int kBlockRows = 32;  // rows that are multiplied between two barriers
    static constexpr int kOperandBytes = kBlockRows * kOperandRowBytes;
    static constexpr int kStageBytes = 2 * kOperandBytes;  // rows of grad_output, then of input
    // Tile rows that share the rows of `input` in L2.
    static constexpr int64_t kBand = 16;

    static constexpr int64_t shared_bytes(int stages, int64_t tasks) {
        return stages * kStageBytes + epilogue_bytes(MmaShape::value(), tasks);
    }
};

// The items of an ExactProblem, in 32 bits, since registers are few; the launch sees to it that they fit.
struct MmaWalk {
    const ExactProblem& problem;
    int tile_rows, tile_columns, items;

    TIKMIX_FAST_DEVICE explicit MmaWalk(const ExactProblem& problem)
        : problem(problem),
          tile_rows(static_cast<int>(divide_up(problem.height, MmaShape::value().rows))),
          tile_columns(static_cast<int>(divide_up(problem.width, MmaShape::value().columns))),
          items(tile_rows * tile_columns * static_cast<int>(problem.splits)) {}

    TIKMIX_FAST_DEVICE int first_item() const { return static_cast<int>(block_index()); }
    TIKMIX_FAST_DEVICE int next_item(int item) const { return item + static_cast<int>(block_count()); }
    TIKMIX_FAST_DEVICE WorkItem work(int item) const { return work_item(item, int64_t{tile_rows} * tile_columns); }
    TIKMIX_FAST_DEVICE Tile tile(const WorkItem& work) const {
        return tile_at(work.tile, tile_rows, tile_columns, MmaKernel::kBand);
    }
};

// The rows of an item, domain by domain.
struct MmaRows {
    int begin, end;                          // of the item
    int domain, segment_begin, segment_end;  // what is left of the rows of this domain

    TIKMIX_FAST_DEVICE void begin_item(const ExactProblem& problem, int64_t split) {
        const RowRange range = rows_of_split(problem.rows, problem.splits, split, kRowBlock);
        begin = static_cast<int>(range.begin);
        end = static_cast<int>(range.end);
        domain = -1;
        next(problem);
    }
    TIKMIX_FAST_DEVICE void next(const ExactProblem& problem) {
        const Segment segment = next_segment(problem.domains, {begin, end}, domain + 1);
        domain = static_cast<int>(segment.domain);
        segment_begin = static_cast<int>(segment.begin);
        segment_end = static_cast<int>(segment.end);
    }
    TIKMIX_FAST_DEVICE bool is_over(const ExactProblem& problem) const { return domain >= problem.domains.count; }
    TIKMIX_FAST_DEVICE Segment segment() const { return {domain, segment_begin, segment_end}; }
};

// Copies blocks of rows to shared memory, in the order in which they are multiplied: through the ends of domains and of
// items, so that the next rows are under way while the tile is multiplied with the queries.
class RowLoader {
    static constexpr int kEach = MmaKernel::kBlockRows * kChunks / MmaKernel::kThreads;

  public:
    TIKMIX_FAST_DEVICE RowLoader(const ExactProblem& problem, const MmaWalk& walk, unsigned char* shared)
        : problem_(problem),
          walk_(walk),
          to_(shared_address(shared) + chunk_offset(chunk(0))),
          item_(walk.first_item()) {
        begin_item();
        find_places();
    }

    // Copies the next block, if there is one, and makes a group of it.
    TIKMIX_FAST_DEVICE void copy_next(int stage) {
        if (item_ < walk_.items) {
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kEach; ++i) {
                const bool is_inside = rows_.segment_begin + chunk(i).row < rows_.segment_end;
                const SharedAddress to =
                    to_ + stage * MmaKernel::kStageBytes + chunk_offset(chunk(i)) - chunk_offset(chunk(0));
                copy_async_16(to, row_at(grad_output_, problem_.grad_output, places_[i]),
                              is_inside ? grad_output_bytes_ : 0);
                copy_async_16(to + MmaKernel::kOperandBytes, row_at(input_, problem_.input, places_[i]),
                              is_inside ? input_bytes_ : 0);
            }
            rows_.segment_begin += MmaKernel::kBlockRows;
            if (rows_.segment_begin >= rows_.segment_end) {
                rows_.next(problem_);
                if (rows_.is_over(problem_)) {
                    item_ = walk_.next_item(item_);
                    begin_item();
                }
            }
            find_places();
        }
        copy_async_commit();
    }

  private:
    TIKMIX_FAST_DEVICE static Chunk chunk(int i) { return copied_chunk(MmaKernel::kThreads, thread_index(), i); }

    // Goes to the first rows of this item or, if it has none, of the next that has.
    TIKMIX_FAST_DEVICE void begin_item() {
        for (; item_ < walk_.items; item_ = walk_.next_item(item_)) {
            const WorkItem work = walk_.work(item_);
            rows_.begin_item(problem_, work.split);
            if (rows_.is_over(problem_)) continue;
            const Tile tile = walk_.tile(work);
            point(grad_output_, grad_output_bytes_, problem_.grad_output, problem_.height,
                  tile.row * MmaShape::value().rows);
            point(input_, input_bytes_, problem_.input, problem_.width, tile.column * MmaShape::value().columns);
            return;
        }
    }

    // At this thread's column of chunks, of which `bytes` lie in the matrix.
    TIKMIX_FAST_DEVICE static void point(const unsigned char*& at, int& bytes, const Rows& rows, int64_t columns,
                                         int64_t first) {
        const int64_t column = first + chunk(0).column * (kChunkBytes / 2);
        bytes = static_cast<int>(clamp((columns - column) * 2, 0, kChunkBytes));
        at = static_cast<const unsigned char*>(rows.data) + (bytes ? column * 2 : 0);
    }

    // Read one block ahead, since what `order` says is waited for.
    TIKMIX_FAST_DEVICE void find_places() {
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kEach; ++i) places_[i] = rows_.segment_begin + chunk(i).row;
        if (!problem_.domains.order) return;
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kEach; ++i) {
            if (places_[i] >= rows_.segment_end) continue;
            places_[i] = static_cast<int>(place_of_row(problem_.domains, problem_.rows, places_[i]));
        }
    }

    // One multiplication: the launch sees to it that the stride fits.
    TIKMIX_FAST_DEVICE static const unsigned char* row_at(const unsigned char* first, const Rows& rows, int place) {
        return first + uint64_t{static_cast<uint32_t>(place)} * static_cast<uint32_t>(rows.stride * 2);
    }

    const ExactProblem& problem_;
    const MmaWalk& walk_;
    const SharedAddress to_;
    int item_;
    MmaRows rows_ = {};
    const unsigned char* grad_output_ = nullptr;
    const unsigned char* input_ = nullptr;
    int grad_output_bytes_ = 0, input_bytes_ = 0;
    int places_[kEach];
};

// A warp's part of the products of one block of rows, read from shared memory.
template <class Number>
class BlockMultiplier {
    static constexpr int kBlocksDown = MmaShape::value().warp_rows / 16;
    static constexpr int kBlocksAcross = MmaShape::value().warp_columns / 8;
    static constexpr int kStep = 16;  // rows that one instruction multiplies

  public:
    TIKMIX_FAST_DEVICE explicit BlockMultiplier(unsigned char* shared) {
        const int lane = thread_index() % kLanes;
        const Place origin = MmaShape::value().warp_origin(thread_index() / kLanes);
        const Chunk a = chunk_for_a(lane), b = chunk_for_b(lane);
        a_ = shared_address(shared) + chunk_offset({a.row, a.column + origin.row / 8});
        b_ = shared_address(shared) + MmaKernel::kOperandBytes + chunk_offset({b.row, b.column + origin.column / 8});
    }

    TIKMIX_FAST_DEVICE void multiply(float (&accumulators)[kBlocksDown * kBlocksAcross][4], int stage) const {
        SharedAddress a_at[kBlocksDown], b_at[kBlocksAcross / 2];
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kBlocksDown; ++i) a_at[i] = chunks_right(a_ + stage * MmaKernel::kStageBytes, i * 2);
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kBlocksAcross / 2; ++i) b_at[i] = chunks_right(b_ + stage * MmaKernel::kStageBytes, i * 2);
        TIKMIX_FAST_UNROLL
        for (int row = 0; row < MmaKernel::kBlockRows; row += kStep) {
            uint32_t a[kBlocksDown][4], b[kBlocksAcross / 2][4];
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kBlocksAcross / 2; ++i) {
                load_matrices_transposed(b[i], b_at[i] + row * kOperandRowBytes);
            }
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kBlocksDown; ++i) load_matrices_transposed(a[i], a_at[i] + row * kOperandRowBytes);
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < kBlocksDown; ++i) {
                TIKMIX_FAST_UNROLL
                for (int j = 0; j < kBlocksAcross; ++j) {
                    const uint32_t two[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    multiply_add(Number{}, accumulators[i * kBlocksAcross + j], a[i], two);
                }
            }
        }
    }

  private:
    SharedAddress a_, b_;
};

// `shared` has MmaKernel::shared_bytes, aligned to 128.
template <class Number, bool kBfloat16Queries, bool kTotal, int kStages, int kAhead = 8>
TIKMIX_FAST_DEVICE void exact_mma(const ExactProblem& problem, unsigned char* shared) {
    const MmaWalk walk(problem);
    RowLoader loader(problem, walk, shared);
    const BlockMultiplier<Number> multiplier(shared);
    Epilogue<MmaShape, kBfloat16Queries, kTotal, kAhead> epilogue(problem, shared + kStages * MmaKernel::kStageBytes,
                                                                  thread_index());
    float accumulators[MmaShape::value().registers() / 4][4] = {};
    for (int stage = 0; stage < kStages - 1; ++stage) loader.copy_next(stage);
    int stage = 0;
    for (int item = walk.first_item(); item < walk.items; item = walk.next_item(item)) {
        const WorkItem work = walk.work(item);
        epilogue.begin_item(item, work.split, walk.tile(work));
        MmaRows rows;
        rows.begin_item(problem, work.split);
        do {
            for (int row = rows.segment_begin; row < rows.segment_end; row += MmaKernel::kBlockRows) {
                copy_async_wait<kStages - 2>();
                sync_block();
                // All threads have read what lies where this goes.
                loader.copy_next(stage == 0 ? kStages - 1 : stage - 1);
                multiplier.multiply(accumulators, stage);
                stage = stage + 1 == kStages ? 0 : stage + 1;
            }
            const Segment segment = rows.segment();
            rows.next(problem);
            epilogue.end_segment(accumulators, segment, rows.segment());
        } while (!rows.is_over(problem));
    }
    copy_async_wait<0>();
}

}  // namespace tikmix_fast::gpu
