// The exact influence on sm_90a: bulk copies and wgmma. The kernel's body; exact_wgmma.cu launches it.
//
// A persistent block has tiles of 128 x 256 of the weights. Two warpgroups multiply, 64 x 256 each in 128 registers of
// a thread; a third fills a ring of four stages with 64 rows of both operands, as they lie in memory: K runs down the
// rows, which wgmma takes from shared memory in either order. The ring runs on through the ends of domains and tiles,
// so that the next rows are on their way while the products with the queries are summed.
//
// Rows that fill a stage come by tensor map. The last rows of a domain do not, and must not be followed by those of the
// next: they are copied by the threads of the third warpgroup, with zeros after them, and so are all rows where `order`
// says where they lie.
//
// In a cluster of two blocks the tiles are neighbours in a column of tiles and share the rows of the input: each block
// brings half of them, for both.
//
// What limits it, by counting, for one multiprocessor at 1.755 GHz and one stage of 64 rows:
//   tensor cores      128 * 256 * 64 products at 2048 per cycle                            1024 cycles
//   shared memory     80 KiB read for wgmma, 48 KiB written, at 128 bytes per cycle        1024 cycles
//   L2                48 KiB; 32 KiB in a cluster of two; at 26 bytes per cycle            1890; 1260 cycles
// and at the end of a domain for every task, while the tensor cores rest:
//   arithmetic        8 warps * (128 to multiply + 128 to unpack bfloat16 + ~30) / 4       ~580 cycles
//   L2                64 KiB of queries at 26 bytes per cycle                              2520 cycles
// 26 bytes are 1/132 of the 6 TB/s that are assumed for L2, not measured: what vendors' products of this shape reach
// implies about as much. Domains that end at different times in different blocks share it better than these sums say.
#pragma once

#include "epilogue.h"
#include "ptx_sm90.h"
#include "swizzle128.h"

namespace tikmix_fast::gpu {

// Blocks that run at the same time have tiles from a band of this many rows of tiles.
constexpr int64_t kWgmmaBand = 16;
constexpr int kWgmmaMathThreads = 256, kWgmmaThreads = kWgmmaMathThreads + 128;
// For all threads of a block together no more than a launch of kWgmmaThreads gives: 65536 / 384, in steps of 8.
constexpr int kWgmmaMathRegisters = 224, kWgmmaLoadRegisters = 56;
static_assert(kWgmmaMathRegisters * kWgmmaMathThreads + kWgmmaLoadRegisters * 128 <= 168 * kWgmmaThreads);

constexpr int kElementBytes = 2;
// A tensor map counts rows in int32. Those beyond come by threads.
constexpr int64_t kMostMapRows = INT32_MAX;

// The stages and their barriers, and where in them a warp is.
class WgmmaRing {
  public:
    static constexpr int kStages = 4;
    static constexpr int kGradOutputBoxes = kTileWgmma.rows / kBoxColumns,
                         kInputBoxes = kTileWgmma.columns / kBoxColumns;
    static constexpr int kStageBytes = (kGradOutputBoxes + kInputBoxes) * kBoxBytes;
    static constexpr int kBytes = kStages * (kStageBytes + 2 * 8);

    TIKMIX_FAST_DEVICE explicit WgmmaRing(SharedAddress start) : start_(start) {}

    TIKMIX_FAST_DEVICE SharedAddress grad_output(int box) const {
        return start_ + slot_ * kStageBytes + box * kBoxBytes;
    }
    TIKMIX_FAST_DEVICE SharedAddress input(int box) const { return grad_output(kGradOutputBoxes + box); }
    // A stage is filled; all that read it have done so.
    TIKMIX_FAST_DEVICE SharedAddress full() const { return full(slot_); }
    TIKMIX_FAST_DEVICE SharedAddress empty() const { return empty(slot_); }
    // Of the stage `back` steps before.
    TIKMIX_FAST_DEVICE SharedAddress full_before(int back) const { return full((slot_ + kStages - back) % kStages); }
    TIKMIX_FAST_DEVICE SharedAddress empty_before(int back) const { return empty((slot_ + kStages - back) % kStages); }
    TIKMIX_FAST_DEVICE uint32_t parity() const { return parity_; }
    TIKMIX_FAST_DEVICE void advance() {
        slot_ = (slot_ + 1) % kStages;
        if (slot_ == 0) parity_ ^= 1;
    }

    TIKMIX_FAST_DEVICE void init(int full_arrivals, int empty_arrivals) const {
        for (int slot = 0; slot < kStages; ++slot) {
            barrier_init(full(slot), full_arrivals);
            barrier_init(empty(slot), empty_arrivals);
        }
    }

