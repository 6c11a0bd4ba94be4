// Every function of ptx_sm90.h for a CPU, as the PTX ISA describes it; see simt_machine.h for the machine.
//
// Bulk copies, and arrivals at another block, happen at a random later moment; the copies' target is NaN until then.
// Products read shared memory at a random moment until they are waited for; their accumulators are NaN until then. What
// a GPU leaves undefined is an error: barriers or shared memory of a block that has left the kernel, more arrivals than
// a phase takes, products without the fence before them, stages announced without the fence that shows what threads
// copied to the tensor cores, accumulators that change under way.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "problem.h"
#include "simt.h"

namespace simt {

struct PhaseBarrier {
    int arrivals, pending;
    int64_t bytes = 0;  // still to come; fewer than none where they come before they are expected
    uint32_t phase = 0;
    Thread* maker;
    bool is_fenced = false, is_known_to_cluster = false;
    Clock clock;  // what those who arrived know
};

struct Products {
    uint64_t left, right;
    float (*value)(uint32_t bits);
};

// One warp's part of the products of its warpgroup: 16 of the 64 rows.
struct WarpProducts {
    bool may_begin = false;
    bool has_tile = false;  // `sums` stands for the accumulators
    float sums[16][256];
    std::vector<Products> uncommitted;
    std::deque<std::vector<Products>> groups;
};

struct ThreadOfSm90 {
    int64_t copies_fenced = 0;
    int arrivals_under_way = 0;
};

struct BlockOfSm90 {
    std::map<uint32_t, PhaseBarrier> barriers;
    std::map<const Thread*, ThreadOfSm90> threads;
    std::map<int, WarpProducts> products;
    // Of the first block: how many of all threads of the cluster have come, and how often all had.
    int arrived = 0;
    int64_t meetings = 0;
    Clock clock;  // what those who came know
};

inline BlockOfSm90& sm90() { return block().state<BlockOfSm90>(); }
inline ThreadOfSm90& thread_of_sm90() { return sm90().threads[&thread()]; }

inline Block& block_of_rank(Block& block, int rank) {
    if (rank < 0 || rank >= static_cast<int>(block.cluster->blocks.size()))
        fail("no block of this rank in the cluster");
    return *block.cluster->blocks[rank];
}
inline void check_alive(const Block& block, const char* what) {
    for (const Thread& thread : block.threads) {
        if (!thread.finished) return;
    }
    fail(std::string(what) + " comes to block " + std::to_string(block.index) + ", which has left the kernel");
}

inline PhaseBarrier& phase_barrier(Block& block, uint32_t address) {
    const auto found = block.state<BlockOfSm90>().barriers.find(address);
    if (found == block.state<BlockOfSm90>().barriers.end()) fail("no barrier at " + std::to_string(address));
    return found->second;
}

inline void end_phase_if_complete(PhaseBarrier& barrier) {
    constexpr int64_t kMostBytes = (1 << 20) - 1;
    if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) fail("a barrier counts no more than 2^20 - 1 bytes");
    if (barrier.pending < 0) fail("more arrivals at a barrier than its phase takes");
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
}

inline void arrive(Block& block, uint32_t address, int64_t bytes) {
    PhaseBarrier& barrier = phase_barrier(block, address);
    barrier.bytes += bytes;
    --barrier.pending;
    end_phase_if_complete(barrier);
}

inline void leave_turn() {
    thread().warp->patience = 0;
    yield();
}
// Whoever has arrived may not come to run for long, while others take what was released.
inline void perhaps_leave_turn() {
    if (random().below(4) == 0) leave_turn();
}
// Nor may a lane that is about to wait, while the rest of its warp goes on.
inline void perhaps_fall_behind() {
    if (random().below(512) != 0) return;
    for (uint32_t turns = random().below(256); turns > 0; --turns) leave_turn();
}

template <class Barrier>
void wait_for_phase(const char* what, Barrier& barrier, uint32_t parity) {
    perhaps_fall_behind();
    wait_until([&] { return (barrier.phase & 1) != parity; }, what, static_cast<int64_t>(parity));
    acquire(barrier.clock);
    if (random().below(64) == 0) yield();
}

