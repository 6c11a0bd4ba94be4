// Small kernels, right ones and wrong ones, for the tests of the simulator itself. Addresses come as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "ptx.h"

namespace py = pybind11;
using namespace tikmix_fast::gpu;

namespace {

template <class Type>
Type* pointer(uintptr_t address) {
    return reinterpret_cast<Type*>(address);
}

template <class Number>
void shuffle(uintptr_t given, uintptr_t taken, int threads, int mask, uint64_t seed) {
    simt::launch(
        1, threads, 0,
        [&](unsigned char*) {
            pointer<Number>(taken)[thread_index()] = shuffle_xor(pointer<Number>(given)[thread_index()], mask);
        },
        seed);
}

std::vector<bool> any_of_lanes(const std::vector<bool>& predicates, uint64_t seed) {
    std::vector<bool> answers(predicates.size());
    simt::launch(
        1, static_cast<int>(predicates.size()), 0,
        [&](unsigned char*) { answers[thread_index()] = any_lane(predicates[thread_index()]); }, seed);
    return answers;
}

// places[block * threads + thread] gets block_index, block_count, thread_index.
void who_am_i(int64_t grid, int threads, uintptr_t places) {
    simt::launch(grid, threads, 0, [&](unsigned char*) {
        int64_t* const mine = pointer<int64_t>(places) + (block_index() * threads + thread_index()) * 3;
        mine[0] = block_index();
        mine[1] = block_count();
        mine[2] = thread_index();
    });
}

// The rows of four 8 x 8 matrices lie `pitch` bytes apart in shared memory.
void matrices(uintptr_t rows, uintptr_t words, bool transposed, int pitch, uint64_t seed) {
    simt::launch(
        1, 32, 32 * pitch,
        [&](unsigned char* shared) {
            const SharedAddress row = shared_address(shared) + static_cast<uint32_t>(thread_index() * pitch);
            copy_async_16(row, pointer<unsigned char>(rows) + thread_index() * 16, 16);
            copy_async_commit();
            copy_async_wait<0>();
            sync_warp();
            uint32_t loaded[4];
            transposed ? load_matrices_transposed(loaded, row) : load_matrices(loaded, row);
            std::memcpy(pointer<uint32_t>(words) + thread_index() * 4, loaded, 16);
        },
        seed);
}

// Fragments of every lane: d[warp][lane][4] += a[warp][lane][4] b[warp][lane][2].
template <class Element>
void product(uintptr_t d, uintptr_t a, uintptr_t b, int warps, uint64_t seed) {
    simt::launch(
        1, warps * 32, 0,
        [&](unsigned char*) {
            const int t = thread_index();
            float sums[4];
            uint32_t left[4], right[2];
            std::memcpy(sums, pointer<float>(d) + t * 4, sizeof sums);
            std::memcpy(left, pointer<uint32_t>(a) + t * 4, sizeof left);
            std::memcpy(right, pointer<uint32_t>(b) + t * 2, sizeof right);
            multiply_add(Element{}, sums, left, right);
            std::memcpy(pointer<float>(d) + t * 4, sums, sizeof sums);
        },
        seed);
}

void to_bits(uintptr_t values, int64_t count, uintptr_t bfloat16, uintptr_t float16) {
    for (int64_t i = 0; i < count; ++i) {
        pointer<uint16_t>(bfloat16)[i] = bfloat16_bits(pointer<float>(values)[i]);
        pointer<uint16_t>(float16)[i] = float16_bits(pointer<float>(values)[i]);
    }
}

// Every 16-bit pattern.
void from_bits(uintptr_t bfloat16, uintptr_t float16) {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        pointer<float>(bfloat16)[bits] = from_bfloat16(static_cast<uint16_t>(bits));
        pointer<float>(float16)[bits] = from_float16(static_cast<uint16_t>(bits));
    }
}

std::vector<float> parts_of_word(uint32_t word) { return {low_bfloat16(word), high_bfloat16(word), as_float(word)}; }

// Every thread copies bytes[thread] bytes of its 16.
void partial_copies(uintptr_t from, uintptr_t to, const std::vector<int>& bytes, uint64_t seed) {
    const int threads = static_cast<int>(bytes.size());
    simt::launch(
        1, threads, threads * 16,
        [&](unsigned char* shared) {
            const int t = thread_index();
            const void* const source = bytes[t] == 0 ? nullptr : pointer<unsigned char>(from) + t * 16;
            copy_async_16(shared_address(shared + t * 16), source, bytes[t]);
            copy_async_commit();
            copy_async_wait<0>();
            std::memcpy(pointer<unsigned char>(to) + t * 16, shared + t * 16, 16);
        },
        seed);
}