  private:
    TIKMIX_FAST_DEVICE SharedAddress full(int slot) const { return start_ + kStages * kStageBytes + slot * 8; }
    TIKMIX_FAST_DEVICE SharedAddress empty(int slot) const { return full(kStages + slot); }

    const SharedAddress start_;
    int slot_ = 0;
    uint32_t parity_ = 0;
};

TIKMIX_FAST_ANYWHERE constexpr int64_t exact_wgmma_bytes(int64_t tasks) {
    return WgmmaRing::kBytes + epilogue_bytes(WgmmaShape::value(), tasks);
}

struct WgmmaItem {
    int64_t number;  // in ExactProblem::partials
    int64_t split;
    Tile tile;
    RowRange rows;
};

// Blocks of a cluster: they share what comes by tensor map, but an odd row of tiles leaves one idle.
TIKMIX_FAST_ANYWHERE int wgmma_cluster(const ExactProblem& problem) {
    const int64_t tile_rows = divide_up(problem.height, kTileWgmma.rows);
    return problem.domains.order == nullptr && (tile_rows % 2 == 0 || tile_rows > 8) ? 2 : 1;
}

// Items of a cluster: one tile for each block, one below the other. The last may lie outside the matrix.
TIKMIX_FAST_ANYWHERE int64_t wgmma_cluster_items(const ExactProblem& problem, int cluster) {
    return divide_up(divide_up(problem.height, kTileWgmma.rows), cluster) *
           divide_up(problem.width, kTileWgmma.columns) * problem.splits;
}
TIKMIX_FAST_ANYWHERE WgmmaItem wgmma_item(const ExactProblem& problem, int cluster, int64_t index, int rank) {
    const int64_t tile_rows = divide_up(problem.height, kTileWgmma.rows);
    const int64_t tile_columns = divide_up(problem.width, kTileWgmma.columns);
    const int64_t groups = divide_up(tile_rows, cluster);
    const WorkItem work = work_item(index, groups * tile_columns);
    const Tile group = tile_at(work.tile, groups, tile_columns, kWgmmaBand / cluster);
    const Tile tile = {group.row * cluster + rank, group.column};
    return {(work.split * tile_rows + tile.row) * tile_columns + tile.column, work.split, tile,
            rows_of_split(problem.rows, problem.splits, work.split, kRowBlock)};
}

// The warpgroup that fills the ring.
template <int kCluster>
class WgmmaLoader {
  public:
    static constexpr int kWarps = 4;

    TIKMIX_FAST_DEVICE WgmmaLoader(const ExactProblem& problem, const TensorMap& grad_output, const TensorMap& input,
                                   WgmmaRing ring, int thread)
        : problem_(problem),
          grad_output_(grad_output),
          input_(input),
          ring_(ring),
          thread_(thread),
          rank_(kCluster > 1 ? cluster_rank() : 0) {}

    TIKMIX_FAST_DEVICE void run() {
        if (thread_ == 0) {
            prefetch_map(grad_output_);
            prefetch_map(input_);
        }
        const int64_t items = wgmma_cluster_items(problem_, kCluster);
        for (int64_t index = block_index() / kCluster; index < items; index += block_count() / kCluster) {
            const WgmmaItem item = wgmma_item(problem_, kCluster, index, rank_);
            const Domains& domains = problem_.domains;
            for (Segment segment = next_segment(domains, item.rows, 0); segment.domain < domains.count;
                 segment = next_segment(domains, item.rows, segment.domain + 1)) {
                for (int64_t row = segment.begin; row < segment.end; row += kBoxRows) load(item.tile, row, segment.end);
            }
        }
        for (int step = 0; step < kBehind; ++step) finish_step(false);
    }

  private:
    // Stages that threads copy are announced when this many others have been asked for after them.
    static constexpr int kBehind = 2;
    static_assert(kBehind < WgmmaRing::kStages, "or the loader waits for a stage that waits for the loader");
    // A thread copies one chunk of a row of every box, then the next row that is its own.
    static constexpr int kRowsTogether = kWarps * kLanes / kBoxChunks, kSteps = kBoxRows / kRowsTogether;
    static_assert(kRowsTogether % 8 == 0, "the swizzle is the same in all rows of a thread");