// Element (row, column) of a K x M or K x N operand in MN-major order with the 128-byte swizzle: (8 chunks, groups of
// 64) across, (8, groups of 8) down, the leading offset between groups across, the stride offset between groups down.
inline uint32_t operand_address(uint64_t descriptor, int row, int column) {
    const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("only descriptors of 128-byte swizzle are known");
    const uint32_t address = start + column / 64 * leading + row / 8 * stride + row % 8 * 128 + column % 64 * 2;
    return address ^ (address >> 7 & 7) << 4;
}
inline uint16_t operand_element(const Block& block, uint64_t descriptor, int row, int column) {
    uint16_t bits;
    std::memcpy(&bits, at(block, operand_address(descriptor, row, column), 2), 2);
    return bits;
}

// The tensor cores see what threads copied only after each has fenced.
inline void check_fenced(Block& block, uint64_t descriptor, int columns) {
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < columns; column += 8) {
            const uint32_t address = operand_address(descriptor, row, column);
            at(block, address, 16);
            const Block::Writer& writer = block.writers[(address - kSharedStart) / 16];
            if (writer.thread && writer.copy > block.state<BlockOfSm90>().threads[writer.thread].copies_fenced) {
                fail("products read what a thread copied without fence_async_proxy");
            }
        }
    }
}

// The warp's rows of the products of its warpgroup.
inline void perform(const Warp& warp, const Products& products, float (&sums)[16][256]) {
    check_fenced(*warp.block, products.left, 64);
    check_fenced(*warp.block, products.right, 256);
    for (int k = 0; k < 16; ++k) {
        float right[256];
        for (int column = 0; column < 256; ++column) {
            right[column] = products.value(operand_element(*warp.block, products.right, k, column));
        }
        for (int row = 0; row < 16; ++row) {
            const int column_of_left = warp.index % kWarpsOfGroup * 16 + row;
            const float left = products.value(operand_element(*warp.block, products.left, k, column_of_left));
            for (int column = 0; column < 256; ++column) sums[row][column] += left * right[column];
        }
    }
}

}  // namespace simt

namespace tikmix_fast::gpu {

using ProductTile = float[32][4];

// What the host would encode.
struct alignas(64) TensorMap {
    Rows rows;
    int64_t count, width;
};

inline void barrier_init(SharedAddress barrier, int arrivals) {
    simt::at_aligned("barrier_init", barrier, 8, 8);
    if (arrivals <= 0) simt::fail("a barrier for no arrivals");
    if (!simt::sm90().barriers.insert({barrier, {arrivals, arrivals, 0, 0, &simt::thread()}}).second) {
        simt::fail("barrier_init twice");
    }
}
inline void fence_barrier_init() {
    for (auto& [address, barrier] : simt::sm90().barriers) {
        if (barrier.maker == &simt::thread()) barrier.is_fenced = true;
    }
}

inline void barrier_arrive(SharedAddress barrier) {
    simt::release(simt::phase_barrier(simt::block(), barrier).clock);
    simt::arrive(simt::block(), barrier, 0);
    simt::perhaps_leave_turn();
}
inline void barrier_arrive_expect(SharedAddress barrier, int bytes) {
    simt::release(simt::phase_barrier(simt::block(), barrier).clock);
    simt::arrive(simt::block(), barrier, bytes);
    simt::perhaps_leave_turn();
}
inline void barrier_arrive_at(SharedAddress barrier, int rank) {
    simt::Block& target = simt::block_of_rank(simt::block(), rank);
    simt::PhaseBarrier& there = simt::phase_barrier(target, barrier);
    if (&target == &simt::block()) return barrier_arrive(barrier);
    if (!there.is_known_to_cluster) simt::fail("arrives at a barrier that its block has not shown to the cluster");
    simt::ThreadOfSm90& me = simt::thread_of_sm90();
    ++me.arrivals_under_way;
    simt::Clock known;
    simt::release(known);
    simt::later([&target, &me, barrier, known] {
        simt::learn(simt::phase_barrier(target, barrier).clock, known);
        simt::check_alive(target, "an arrival");
        simt::arrive(target, barrier, 0);
        --me.arrivals_under_way;
    });
    simt::perhaps_leave_turn();
}

inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
    simt::wait_for_phase("barrier_wait", simt::phase_barrier(simt::block(), barrier), parity);
}

