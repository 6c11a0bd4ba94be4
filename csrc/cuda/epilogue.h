// What the exact kernels do where the rows of a domain end: the products of the tile in their registers with every
// query, and handing the tile on to the total.
//
// Where the total is wanted, accumulators are not zeroed between domains (prefix mode): the products of a domain are
// then differences between sums over the block, and the accumulators at the end are the total. They are flushed to it
// and zeroed before the end where a difference would be spoilt: by a sum that is not finite, which would reach all
// domains that follow, and by a domain with so few rows that its digits would be lost in those of the rows before it.
#pragma once

#include "fragments.h"
#include "problem.h"
#include "ptx.h"
#include "segments.h"

namespace tikmix_fast::gpu {

// Tasks between two barriers.
constexpr int kTaskGroup = 16;
// With more tasks than this, the accumulators are flushed after every domain, and no sum is kept to subtract.
constexpr int64_t kMostSumsKept = 1024;
// Flush before a domain with fewer than 1 / kDigits of the rows since the last flush.
constexpr int64_t kDigits = 1024;

// Shared memory that Epilogue needs, a multiple of 16 bytes.
TIKMIX_FAST_ANYWHERE constexpr int64_t epilogue_bytes(const TileShape& shape, int64_t tasks) {
    return 4 * (2 * (kTaskGroup + 1) * shape.warps() + divide_up(least(tasks, kMostSumsKept), 4) * 4);
}

// Element number in ExactProblem::split_totals of the four registers of a block; tiles are numbered row-major.
TIKMIX_FAST_ANYWHERE constexpr int64_t split_total_position(const TileShape& shape, int64_t tiles, int64_t split,
                                                            int64_t tile, int warp, int block, int lane) {
    return (split * tiles + tile) * shape.elements() + ((warp * (shape.registers() / 4) + block) * kLanes + lane) * 4;
}

struct alignas(16) Floats4 {
    float value[4];
};

// One for each of the threads that hold the tile. Shape::value() is the TileShape; `kAhead` loads of 16 bytes are under
// way while as many are used; `barrier` is theirs alone.
template <class Shape, bool kBfloat16Queries, bool kTotal, int kAhead = 4, int kBarrier = 1>
class Epilogue {
    static constexpr int kWarps = Shape::value().warps();
    static constexpr int kBlocks = Shape::value().registers() / 4;  // of 16 x 8
    static constexpr int kPerLoad = kBfloat16Queries ? 8 : 4;
    static constexpr int kSteps = Shape::value().registers() / kPerLoad / kAhead;
    static_assert(kSteps % 2 == 0, "buffers alternate, and a task begins with the first");

  public:
    // `thread` counts the threads that hold the tile; `shared` has epilogue_bytes, aligned to 16.
    TIKMIX_FAST_DEVICE Epilogue(const ExactProblem& problem, unsigned char* shared, int thread)
        : problem_(problem),
          sums_(reinterpret_cast<float*>(shared)),
          kept_(sums_ + 2 * (kTaskGroup + 1) * kWarps),
          thread_(thread) {
        if (kTotal) forget();
    }

    TIKMIX_FAST_DEVICE void begin_item(int64_t item, int64_t split, Tile tile) {
        item_ = static_cast<int>(item);
        split_ = static_cast<int>(split);
        tile_row_ = static_cast<int>(tile.row);
        tile_column_ = static_cast<int>(tile.column);
        rows_ = 0;
        stored_ = false;
    }

    // After the rows of `segment` were added to the accumulators; `next` is the one that follows. A range without rows
    // has one call, in which neither has a domain. All threads call it alike.
    TIKMIX_FAST_DEVICE void end_segment(float (&accumulators)[kBlocks][4], const Segment& segment,
                                        const Segment& next) {
        Words4 words[2][kAhead];
        end<false>(accumulators, segment, next, words);
    }

    // The same in two steps: the first queries are on their way while the caller waits for the accumulators.
    using Queries = Words4[2][kAhead];
    TIKMIX_FAST_DEVICE void ask(Queries& words) const {
        if (problem_.tasks > 0) load(words[0], first_queries(), 0);
    }
    TIKMIX_FAST_DEVICE void end_asked_segment(float (&accumulators)[kBlocks][4], const Segment& segment,
                                              const Segment& next, Queries& words) {
        end<true>(accumulators, segment, next, words);
    }