// What thread 0 sees of three groups of one copy each after copy_async_wait<2>, <1> and <0>: [wait][group] first bytes.
std::vector<std::vector<int>> groups_seen(uint64_t seed) {
    std::vector<std::vector<int>> seen(3, std::vector<int>(3));
    alignas(16) unsigned char from[3][16];
    for (int group = 0; group < 3; ++group) std::memset(from[group], group + 1, 16);
    simt::launch(
        1, 32, 32 * 48,
        [&](unsigned char* shared) {
            unsigned char* const mine = shared + thread_index() * 48;
            for (int group = 0; group < 3; ++group) {
                copy_async_16(shared_address(mine + group * 16), from[group], 16);
                copy_async_commit();
            }
            const auto look = [&](int wait) {
                for (int group = 0; group < 3 && thread_index() == 0; ++group) seen[wait][group] = mine[group * 16];
            };
            copy_async_wait<2>();
            look(0);
            copy_async_wait<1>();
            look(1);
            copy_async_wait<0>();
            look(2);
        },
        seed);
    return seen;
}

std::vector<uint32_t> loaded_once(uintptr_t address, const std::vector<std::pair<uintptr_t, int64_t>>& allowed) {
    Words4 words;
    for (const auto& [begin, bytes] : allowed) simt::allow(pointer<void>(begin), bytes);
    simt::launch(1, 32, 0, [&](unsigned char*) {
        if (thread_index() == 0) words = load_once(pointer<void>(address));
    });
    return {words.word, words.word + 4};
}

int32_t bits_of_all(int threads, uint64_t seed) {
    int32_t bits = 0;
    simt::launch(1, threads, 0, [&](unsigned char*) { atomic_or(&bits, 1 << thread_index() % 31); }, seed);
    return bits;
}

// Each warp writes, all read the sum: with the barrier that it needs, or without.
std::vector<int> sums_over_warps(int threads, bool barrier, uint64_t seed) {
    std::vector<int> sums(static_cast<size_t>(threads));
    simt::launch(
        1, threads, threads / 32 * 4,
        [&](unsigned char* shared) {
            int* const numbers = reinterpret_cast<int*>(shared);
            const int t = thread_index();
            if (t % 32 == 0) numbers[t / 32] = t / 32 + 1;
            if (barrier) sync_block();
            for (int warp = 0; warp < threads / 32; ++warp) sums[t] += numbers[warp];
        },
        seed);
    return sums;
}

// Two halves of the block pass `rounds` numbers on by named barriers, as producers and consumers do.
std::vector<int> passed_on(int rounds, uint64_t seed) {
    std::vector<int> passed;
    simt::launch(
        1, 128, 4,
        [&](unsigned char* shared) {
            int* const slot = reinterpret_cast<int*>(shared);
            for (int round = 0; round < rounds; ++round) {
                if (thread_index() == 0) *slot = round;
                sync_some(1, 128);
                if (thread_index() == 64) passed.push_back(*slot);
                if (thread_index() >= 64) sync_some(3, 64);
                sync_some(2, 128);
            }
        },
        seed);
    return passed;
}

// The order in which threads come to their second step.
std::vector<int> order_of_threads(uint64_t seed) {
    std::vector<int> order;
    simt::launch(
        1, 128, 0,
        [&](unsigned char*) {
            sync_warp();
            order.push_back(thread_index());
        },
        seed);
    return order;
}

// Every block writes its rank into the next one's shared memory and reads what it got.
std::vector<int> around_the_cluster(int64_t grid, int cluster, uint64_t seed) {
    std::vector<int> got(static_cast<size_t>(grid));
    simt::launch_cluster(
        grid, cluster, 64, 16,
        [&](unsigned char* shared) {
            struct Arrivals {
                int count = 0;
            };
            if (thread_index() == 0) {
                const int next = (simt::cluster_rank() + 1) % simt::cluster_size();
                const int rank = simt::cluster_rank();
                std::memcpy(simt::at(simt::cluster_address(shared_address(shared + 4), next), 4), &rank, 4);
                ++simt::block().cluster->blocks[next]->state<Arrivals>().count;
                simt::Block& block = simt::block();
                simt::wait_until([&] { return block.state<Arrivals>().count == 1; }, "the neighbour");
                std::memcpy(&got[block_index()], shared + 4, 4);
            }
            sync_block();
        },
        seed);
    return got;
}