inline void fence_async_proxy() {
    const simt::Thread& me = simt::thread();
    simt::thread_of_sm90().copies_fenced = me.copies_started - static_cast<int64_t>(me.copies.size());
}

inline void prefetch_map(const TensorMap&) {}

inline void copy_box_to_blocks(SharedAddress to, const TensorMap& map, int column, int row, SharedAddress barrier,
                               int blocks) {
    constexpr int kRows = 64, kColumns = 64, kBytes = kRows * kColumns * 2;
    if (to % 1024 != 0) simt::fail("boxes with 128-byte swizzle begin at multiples of 1024");
    if (reinterpret_cast<uintptr_t>(map.rows.data) % 16 != 0 || map.rows.stride % 8 != 0) {
        simt::fail("rows of a tensor map begin at multiples of 16 bytes");
    }
    simt::Block& mine = simt::block();
    for (int rank = 0; blocks >> rank != 0; ++rank) {
        if (!(blocks >> rank & 1)) continue;
        simt::Block& target = simt::block_of_rank(mine, rank);
        const simt::PhaseBarrier& there = simt::phase_barrier(target, barrier);
        if (!there.is_fenced) simt::fail("a bulk copy needs a barrier shown by fence_barrier_init");
        if (&target != &mine && !there.is_known_to_cluster) {
            simt::fail("a bulk copy to a block that has not shown its barrier to the cluster");
        }
        std::memset(simt::at(target, to, kBytes), 0xff, kBytes);
        std::fill_n(target.writers.begin() + (to - simt::kSharedStart) / 16, kBytes / 16, simt::Block::Writer());
        target.accesses.forget(to - simt::kSharedStart, kBytes);
        const TensorMap copied = map;
        simt::later([&target, to, copied, column, row, barrier] {
            simt::check_alive(target, "a bulk copy");
            for (int r = 0; r < kRows; ++r) {
                for (int c = 0; c < kColumns; ++c) {
                    const int64_t from_row = int64_t{row} + r, from_column = int64_t{column} + c;
                    uint16_t bits = 0;
                    if (from_row >= 0 && from_row < copied.count && from_column >= 0 && from_column < copied.width) {
                        const auto* const from = static_cast<const uint16_t*>(copied.rows.data) +
                                                 from_row * copied.rows.stride + from_column;
                        simt::check_readable("a bulk copy", from, 2);
                        std::memcpy(&bits, from, 2);
                    }
                    uint32_t address = to + static_cast<uint32_t>(r) * 128 + static_cast<uint32_t>(c) * 2;
                    address ^= (address / 128 % 8) * 16;
                    std::memcpy(simt::at(target, address, 2), &bits, 2);
                }
            }
            simt::PhaseBarrier& there = simt::phase_barrier(target, barrier);
            there.bytes -= kBytes;
            simt::end_phase_if_complete(there);
        });
    }
}
inline void copy_box(SharedAddress to, const TensorMap& map, int column, int row, SharedAddress barrier) {
    copy_box_to_blocks(to, map, column, row, barrier, 1 << simt::cluster_rank());
}

inline int cluster_rank() { return simt::cluster_rank(); }
inline void sync_cluster() {
    simt::perhaps_copy(simt::thread());
    const simt::ThreadOfSm90& me = simt::thread_of_sm90();
    simt::wait_until([&] { return me.arrivals_under_way == 0; }, "sync_cluster, for arrivals that it sent");
    simt::Cluster& cluster = *simt::block().cluster;
    simt::BlockOfSm90& meeting = cluster.blocks[0]->state<simt::BlockOfSm90>();
    simt::release(meeting.clock);
    const int64_t ticket = meeting.meetings;
    int threads = 0;
    for (const auto& block : cluster.blocks) threads += static_cast<int>(block->threads.size());
    if (++meeting.arrived == threads) {
        meeting.arrived = 0;
        ++meeting.meetings;
        for (const auto& block : cluster.blocks) {
            for (auto& [address, barrier] : block->state<simt::BlockOfSm90>().barriers) {
                barrier.is_known_to_cluster |= barrier.is_fenced;
            }
        }
    }
    simt::wait_until([&] { return meeting.meetings != ticket; }, "sync_cluster");
    simt::acquire(meeting.clock);
}

