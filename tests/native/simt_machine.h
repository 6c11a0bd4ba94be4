// The machine that runs kernels on a CPU: every thread is a fiber, and a scheduler chooses by a seed who goes on.
//
//     simt::launch(grid, threads, shared_bytes, [&](unsigned char* shared) { kernel(problem, shared); }, seed);
//
// runs the blocks one after the other, launch_cluster those of a cluster together. All of it happens on the caller's
// thread. What a kernel does wrong ends the launch with a simt::Error that says who did what; the other threads are
// unwound. Shared memory is full of NaN at the start, and addresses in it are not zero-based.
//
// For whoever adds instructions:
//     thread(), block()      who is asking
//     at(address, bytes)     checked access to shared memory, of the own block or of another one of the cluster
//     together<n>(...)       the n threads of a warp or warpgroup do one thing together
//     wait_until(...)        go on when a condition holds; says what was waited for when no one can go on
//     later(function)        done by the machine at a random moment, at the latest when nothing else can happen
//     block().state<T>()     a T of the block's own
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <typeindex>
#include <utility>
#include <vector>

#include "simt_fiber.h"
#include "simt_races.h"

namespace simt {

constexpr int kLanes = 32;
constexpr int kWarpsOfGroup = 4;
constexpr int kBarriers = 16;

// Where shared memory starts, and how far apart the blocks of a cluster see each other's.
constexpr uint32_t kSharedStart = 1024;
constexpr uint32_t kClusterWindow = 1 << 24;

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// xorshift64*
class Random {
  public:
    explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15u | 1) {
        for (int i = 0; i < 8; ++i) next();
    }
    uint32_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1du >> 32);
    }
    uint32_t below(uint32_t bound) { return static_cast<uint32_t>(uint64_t{next()} * bound >> 32); }

  private:
    uint64_t state_;
};

struct Block;
struct Warp;

// One copy from device to shared memory that copy_async_16 has started.
struct Copy {
    unsigned char* to;
    const void* from;
    int bytes;
    int64_t group;
    bool done;
};

struct Thread {
    Fiber fiber;
    Block* block;
    Warp* warp;
    int index, lane;
    bool started = false, finished = false;
    const char* what = "";  // it waits for
    int64_t detail = 0;
    bool (*predicate)(void*) = nullptr;
    void* predicate_data = nullptr;
    std::vector<Copy> copies;
    int64_t group = 0;
    int64_t copies_started = 0;
};

// Where the threads of a warp or warpgroup meet for what they do together.
struct Meeting {
    const char* what = "";
    int64_t detail = 0;
    int arrived = 0;
    std::array<void*, kLanes * kWarpsOfGroup> arguments;
};

struct Warp {
    Block* block;
    int index;
    std::vector<Thread*> lanes;
    uint32_t ready = ~0u;  // lanes that can go on
    uint32_t polling = 0;  // lanes with a predicate
    int finished = 0;      // lanes that have left the kernel
    int first = 0;         // where the search for a ready lane starts
    int64_t patience = 0;  // meetings until another warp has its turn
    Meeting meeting;
    int number;   // among the warps of the cluster
    Clock clock;  // steps of every warp that this one knows
};

struct Barrier {
    int64_t generation = 0;
    int expected = 0, arrived = 0;
    std::vector<uint32_t> waiting;  // lanes of every warp
    std::vector<Warp*> warps;       // that have arrived
    Clock clock;                    // what they know together
};

// Shared memory with a margin on either side that nobody may write.
class Arena {
  public:
    explicit Arena(int64_t bytes)
        : bytes_(bytes), memory_(static_cast<size_t>(bytes) + 2 * kMargin + kAlignment, 0xff) {
        const auto start = reinterpret_cast<uintptr_t>(memory_.data()) + kMargin;
        data_ = memory_.data() + kMargin + (kAlignment - start % kAlignment) % kAlignment;
    }
    unsigned char* data() const { return data_; }
    int64_t bytes() const { return bytes_; }
    bool margins_untouched() const {
        const auto untouched = [](unsigned char byte) { return byte == 0xff; };
        return std::all_of(memory_.data(), const_cast<const unsigned char*>(data_), untouched) &&
               std::all_of(const_cast<const unsigned char*>(data_) + bytes_, memory_.data() + memory_.size(),
                           untouched);
    }