// All threads of a warpgroup take the sum of what they bring.
std::vector<int> sums_over_groups(int threads, uint64_t seed) {
    std::vector<int> sums(static_cast<size_t>(threads));
    simt::launch(
        1, threads, 0,
        [&](unsigned char*) {
            int mine = thread_index();
            simt::together<128>("sum", 0, mine, [](simt::Members<int> all) {
                int sum = 0;
                for (int i = 0; i < 128; ++i) sum += all[i];
                for (int i = 0; i < 128; ++i) all[i] = sum;
            });
            sums[thread_index()] = mine;
        },
        seed);
    return sums;
}

// How many of 64 things under way are done when a thread looks after some steps, and when it has waited for all.
std::pair<int, int> done_later(uint64_t seed) {
    int done = 0, early = 0, waited = 0;
    simt::launch(
        1, 32, 0,
        [&](unsigned char*) {
            if (thread_index() == 0) {
                for (int i = 0; i < 64; ++i) simt::later([&] { ++done; });
                for (int i = 0; i < 4; ++i) simt::yield();
                early = done;
                simt::wait_until([&] { return done == 64; }, "what is under way");
                waited = done;
            }
        },
        seed);
    return {early, waited};
}

alignas(16) const unsigned char kSource[16] = {};

// Every warp copies 512 bytes.
void copy_by_warp(unsigned char* shared) {
    copy_async_16(shared_address(shared) + static_cast<uint32_t>(thread_index() * 16), kSource, 16);
    copy_async_commit();
}
// Every warp reads what warp `warp` copied.
void read_of_warp(unsigned char* shared, int warp) {
    uint32_t words[4];
    load_matrices(words, shared_address(shared) + static_cast<uint32_t>((warp * 32 + thread_index() % 32) * 16));
}

// Warps read what others copied and copy again, with all the barriers that this takes.
void run_without_races(uint64_t seed) {
    simt::launch(
        2, 96, 96 * 16,
        [](unsigned char* shared) {
            const int warp = thread_index() / 32;
            for (int round = 0; round < 10; ++round) {
                copy_by_warp(shared);
                copy_async_wait<0>();
                sync_block();
                read_of_warp(shared, (warp + round) % 3);
                sync_block();
                // Two of the three among themselves.
                if (warp == 2) continue;
                copy_by_warp(shared);
                copy_async_wait<0>();
                sync_some(1, 64);
                read_of_warp(shared, 1 - warp);
                sync_some(2, 64);
            }
        },
        seed);
}