    TIKMIX_FAST_DEVICE void load(const Tile& tile, int64_t row, int64_t end) {
        const bool by_threads =
            problem_.domains.order != nullptr || end - row < kBoxRows || row > kMostMapRows - kBoxRows;
        int64_t places[kSteps] = {};
        if (by_threads) find_rows(places, row, end);
        barrier_wait(ring_.empty(), ring_.parity() ^ 1);
        sync_warp();  // or a lane that comes late finds the stage filled and emptied, and waits for ever
        if (by_threads) {
            copy_rows(tile, places, static_cast<int>(least(end - row, kBoxRows)));
        } else if (thread_ == 0) {
            barrier_arrive_expect(ring_.full(), WgmmaRing::kStageBytes);
            copy_boxes(tile, static_cast<int>(row));
        } else if (thread_ % kLanes == 0) {
            barrier_arrive(ring_.full());
        }
        finish_step(by_threads);
    }

    // Every stage is a group of this thread's copies, if an empty one, so that the number of groups under way is known.
    TIKMIX_FAST_DEVICE void finish_step(bool by_threads) {
        copy_async_commit();
        not_announced_ = not_announced_ << 1 | static_cast<uint32_t>(by_threads);
        if (not_announced_ >> kBehind & 1) {
            copy_async_wait<kBehind>();
            fence_async_proxy();
            sync_warp();
            if (thread_ % kLanes == 0) barrier_arrive(ring_.full_before(kBehind));
        }
        ring_.advance();
    }

    TIKMIX_FAST_DEVICE void copy_boxes(const Tile& tile, int row) const {
        const int grad_output_column = static_cast<int>(tile.row * kTileWgmma.rows);
        const int input_column = static_cast<int>(tile.column * kTileWgmma.columns);
        TIKMIX_FAST_UNROLL
        for (int box = 0; box < WgmmaRing::kGradOutputBoxes; ++box) {
            copy_box(ring_.grad_output(box), grad_output_, grad_output_column + box * kBoxColumns, row, ring_.full());
        }
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < WgmmaRing::kInputBoxes / kCluster; ++i) {
            const int box = rank_ * (WgmmaRing::kInputBoxes / kCluster) + i;
            if (kCluster > 1) {
                copy_box_to_blocks(ring_.input(box), input_, input_column + box * kBoxColumns, row, ring_.full(),
                                   (1 << kCluster) - 1);
            } else {
                copy_box(ring_.input(box), input_, input_column + box * kBoxColumns, row, ring_.full());
            }
        }
    }

    TIKMIX_FAST_DEVICE void find_rows(int64_t (&places)[kSteps], int64_t row, int64_t end) const {
        TIKMIX_FAST_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            const int64_t mine = row + step * kRowsTogether + thread_ / kBoxChunks;
            if (mine < end) places[step] = place_of_row(problem_.domains, problem_.rows, mine);
        }
    }

    TIKMIX_FAST_DEVICE void copy_rows(const Tile& tile, const int64_t (&places)[kSteps], int count) const {
        TIKMIX_FAST_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            const int row = step * kRowsTogether + thread_ / kBoxChunks;
            copy_chunks<WgmmaRing::kGradOutputBoxes>(ring_.grad_output(0), problem_.grad_output, places[step],
                                                     tile.row * kTileWgmma.rows, problem_.height, row, row < count);
            copy_chunks<WgmmaRing::kInputBoxes>(ring_.input(0), problem_.input, places[step],
                                                tile.column * kTileWgmma.columns, problem_.width, row, row < count);
        }
    }

    // This thread's chunks of a row: zeros where there is no row or the matrix has no such column.
    template <int kBoxes>
    TIKMIX_FAST_DEVICE void copy_chunks(SharedAddress to, const Rows& rows, int64_t place, int64_t first_column,
                                        int64_t width, int row, bool is_row) const {
        const int chunk = thread_ % kBoxChunks;
        const int64_t column = first_column + chunk * kChunkElements;
        const int64_t bytes_left = is_row ? (width - column) * kElementBytes : 0;
        const unsigned char* const data = static_cast<const unsigned char*>(rows.data);
        const unsigned char* const from = data + (place * rows.stride + column) * kElementBytes;
        to += place_in_box(row, chunk);
        TIKMIX_FAST_UNROLL
        for (int box = 0; box < kBoxes; ++box) {
            const int bytes = static_cast<int>(clamp(bytes_left - box * kBoxRowBytes, 0, kChunkBytes));
            copy_async_16(to + box * kBoxBytes, bytes > 0 ? from + box * kBoxRowBytes : data, bytes);
        }
    }

    const ExactProblem& problem_;
    const TensorMap& grad_output_;
    const TensorMap& input_;
    WgmmaRing ring_;
    const int thread_, rank_;
    uint32_t not_announced_ = 0;  // bit i: threads copied the stage i steps back
};