  private:
    static constexpr size_t kMargin = 4096, kAlignment = 1024;

    int64_t bytes_;
    std::vector<unsigned char> memory_;
    unsigned char* data_;
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
};

struct Block {
    Block(int64_t index, int rank, int64_t bytes)
        : index(index), rank(rank), arena(bytes), writers(static_cast<size_t>(bytes / 16 + 1)) {}

    int64_t index;
    int rank;
    Cluster* cluster = nullptr;
    Arena arena;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Meeting> groups;  // of the warpgroups
    std::array<Barrier, kBarriers> barriers;
    Accesses accesses;
    // Who wrote every 16 bytes of shared memory last by copy_async_16, and with which of its copies.
    struct Writer {
        const Thread* thread = nullptr;
        int64_t copy = 0;
    };
    std::vector<Writer> writers;

    // What an extension keeps for every block: made when first asked for, gone with the block.
    template <class State>
    State& state() {
        std::shared_ptr<void>& kept = states_[typeid(State)];
        if (!kept) kept = std::make_shared<State>();
        return *static_cast<State*>(kept.get());
    }

  private:
    std::map<std::type_index, std::shared_ptr<void>> states_;
};

struct Unwind {};  // thrown through threads that a failed launch leaves behind

// What is running now. One launch at a time.
struct Machine {
    Machine(int64_t grid, std::function<void(unsigned char*)> body, uint64_t seed)
        : grid(grid), body(std::move(body)), random(seed) {
        // From never before someone must wait for it, to at once.
        constexpr uint32_t kEagerness[] = {0, 16, 128, 256};
        eagerness = kEagerness[random.below(4)];
    }

    int64_t grid;
    std::function<void(unsigned char*)> body;
    Random random;
    uint32_t eagerness;  // how probable it is, in 1/256, that something under way happens in one turn
    Thread* current = nullptr;
    Fiber scheduler;
    std::vector<std::function<void()>> later;
    std::exception_ptr failure;
    bool unwinding = false;
};

inline Machine* machine = nullptr;
inline Stacks stacks;
// What may be read by what is checked, from begin to end without overlap; everything where empty.
inline std::map<uintptr_t, uintptr_t> readable;

[[noreturn]] inline void fail(const std::string& message) {
    std::string who;
    if (machine && machine->current) {
        const Thread& thread = *machine->current;
        who = "block " + std::to_string(thread.block->index) + ", thread " + std::to_string(thread.index) + ": ";
    }
    throw Error(who + message);
}

inline Thread& thread() {
    if (!machine || !machine->current) fail("a function of the device was called outside of a kernel");
    return *machine->current;
}
inline Block& block() { return *thread().block; }
inline int cluster_rank() { return block().rank; }
inline int cluster_size() { return static_cast<int>(block().cluster->blocks.size()); }
inline Random& random() { return machine->random; }

// Allows copies and loads from [data, data + bytes) until the end of the next launch; once something is allowed, all
// else is forbidden to copy_async_16 and load_once.
inline void allow(const void* data, int64_t bytes) {
    auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
    for (auto next = readable.upper_bound(end); next != readable.begin() && std::prev(next)->second >= begin;) {
        const auto met = std::prev(next);
        begin = std::min(begin, met->first);
        end = std::max(end, met->second);
        next = readable.erase(met);
    }
    readable[begin] = end;
}