// Kernels that are wrong, by what is wrong with them.
const std::map<std::string, void (*)(unsigned char*)> kWrong = {
    {"some threads skip a barrier",
     [](unsigned char*) {
         if (thread_index() < 32) sync_block();
     }},
    {"half a warp at a barrier",
     [](unsigned char*) {
         if (thread_index() % 32 < 16) sync_block();
     }},
    {"different functions in a warp", [](unsigned char*) { thread_index() % 2 ? sync_warp() : void(any_lane(true)); }},
    {"different masks in a warp", [](unsigned char*) { shuffle_xor(1.0f, thread_index() % 2 + 1); }},
    {"different counts at a barrier", [](unsigned char*) { sync_some(1, thread_index() < 32 ? 32 * 2 : 32 * 3); }},
    {"a barrier for more threads than there are", [](unsigned char*) { sync_some(1, 32 * 5); }},
    {"barrier 16", [](unsigned char*) { sync_some(16, 32); }},
    {"barrier 0 by number", [](unsigned char*) { sync_some(0, 32); }},
    {"a copy past the end", [](unsigned char* s) { copy_async_16(shared_address(s) + 4096, s, 16); }},
    {"a copy before the start", [](unsigned char*) { copy_async_16(16, nullptr, 0); }},
    {"a misaligned copy", [](unsigned char* s) { copy_async_16(shared_address(s) + 8, s, 16); }},
    {"a misaligned source", [](unsigned char* s) { copy_async_16(shared_address(s), s + 8, 8); }},
    {"a copy of 17 bytes", [](unsigned char* s) { copy_async_16(shared_address(s), s, 17); }},
    {"matrices past the end",
     [](unsigned char* s) {
         uint32_t words[4];
         load_matrices(words, shared_address(s) + 4096);
     }},
    {"misaligned matrices",
     [](unsigned char* s) {
         uint32_t words[4];
         load_matrices_transposed(words, shared_address(s) + 2);
     }},
    {"a misaligned load", [](unsigned char* s) { load_once(s + 4); }},
    {"writing past the end", [](unsigned char* s) { s[4096] = 1; }},
    {"writing before the start", [](unsigned char* s) { s[-1] = 1; }},
    {"an address elsewhere",
     [](unsigned char*) {
         int elsewhere;
         shared_address(&elsewhere);
     }},
    {"another block's memory without a cluster",
     [](unsigned char* s) { simt::at(simt::cluster_address(shared_address(s), 1), 4); }},
    {"waiting for what never comes",
     [](unsigned char*) {
         if (thread_index() == 7) simt::wait_until([] { return false; }, "Godot", 2);
     }},
    {"a launch inside a launch", [](unsigned char*) { simt::launch(1, 32, 0, [](unsigned char*) {}); }},
    {"half a warpgroup",
     [](unsigned char*) {
         int nothing = 0;
         simt::together<128>("half", 0, nothing, [](simt::Members<int>) {});
     }},
    {"reading what was not waited for",
     [](unsigned char* s) {
         copy_by_warp(s);
         sync_block();
         read_of_warp(s, thread_index() / 32);
     }},
    {"reading what another warp did not wait for",
     [](unsigned char* s) {
         copy_by_warp(s);
         if (thread_index() >= 32) copy_async_wait<0>();
         sync_block();
         read_of_warp(s, 0);
     }},
    {"waiting for too few groups",
     [](unsigned char* s) {
         copy_by_warp(s);
         copy_async_wait<1>();
         sync_block();
         read_of_warp(s, 1);
     }},
    {"reading without a barrier after the wait",
     [](unsigned char* s) {
         copy_by_warp(s);
         sync_block();
         copy_async_wait<0>();
         read_of_warp(s, 1);
     }},
    {"reading after the wrong barrier",
     [](unsigned char* s) {
         copy_by_warp(s);
         copy_async_wait<0>();
         sync_some(1 + thread_index() / 32, 32);
         read_of_warp(s, 1);
     }},
    {"copying again what others still read",
     [](unsigned char* s) {
         copy_by_warp(s);
         copy_async_wait<0>();
         sync_block();
         read_of_warp(s, 1);
         copy_by_warp(s);
     }},
    {"copying twice to one place",
     [](unsigned char* s) {
         copy_by_warp(s);
         copy_by_warp(s);
     }},
    {"throwing",
     [](unsigned char*) {
         if (thread_index() == 40) throw std::out_of_range("thrown by the kernel");
     }},
};

void run_wrong(const std::string& name, uint64_t seed) { simt::launch(2, 96, 4096, kWrong.at(name), seed); }

// How many of the objects that 96 threads made are left after a launch that fails while they wait.
int left_after_failure(uint64_t seed) {
    int alive = 0;
    struct Counted {
        explicit Counted(int* count) : count(count) { ++*count; }
        ~Counted() { --*count; }
        int* count;
    };
    try {
        simt::launch(
            1, 96, 0,
            [&](unsigned char*) {
                const Counted mine(&alive);
                sync_block();
                if (thread_index() == 50) throw std::runtime_error("on purpose");
                sync_block();
            },
            seed);
    } catch (const std::runtime_error&) {
        return alive;
    }
    return -1;
}

}  // namespace

PYBIND11_MODULE(simt_check, module) {
    module.def("shuffle_float", shuffle<float>);
    module.def("shuffle_double", shuffle<double>);
    module.def("any_of_lanes", any_of_lanes);
    module.def("who_am_i", who_am_i);
    module.def("matrices", matrices);
    module.def("product_bfloat16", product<BFloat16>);
    module.def("product_float16", product<Float16>);
    module.def("to_bits", to_bits);
    module.def("from_bits", from_bits);
    module.def("parts_of_word", parts_of_word);
    module.def("partial_copies", partial_copies);
    module.def("groups_seen", groups_seen);
    module.def("loaded_once", loaded_once);
    module.def("bits_of_all", bits_of_all);
    module.def("sums_over_warps", sums_over_warps);
    module.def("passed_on", passed_on);
    module.def("order_of_threads", order_of_threads);
    module.def("around_the_cluster", around_the_cluster);
    module.def("sums_over_groups", sums_over_groups);
    module.def("done_later", done_later);
    module.def("run_without_races", run_without_races);
    module.def("run_wrong", run_wrong);
    module.def("left_after_failure", left_after_failure);
    module.def("launch", [](int64_t grid, int cluster, int threads, int64_t shared) {
        simt::launch_cluster(grid, cluster, threads, shared, [](unsigned char*) {});
    });
    module.def("outside_of_a_kernel", [] { return thread_index(); });
    module.def("names_of_wrong", [] {
        std::vector<std::string> names;
        for (const auto& [name, kernel] : kWrong) names.push_back(name);
        return names;
    });
}