template <int registers>
void take_registers() {
    struct Nothing {
    } nothing;
    simt::together<128>("take_registers", registers, nothing, [](simt::Members<Nothing>) {});
}
template <int registers>
void give_registers() {
    struct Nothing {
    } nothing;
    simt::together<128>("give_registers", registers, nothing, [](simt::Members<Nothing>) {});
}

// NaN that no computation gives.
inline constexpr uint32_t kPoison = 0x7fabcdef;

struct LaneTile {
    ProductTile& tile;
    uint64_t left, right;
};

inline simt::WarpProducts& warp_products(const simt::Warp& warp) {
    return warp.block->state<simt::BlockOfSm90>().products[warp.index];
}

// use(accumulator of a lane, the same in `sums`)
template <class Use>
void for_accumulators(simt::WarpProducts& products, const simt::Members<LaneTile>& lanes, int first, Use use) {
    for (int lane = 0; lane < simt::kLanes; ++lane) {
        ProductTile& tile = lanes[first + lane].tile;
        for (int i = 0; i < 128; ++i) {
            use(tile[i / 4][i % 4], products.sums[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
        }
    }
}
inline void take_tile(float& accumulator, float& sum) {
    sum = accumulator;
    accumulator = as_float(kPoison);
}
inline void check_poison(float& accumulator, float&) {
    if (as_word(accumulator) != kPoison) simt::fail("accumulators were touched while products were under way");
}
inline void give_tile(float& accumulator, float& sum) {
    check_poison(accumulator, sum);
    accumulator = sum;
}

inline void products_begin(ProductTile& d) {
    LaneTile mine = {d, 0, 0};
    simt::together<simt::kLanes>("products_begin", 0, mine,
                                 [](simt::Members<LaneTile>) { warp_products(*simt::thread().warp).may_begin = true; });
}

template <class Element>
void multiply_add(Element, ProductTile& d, uint64_t left, uint64_t right) {
    LaneTile mine = {d, left, right};
    simt::together<128>("multiply_add of a warpgroup", 0, mine, [&](simt::Members<LaneTile> lanes) {
        for (int thread = 0; thread < 128; ++thread) {
            if (lanes[thread].left != left || lanes[thread].right != right) simt::fail("threads differ in descriptors");
        }
        const simt::Warp& last = *simt::thread().warp;
        for (int i = 0; i < simt::kWarpsOfGroup; ++i) {
            const simt::Warp& warp = last.block->warps[last.index / simt::kWarpsOfGroup * simt::kWarpsOfGroup + i];
            simt::WarpProducts& products = warp_products(warp);
            if (!products.may_begin) simt::fail("products without products_begin before them");
            if (!products.has_tile) for_accumulators(products, lanes, i * simt::kLanes, take_tile);
            products.has_tile = true;
            products.uncommitted.push_back({left, right, Element::value});
        }
    });
}

// The oldest groups of the warp that calls, until `most` are left.
inline void perform_groups(size_t most) {
    const simt::Warp& warp = *simt::thread().warp;
    simt::WarpProducts& products = warp_products(warp);
    for (; products.groups.size() > most; products.groups.pop_front()) {
        for (const simt::Products& each : products.groups.front()) simt::perform(warp, each, products.sums);
    }
}

inline void products_commit() {
    struct Nothing {
    } nothing;
    simt::together<simt::kLanes>("products_commit", 0, nothing, [](simt::Members<Nothing>) {
        simt::WarpProducts& products = warp_products(*simt::thread().warp);
        products.groups.push_back(std::exchange(products.uncommitted, {}));
        if (simt::random().below(4) == 0) perform_groups(0);
    });
}
inline void products_wait_but_one() {
    struct Nothing {
    } nothing;
    simt::together<simt::kLanes>("products_wait_but_one", 0, nothing,
                                 [](simt::Members<Nothing>) { perform_groups(1); });
}
inline void products_wait(ProductTile& d) {
    LaneTile mine = {d, 0, 0};
    simt::together<simt::kLanes>("products_wait", 0, mine, [](simt::Members<LaneTile> lanes) {
        simt::WarpProducts& products = warp_products(*simt::thread().warp);
        if (!products.uncommitted.empty()) simt::fail("waits for products that were not committed");
        perform_groups(0);
        if (products.has_tile) for_accumulators(products, lanes, 0, give_tile);
        products.has_tile = products.may_begin = false;
    });
}

}  // namespace tikmix_fast::gpu