inline void check_readable(const char* what, const void* data, int64_t bytes) {
    if (readable.empty() || bytes == 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const auto behind = readable.upper_bound(begin);
    if (behind != readable.begin() && begin + static_cast<uintptr_t>(bytes) <= std::prev(behind)->second) return;
    fail(std::string(what) + " reads " + std::to_string(bytes) + " bytes outside of the memory it may read");
}

inline std::string described(const char* what, int64_t detail) {
    return detail == 0 ? what : what + ("(" + std::to_string(detail)) + ")";
}

// Leaves the running thread, which someone else has to make ready, or who is ready already.
inline void suspend() {
    Thread& me = *machine->current;
    Warp& warp = *me.warp;
    if (warp.ready != 0 && warp.patience > 0) {
        const uint32_t turned = warp.ready >> warp.first | warp.ready << (kLanes - 1 - warp.first) << 1;
        const int lane = (__builtin_ctz(turned) + warp.first) % kLanes;
        warp.ready &= ~(1u << lane);
        if (lane == me.lane) return;
        machine->current = warp.lanes[lane];
        me.fiber.switch_to(machine->current->fiber);
    } else {
        machine->current = nullptr;
        me.fiber.switch_to(machine->scheduler);
    }
    if (machine->unwinding) throw Unwind();
}

// What the warp has done so far is known to whoever acquires `to`.
inline void release(Clock& to) {
    Warp& warp = *thread().warp;
    learn(to, warp.clock);
    ++warp.clock[static_cast<size_t>(warp.number)];
}
inline void acquire(const Clock& from) { learn(thread().warp->clock, from); }

// Lets other warps go first.
inline void yield() {
    Thread& me = thread();
    me.warp->patience = 0;
    me.what = "its turn";
    me.detail = 0;
    me.warp->ready |= 1u << me.lane;
    suspend();
}

// Goes on when predicate() holds. The machine asks again and again, with this thread as the current one.
template <class Predicate>
void wait_until(Predicate predicate, const char* what, int64_t detail = 0) {
    Thread& me = thread();
    if (predicate()) return;
    me.what = what;
    me.detail = detail;
    me.predicate = [](void* data) { return static_cast<bool>((*static_cast<Predicate*>(data))()); };
    me.predicate_data = &predicate;
    me.warp->polling |= 1u << me.lane;
    suspend();
}

// Has the machine do something at a random moment. There is no current thread then: capture the block.
inline void later(std::function<void()> function) { machine->later.push_back(std::move(function)); }

// The arguments of all that meet; their results go there, too.
template <class Arguments>
class Members {
  public:
    explicit Members(void* const* arguments) : arguments_(arguments) {}
    Arguments& operator[](int member) const { return *static_cast<Arguments*>(arguments_[member]); }

  private:
    void* const* arguments_;
};

// Waits until all threads of the warp (count 32) or warpgroup (count 128) are here, and has the last one call
// compute(members), where members[i] is what thread i of them gave as `mine`. All must come for the same thing: `what`
// and `detail` are compared.
template <int count, class Arguments, class Compute>
void together(const char* what, int64_t detail, Arguments& mine, Compute compute) {
    static_assert(count == kLanes || count == kLanes * kWarpsOfGroup, "a warp or a warpgroup");
    Thread& me = thread();
    Warp& warp = *me.warp;
    const int group = me.index / count;
    if (count > kLanes && group >= static_cast<int>(me.block->groups.size())) fail("no whole warpgroup");
    Meeting& meeting = count == kLanes ? warp.meeting : me.block->groups[group];
    if (meeting.arrived == 0) {
        meeting.what = what;
        meeting.detail = detail;
    } else if (meeting.detail != detail || (meeting.what != what && std::strcmp(meeting.what, what) != 0)) {
        fail("is at " + described(what, detail) + " while others of its warp are at " +
             described(meeting.what, meeting.detail));
    }
    meeting.arguments[me.index % count] = &mine;
    if (++meeting.arrived < count) {
        me.what = what;
        me.detail = detail;
        suspend();
        return;
    }
    meeting.arrived = 0;
    compute(Members<Arguments>(meeting.arguments.data()));
    if (count > kLanes) {
        for (int member = 0; member < count / kLanes; ++member) {
            me.block->warps[group * (count / kLanes) + member].ready = ~0u;
        }
    }
    warp.ready = ~(1u << me.lane);
    if (--warp.patience == 0) yield();
}

inline unsigned char* in_arena(const Arena& arena, int64_t offset, int64_t bytes, const std::string& whose) {
    if (offset < 0 || offset + bytes > arena.bytes()) {
        fail(std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " + whose +
             " shared memory, which has " + std::to_string(arena.bytes()));
    }
    return arena.data() + offset;
}

// Memory behind an address as a thread of `block` sees it: its own shared memory, or another block's by
// cluster_address.
inline unsigned char* at(const Block& block, uint32_t address, int64_t bytes) {
    if (address < kClusterWindow) return in_arena(block.arena, int64_t{address} - kSharedStart, bytes, "the block's");
    const uint32_t rank = address / kClusterWindow - 1;
    if (rank >= block.cluster->blocks.size()) fail("an address in shared memory of no block of the cluster");
    return in_arena(block.cluster->blocks[rank]->arena, int64_t{address % kClusterWindow} - kSharedStart, bytes,
                    "block " + std::to_string(rank) + " of the cluster's");
}
inline unsigned char* at(uint32_t address, int64_t bytes) { return at(block(), address, bytes); }

// The same, for addresses that must be multiples of `alignment`.
inline unsigned char* at_aligned(const char* what, uint32_t address, int64_t bytes, int alignment) {
    if (address % static_cast<uint32_t>(alignment) != 0) {
        fail(std::string(what) + " needs a multiple of " + std::to_string(alignment) + "; got shared address " +
             std::to_string(address));
    }
    return at(address, bytes);
}

// The address of this block's shared memory as it is for block `rank` of the cluster.
inline uint32_t cluster_address(uint32_t address, int rank) {
    return address % kClusterWindow + static_cast<uint32_t>(rank + 1) * kClusterWindow;
}

// One or more warps at a barrier: all lanes of a warp come together, and the last warp lets all go on.
inline void wait_at_barrier(const char* what, int number, int threads) {
    if (number < 0 || number >= kBarriers) fail("there is no barrier " + std::to_string(number));
    Block& block = simt::block();
    if (threads <= 0 || threads % kLanes != 0 || threads > static_cast<int>(block.threads.size())) {
        fail(std::string(what) + " needs whole warps of the block; got " + std::to_string(threads) + " threads");
    }
    Barrier& barrier = block.barriers[number];
    int64_t ticket = 0;
    together<kLanes>(what, number, ticket, [&](Members<int64_t> tickets) {
        if (barrier.arrived == 0) barrier.expected = threads;
        if (barrier.expected != threads) {
            fail(std::string(what) + " of " + std::to_string(threads) + " threads where others wait for " +
                 std::to_string(barrier.expected) + " at barrier " + std::to_string(number));
        }
        for (int lane = 0; lane < kLanes; ++lane) tickets[lane] = barrier.generation;
        release(barrier.clock);
        barrier.warps.push_back(thread().warp);
        barrier.arrived += kLanes;
        if (barrier.arrived == barrier.expected) {
            for (Warp* warp : barrier.warps) learn(warp->clock, barrier.clock);
            barrier.warps.clear();
            barrier.arrived = 0;
            ++barrier.generation;
            for (Warp& warp : block.warps) warp.ready |= std::exchange(barrier.waiting[warp.index], 0u);
        }
    });
    Thread& me = thread();
    if (barrier.generation != ticket) return;
    me.what = what;
    me.detail = number;
    barrier.waiting[me.warp->index] |= 1u << me.lane;
    suspend();
}

// Fails where an access to shared memory races with another warp's.
inline void check_race(const char* what, const unsigned char* place, const std::optional<std::string>& conflict) {
    if (!conflict) return;
    fail(std::string(what) + " at offset " + std::to_string(place - block().arena.data()) +
         " of shared memory, which " + *conflict);
}
inline void note_read(const char* what, const unsigned char* place) {
    Block& block = simt::block();
    const Warp& warp = *thread().warp;
    check_race(what, place, block.accesses.read(place - block.arena.data(), warp.number, warp.clock));
}
// A write that others may see once note_written says that it has been waited for.
inline void note_write_under_way(const char* what, const unsigned char* place) {
    Block& block = simt::block();
    const Warp& warp = *thread().warp;
    check_race(what, place, block.accesses.begin_write(place - block.arena.data(), warp.number, warp.clock));
}
inline void note_written(const unsigned char* place) {
    const Warp& warp = *thread().warp;
    block().accesses.end_write(place - block().arena.data(), warp.number, warp.clock);
}

inline void perform(Copy& copy) {
    if (copy.done) return;
    copy.done = true;
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    std::memset(copy.to + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

// Copies may be done at any moment after they were started.
inline void perhaps_copy(Thread& thread) {
    if (thread.copies.empty() || random().below(256) >= machine->eagerness) return;
    perform(thread.copies[random().below(static_cast<uint32_t>(thread.copies.size()))]);
}

// The life of every fiber.
inline void live() {
    Thread& me = *machine->current;
    Fiber::entered(machine->scheduler);
    me.started = true;
    try {
        machine->body(me.block->arena.data());
    } catch (const Unwind&) {
    } catch (...) {
        machine->failure = std::current_exception();
    }
    me.finished = true;
    me.what = "";
    ++me.warp->finished;
    machine->current = nullptr;
    me.fiber.switch_to(machine->scheduler);
}

inline void resume(Thread& thread) {
    machine->current = &thread;
    machine->scheduler.switch_to(thread.fiber);
    machine->current = nullptr;
}

// Who waits for what, threads with the same answer in one.
inline std::string everyones_state(const Cluster& cluster) {
    std::string text;
    for (const auto& block : cluster.blocks) {
        text += "\nblock " + std::to_string(block->index) + ":";
        const auto state = [](const Thread& thread) {
            return thread.finished ? std::string("have left the kernel")
                                   : "wait in " + described(thread.what, thread.detail);
        };
        for (size_t first = 0, end = 0; first < block->threads.size(); first = end) {
            const std::string shared = state(block->threads[first]);
            while (end < block->threads.size() && state(block->threads[end]) == shared) ++end;
            text += (first == 0 ? " threads " : "; threads ") + std::to_string(first) + " to " +
                    std::to_string(end - 1) + " " + shared;
        }
    }
    return text;
}

inline void do_something_later() {
    std::vector<std::function<void()>>& later = machine->later;
    std::swap(later[random().below(static_cast<uint32_t>(later.size()))], later.back());
    const std::function<void()> function = std::move(later.back());
    later.pop_back();
    function();
}

// Makes ready whose predicate holds.
inline void poll(Warp& warp) {
    for (uint32_t left = warp.polling; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        Thread& thread = *warp.lanes[lane];
        machine->current = &thread;
        if (thread.predicate(thread.predicate_data)) {
            warp.polling &= ~(1u << lane);
            warp.ready |= 1u << lane;
        }
        machine->current = nullptr;
    }
}

// One warp's turn: lanes go on until none can, or until it has met often enough.
inline void turn(Warp& warp) {
    warp.first = static_cast<int>(random().below(kLanes));
    warp.patience = int64_t{1} << random().below(10);
    // A thread that leaves the kernel comes back here, while others may be ready.
    while (warp.ready != 0 && warp.patience > 0) {
        const uint32_t turned = warp.ready >> warp.first | warp.ready << (kLanes - 1 - warp.first) << 1;
        const int lane = (__builtin_ctz(turned) + warp.first) % kLanes;
        warp.ready &= ~(1u << lane);
        resume(*warp.lanes[lane]);
        if (machine->failure) std::rethrow_exception(machine->failure);
    }
}

// Runs a cluster to its end.
inline void run(Cluster& cluster) {
    std::vector<Warp*> warps;
    for (const auto& block : cluster.blocks) {
        for (Warp& warp : block->warps) warps.push_back(&warp);
    }
    while (!warps.empty()) {
        for (size_t i = warps.size(); i > 1; --i) {
            std::swap(warps[i - 1], warps[random().below(static_cast<uint32_t>(i))]);
        }
        bool progress = false;
        for (Warp* warp : warps) {
            while (!machine->later.empty() && random().below(256) < machine->eagerness) {
                do_something_later();
                progress = true;  // for a warp whose turn has passed
            }
            poll(*warp);
            progress |= warp->ready != 0;
            turn(*warp);
        }
        warps.erase(std::remove_if(warps.begin(), warps.end(), [](const Warp* w) { return w->finished == kLanes; }),
                    warps.end());
        if (progress || warps.empty()) continue;
        if (machine->later.empty()) fail("no thread can go on:" + everyones_state(cluster));
        do_something_later();
    }
    while (!machine->later.empty()) do_something_later();
    for (const auto& block : cluster.blocks) {
        if (!block->arena.margins_untouched()) {
            fail("block " + std::to_string(block->index) + " wrote beside its " + std::to_string(block->arena.bytes()) +
                 " bytes of shared memory");
        }
    }
}

// Threads that wait for ever are taken up once more, to be unwound.
inline void unwind(Cluster& cluster) {
    machine->unwinding = true;
    for (const auto& block : cluster.blocks) {
        for (Warp& warp : block->warps) warp.ready = 0;
        for (Thread& thread : block->threads) {
            if (thread.started && !thread.finished) resume(thread);
        }
    }
}

inline std::unique_ptr<Block> make_block(Cluster& cluster, int cluster_blocks, int64_t index, int rank, int threads,
                                         int64_t shared_bytes) {
    auto block = std::make_unique<Block>(index, rank, shared_bytes);
    block->cluster = &cluster;
    const int warps = threads / kLanes;
    block->accesses = Accesses(shared_bytes, cluster_blocks * warps);
    block->threads.resize(static_cast<size_t>(threads));
    block->warps.resize(static_cast<size_t>(warps));
    block->groups.resize(block->warps.size() / kWarpsOfGroup);
    for (Barrier& barrier : block->barriers) barrier.waiting.resize(block->warps.size());
    for (int i = 0; i < threads; ++i) {
        Thread& thread = block->threads[static_cast<size_t>(i)];
        Warp& warp = block->warps[static_cast<size_t>(i / kLanes)];
        const size_t stack = static_cast<size_t>(rank) * static_cast<size_t>(threads) + static_cast<size_t>(i);
        thread.fiber.start(stacks.at(stack), Stacks::usable_bytes(stack), live);
        thread.block = warp.block = block.get();
        thread.warp = &warp;
        thread.index = i;
        thread.lane = i % kLanes;
        warp.index = i / kLanes;
        warp.number = rank * warps + warp.index;
        warp.clock.assign(static_cast<size_t>(cluster_blocks * warps), 0);
        warp.clock[static_cast<size_t>(warp.number)] = 1;
        warp.lanes.push_back(&thread);
    }
    return block;
}

// Runs body(shared) in every thread of `grid` blocks, those of a cluster at the same time.
inline void launch_cluster(int64_t grid, int cluster_blocks, int threads, int64_t shared_bytes,
                           std::function<void(unsigned char*)> body, uint64_t seed = 0) {
    if (machine) fail("a launch inside a launch");
    struct End {
        ~End() {
            machine = nullptr;
            readable.clear();
        }
    } end;
    if (cluster_blocks <= 0 || grid % cluster_blocks != 0) throw Error("the grid must be whole clusters");
    if (threads <= 0 || threads % kLanes != 0 || threads > 1024) throw Error("a block must be 1 to 32 whole warps");
    if (shared_bytes < 0 || shared_bytes > kClusterWindow - kSharedStart) throw Error("too much shared memory");
    Machine here(grid, std::move(body), seed);
    machine = &here;
    for (int64_t first = 0; first < grid; first += cluster_blocks) {
        Cluster cluster;
        for (int rank = 0; rank < cluster_blocks; ++rank) {
            cluster.blocks.push_back(make_block(cluster, cluster_blocks, first + rank, rank, threads, shared_bytes));
        }
        try {
            run(cluster);
        } catch (...) {
            here.current = nullptr;
            unwind(cluster);
            throw;
        }
    }
}

inline void launch(int64_t grid, int threads, int64_t shared_bytes, std::function<void(unsigned char*)> body,
                   uint64_t seed = 0) {
    launch_cluster(grid, 1, threads, shared_bytes, std::move(body), seed);
}

}  // namespace simt