// One of the two warpgroups that multiply.
template <class Number, int kCluster, bool kBfloat16Queries, bool kTotal>
class WgmmaMultiplier {
  public:
    TIKMIX_FAST_DEVICE WgmmaMultiplier(const ExactProblem& problem, WgmmaRing ring, unsigned char* shared, int thread)
        : problem_(problem),
          ring_(ring),
          thread_(thread),
          rank_(kCluster > 1 ? cluster_rank() : 0),
          epilogue_(problem, shared, thread) {}

    TIKMIX_FAST_DEVICE void run() {
        const Domains& domains = problem_.domains;
        const int64_t items = wgmma_cluster_items(problem_, kCluster);
        ProductTile tile = {};  // the epilogue leaves it so
        for (int64_t index = block_index() / kCluster; index < items; index += block_count() / kCluster) {
            const WgmmaItem item = wgmma_item(problem_, kCluster, index, rank_);
            const bool is_inside = item.tile.row * kTileWgmma.rows < problem_.height;
            epilogue_.begin_item(item.number, item.split, item.tile);
            Segment segment = next_segment(domains, item.rows, 0);
            do {
                const Segment next = next_segment(domains, item.rows, segment.domain + 1);
                const int64_t stages = divide_up(segment.end - segment.begin, kBoxRows);
                if (is_inside) {
                    Queries queries;
                    add_rows(tile, stages, queries);
                    epilogue_.end_asked_segment(tile, segment, next, queries);
                } else {
                    skip_rows(stages);
                }
                segment = next;
            } while (segment.domain < domains.count);
        }
    }

  private:
    using Epilogue = gpu::Epilogue<WgmmaShape, kBfloat16Queries, kTotal>;
    using Queries = typename Epilogue::Queries;
    static constexpr int kProductRows = 16;

    TIKMIX_FAST_DEVICE void add_rows(ProductTile& tile, int64_t stages, Queries& queries) {
        const int warpgroup = thread_ / 128;
        for (int64_t stage = 0; stage < stages; ++stage) {
            barrier_wait(ring_.full(), ring_.parity());
            products_begin(tile);
            TIKMIX_FAST_UNROLL
            for (int row = 0; row < kBoxRows; row += kProductRows) {
                multiply_add(Number{}, tile, matrix_descriptor(ring_.grad_output(warpgroup) + row * kBoxRowBytes),
                             matrix_descriptor(ring_.input(0) + row * kBoxRowBytes));
            }
            products_commit();
            products_wait_but_one();
            if (stage > 0) release(ring_.empty_before(1));
            ring_.advance();
        }
        if (stages > 0) epilogue_.ask(queries);
        products_wait(tile);
        if (stages > 0) release(ring_.empty_before(1));
    }

    TIKMIX_FAST_DEVICE void skip_rows(int64_t stages) {
        for (int64_t stage = 0; stage < stages; ++stage) {
            barrier_wait(ring_.full(), ring_.parity());
            sync_warp();
            release(ring_.empty());
            ring_.advance();
        }
    }

    // To all that fill the stage.
    TIKMIX_FAST_DEVICE void release(SharedAddress empty) const {
        const int lane = thread_ % kLanes;
        if (kCluster > 1) {
            if (lane < kCluster) barrier_arrive_at(empty, lane);
        } else if (lane == 0) {
            barrier_arrive(empty);
        }
    }

    const ExactProblem& problem_;
    WgmmaRing ring_;
    const int thread_, rank_;
    Epilogue epilogue_;
};

// `shared` has exact_wgmma_bytes and begins at a multiple of 1024.
template <class Number, int kCluster, bool kBfloat16Queries, bool kTotal>
TIKMIX_FAST_DEVICE void exact_wgmma(const ExactProblem& problem, const TensorMap& grad_output, const TensorMap& input,
                                    unsigned char* shared) {
    const int thread = thread_index();
    const WgmmaRing ring(shared_address(shared));
    if (thread == 0) {
        ring.init(WgmmaLoader<kCluster>::kWarps, kCluster * (kWgmmaMathThreads / kLanes));
        fence_barrier_init();
    }
    if (kCluster > 1) {
        sync_cluster();
    } else {
        sync_block();
    }
    if (thread < kWgmmaMathThreads) {
        take_registers<kWgmmaMathRegisters>();
        WgmmaMultiplier<Number, kCluster, kBfloat16Queries, kTotal>(problem, ring, shared + WgmmaRing::kBytes, thread)
            .run();
    } else {
        give_registers<kWgmmaLoadRegisters>();
        WgmmaLoader<kCluster>(problem, grad_output, input, ring, thread - kWgmmaMathThreads).run();
    }
    // The other block copies to this one's shared memory and arrives at its barriers until it is done.
    if (kCluster > 1) sync_cluster();
}

}  // namespace tikmix_fast::gpu