  private:
    template <bool kAsked>
    TIKMIX_FAST_DEVICE void end(float (&accumulators)[kBlocks][4], const Segment& segment, const Segment& next,
                                Queries& words) {
        const bool is_last = next.domain >= problem_.domains.count;
        bool flush = is_last;
        if (segment.domain < problem_.domains.count) {
            const bool is_finite = multiply<kAsked>(accumulators, segment.domain, words);
            rows_ += segment.end - segment.begin;
            if (problem_.tasks > 0) {
                flush =
                    flush || !is_finite || problem_.tasks > kMostSumsKept || (next.end - next.begin) * kDigits < rows_;
            }
        }
        if (kTotal) {
            if (!flush) return;
            if (problem_.splits > 1) {
                store_split_total(accumulators);
            } else if (rows_ > 0 && problem_.grad_weight_element == Element::float32) {
                add_to_total(accumulators, static_cast<float*>(problem_.grad_weight));
            } else if (rows_ > 0) {
                add_to_total(accumulators, static_cast<uint16_t*>(problem_.grad_weight));
            }
            forget();
            rows_ = 0;
        }
        TIKMIX_FAST_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < 4; ++i) accumulators[block][i] = 0.0f;
        }
    }

    TIKMIX_FAST_DEVICE int warp() const { return thread_ / kLanes; }
    TIKMIX_FAST_DEVICE int lane() const { return thread_ % kLanes; }
    TIKMIX_FAST_DEVICE int64_t tile_rows() const { return divide_up(problem_.height, Shape::value().rows); }
    TIKMIX_FAST_DEVICE int64_t tile_columns() const { return divide_up(problem_.width, Shape::value().columns); }
    TIKMIX_FAST_DEVICE int64_t tile_number() const { return tile_row_ * tile_columns() + tile_column_; }

    // Every task has one thread that knows its sum.
    TIKMIX_FAST_DEVICE void forget() {
        const int64_t count = least(problem_.tasks, kMostSumsKept);
        if (thread_ >= kTaskGroup) return;
        for (int64_t task = thread_; task < count; task += kTaskGroup) kept_[task] = 0.0f;
    }

    TIKMIX_FAST_DEVICE static void load(Words4 (&words)[kAhead], const unsigned char* queries, int step) {
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kAhead; ++i) words[i] = load_once(queries + (step * kAhead + i) * kLanes * 16);
    }

    TIKMIX_FAST_DEVICE static void add_products(float (&sums)[4], const float (&accumulators)[kBlocks][4],
                                                const Words4 (&words)[kAhead], int step) {
        TIKMIX_FAST_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            TIKMIX_FAST_UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t word = words[i].word[j];
                if constexpr (kBfloat16Queries) {
                    const float (&four)[4] = accumulators[(step * kAhead + i) * 2 + j / 2];
                    sums[j % 2 * 2] += four[j % 2 * 2] * low_bfloat16(word);
                    sums[j % 2 * 2 + 1] += four[j % 2 * 2 + 1] * high_bfloat16(word);
                } else {
                    sums[j] += accumulators[step * kAhead + i][j] * as_float(word);
                }
            }
        }
    }

    static constexpr int kQueryBytes = kBfloat16Queries ? 2 : 4;

    // This lane's of the first task.
    TIKMIX_FAST_DEVICE const unsigned char* first_queries() const {
        return static_cast<const unsigned char*>(problem_.queries) +
               packed_position(Shape::value(), kPerLoad, problem_.tasks, tile_number(), 0, warp(), 0, lane()) *
                   kQueryBytes;
    }

    // Writes what this block's tile says of every task; returns whether all sums are finite, the same for all threads.
    template <bool kAsked>
    TIKMIX_FAST_DEVICE bool multiply(const float (&accumulators)[kBlocks][4], int64_t domain, Queries& words) {
        constexpr int64_t kTaskBytes = Shape::value().elements() * kQueryBytes;
        const int64_t tasks = problem_.tasks;
        if (tasks == 0) return true;
        const unsigned char* queries = first_queries();
        if (!kAsked) load(words[0], queries, 0);
        bool is_finite = true;
        float not_finite = 0.0f;  // 0 or NaN
        int in_group = 0;
        for (int64_t task = 0; task < tasks; ++task) {
            float sums[4] = {};
            TIKMIX_FAST_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                if (step + 1 < kSteps) {
                    load(words[(step + 1) % 2], queries, step + 1);
                } else if (task + 1 < tasks) {
                    load(words[0], queries + kTaskBytes, 0);
                }
                add_products(sums, accumulators, words[step % 2], step);
            }
            queries += kTaskBytes;
            float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            TIKMIX_FAST_UNROLL
            for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
            float* const buffer = sums_ + buffer_ * (kTaskGroup + 1) * kWarps;
            if (lane() == 0) buffer[in_group * kWarps + warp()] = sum;
            not_finite += sum * 0.0f;
            if (++in_group < kTaskGroup && task + 1 < tasks) continue;

            if (kTotal && lane() == 0) buffer[kTaskGroup * kWarps + warp()] = not_finite;
            // Sums lie in two buffers by turns: when one is written again, all threads have passed the barrier of the
            // other, and with it read this one.
            sync_some(kBarrier, kWarps * kLanes);
            if (thread_ < in_group) write_partial(buffer + thread_ * kWarps, domain, task + 1 - in_group + thread_);
            if (kTotal) is_finite = is_finite && add_warps(buffer + kTaskGroup * kWarps) == 0.0f;
            buffer_ = 1 - buffer_;
            in_group = 0;
        }
        return is_finite;
    }

    TIKMIX_FAST_DEVICE static float add_warps(const float* sums) {
        float sum = 0.0f;
        TIKMIX_FAST_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
        return sum;
    }

    TIKMIX_FAST_DEVICE void write_partial(const float* sums, int64_t domain, int64_t task) {
        float sum = add_warps(sums);
        if (kTotal && problem_.tasks <= kMostSumsKept) {
            const float before = kept_[task];
            kept_[task] = sum;
            sum -= before;
        }
        const int64_t items = tile_rows() * tile_columns() * problem_.splits;
        problem_.partials[(task * problem_.domains.count + domain) * items + item_] = sum;
    }

    TIKMIX_FAST_DEVICE void store_split_total(const float (&accumulators)[kBlocks][4]) {
        const int64_t tiles = tile_rows() * tile_columns();
        float* const to = problem_.split_totals +
                          split_total_position(Shape::value(), tiles, split_, tile_number(), warp(), 0, lane());
        TIKMIX_FAST_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            Floats4* const four = reinterpret_cast<Floats4*>(to + block * kLanes * 4);
            Floats4 sum = {};
            if (stored_) sum = *four;
            TIKMIX_FAST_UNROLL
            for (int i = 0; i < 4; ++i) sum.value[i] += accumulators[block][i];
            *four = sum;
        }
        stored_ = true;
    }

    TIKMIX_FAST_DEVICE static float read(const float* address) { return *address; }
    TIKMIX_FAST_DEVICE static float read(const uint16_t* address) { return from_bfloat16(*address); }
    TIKMIX_FAST_DEVICE static void write(float* address, float value) { *address = value; }
    TIKMIX_FAST_DEVICE static void write(uint16_t* address, float value) { *address = bfloat16_bits(value); }

    // No other block has this tile.
    template <class Number>
    TIKMIX_FAST_DEVICE void add_to_total(const float (&accumulators)[kBlocks][4], Number* total) {
        constexpr int kAcross = Shape::value().warp_columns / 8;
        constexpr int kTogether = 8;  // blocks of which a row is read before it is written, so that reading overlaps
        const Place first = Shape::value().place(warp(), lane(), 0);
        const int64_t row = int64_t{tile_row_} * Shape::value().rows + first.row;
        const int64_t column = int64_t{tile_column_} * Shape::value().columns + first.column;
        const int rows = static_cast<int>(least(problem_.height - row, Shape::value().rows));
        const int columns = static_cast<int>(least(problem_.width - column, Shape::value().columns));
        Number* line = total + row * problem_.grad_weight_stride + column;
        TIKMIX_FAST_UNROLL
        for (int down = 0; down < Shape::value().warp_rows; down += 8) {
            if (down >= rows) break;
            TIKMIX_FAST_UNROLL
            for (int across = 0; across < kAcross; across += kTogether) {
                const int block = down / 16 * kAcross + across;
                float before[kTogether * 2];
                TIKMIX_FAST_UNROLL
                for (int i = 0; i < kTogether * 2; ++i) {
                    const int right = (across + i / 2) * 8 + i % 2;
                    before[i] = right < columns ? read(line + right) : 0.0f;
                }
                TIKMIX_FAST_UNROLL
                for (int i = 0; i < kTogether * 2; ++i) {
                    const int right = (across + i / 2) * 8 + i % 2;
                    const float number = accumulators[block + i / 2][down % 16 / 8 * 2 + i % 2];
                    if (right < columns) write(line + right, before[i] + number);
                }
            }
            line += 8 * problem_.grad_weight_stride;
        }
    }

    const ExactProblem& problem_;
    float* const sums_;
    float* const kept_;
    const int thread_;
    int buffer_ = 0;
    // Narrow, since registers are few.
    int item_ = 0, split_ = 0, tile_row_ = 0, tile_column_ = 0;
    int64_t rows_ = 0;  // in the accumulators
    bool stored_ = false;
};

}  // namespace tikmix_fast::gpu
