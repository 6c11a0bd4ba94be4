// Every function of ptx.h for a CPU. Threads of a block are fibers; see simt_machine.h for how they run and for launch.
//
// Stricter than a GPU: threads of a warp that come to different warp-wide functions, a barrier that not everyone
// reaches, misaligned and foreign addresses are errors. An asynchronous copy leaves NaN where it will write until it is
// waited for, or until a random earlier moment.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt_machine.h"
#include "target.h"

namespace tikmix_fast::gpu {

using SharedAddress = uint32_t;

struct alignas(16) Words4 {
    uint32_t word[4];
};

inline int thread_index() { return simt::thread().index; }
inline int opaque(int number) { return number; }
inline int64_t block_index() { return simt::block().index; }
inline int64_t block_count() { return simt::machine->grid; }

inline void sync_block() {
    simt::perhaps_copy(simt::thread());
    simt::wait_at_barrier("sync_block", 0, static_cast<int>(simt::block().threads.size()));
}
inline void sync_some(int barrier, int threads) {
    simt::perhaps_copy(simt::thread());
    if (barrier == 0) simt::fail("barrier 0 is sync_block's");
    simt::wait_at_barrier("sync_some", barrier, threads);
}
inline void sync_warp() {
    struct Nothing {
    } nothing;
    simt::perhaps_copy(simt::thread());
    simt::together<simt::kLanes>("sync_warp", 0, nothing, [](simt::Members<Nothing>) {});
}

template <class Number>
Number shuffle_xor_of(Number value, int mask) {
    struct Exchange {
        Number given, taken;
    } mine = {value, {}};
    if (mask < 0 || mask >= simt::kLanes) simt::fail("shuffle_xor by " + std::to_string(mask));
    simt::together<simt::kLanes>(sizeof(Number) == 4 ? "shuffle_xor of float" : "shuffle_xor of double", mask, mine,
                                 [mask](simt::Members<Exchange> lanes) {
                                     for (int lane = 0; lane < simt::kLanes; ++lane) {
                                         lanes[lane].taken = lanes[lane ^ mask].given;
                                     }
                                 });
    return mine.taken;
}
inline float shuffle_xor(float value, int mask) { return shuffle_xor_of(value, mask); }
inline double shuffle_xor(double value, int mask) { return shuffle_xor_of(value, mask); }

inline bool any_lane(bool predicate) {
    simt::together<simt::kLanes>("any_lane", 0, predicate, [](simt::Members<bool> lanes) {
        bool any = false;
        for (int lane = 0; lane < simt::kLanes; ++lane) any |= lanes[lane];
        for (int lane = 0; lane < simt::kLanes; ++lane) lanes[lane] = any;
    });
    return predicate;
}

inline void atomic_or(int32_t* address, int32_t bits) { *address |= bits; }

inline SharedAddress shared_address(const void* pointer) {
    const simt::Arena& arena = simt::block().arena;
    const int64_t offset = static_cast<const unsigned char*>(pointer) - arena.data();
    if (offset < 0 || offset > arena.bytes()) simt::fail("shared_address of what is not in the block's shared memory");
    return simt::kSharedStart + static_cast<SharedAddress>(offset);
}

inline void copy_async_16(SharedAddress to, const void* from, int bytes) {
    simt::Thread& thread = simt::thread();
    if (bytes < 0 || bytes > 16) simt::fail("copy_async_16 of " + std::to_string(bytes) + " bytes");
    if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) simt::fail("copy_async_16 needs an aligned source");
    simt::check_readable("copy_async_16", from, bytes);
    unsigned char* const place = simt::at_aligned("copy_async_16", to, 16, 16);
    simt::note_write_under_way("copy_async_16", place);
    std::memset(place, 0xff, 16);
    thread.copies.push_back({place, from, bytes, thread.group, false});
    simt::block().writers[(place - simt::block().arena.data()) / 16] = {&thread, ++thread.copies_started};
    simt::perhaps_copy(thread);
}

inline void copy_async_commit() {
    simt::Thread& thread = simt::thread();
    ++thread.group;
    simt::perhaps_copy(thread);
}

template <int groups>
void copy_async_wait() {
    simt::Thread& thread = simt::thread();
    const auto under_way = std::find_if(thread.copies.begin(), thread.copies.end(),
                                        [&](const simt::Copy& copy) { return copy.group >= thread.group - groups; });
    std::for_each(thread.copies.begin(), under_way, [](simt::Copy& copy) {
        simt::perform(copy);
        simt::note_written(copy.to);
    });
    thread.copies.erase(thread.copies.begin(), under_way);
    if (simt::random().below(16) == 0) simt::yield();
}

struct MatrixRow {
    const unsigned char* row;
    uint32_t (&words)[4];
};

inline void load_matrices(uint32_t (&words)[4], SharedAddress row) {
    simt::perhaps_copy(simt::thread());
    MatrixRow mine = {simt::at_aligned("load_matrices", row, 16, 16), words};
    simt::together<simt::kLanes>("load_matrices", 0, mine, [](simt::Members<MatrixRow> lanes) {
        for (int lane = 0; lane < simt::kLanes; ++lane) simt::note_read("load_matrices", lanes[lane].row);
        for (int lane = 0; lane < simt::kLanes; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                std::memcpy(&lanes[lane].words[matrix], lanes[matrix * 8 + lane / 4].row + lane % 4 * 4, 4);
            }
        }
    });
}

inline void load_matrices_transposed(uint32_t (&words)[4], SharedAddress row) {
    simt::perhaps_copy(simt::thread());
    MatrixRow mine = {simt::at_aligned("load_matrices_transposed", row, 16, 16), words};
    simt::together<simt::kLanes>("load_matrices_transposed", 0, mine, [](simt::Members<MatrixRow> lanes) {
        for (int lane = 0; lane < simt::kLanes; ++lane) simt::note_read("load_matrices_transposed", lanes[lane].row);
        const auto element = [&](int matrix, int row, int column) {
            uint16_t bits;
            std::memcpy(&bits, lanes[matrix * 8 + row].row + column * 2, 2);
            return uint32_t{bits};
        };
        for (int lane = 0; lane < simt::kLanes; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int row = lane % 4 * 2, column = lane / 4;
                lanes[lane].words[matrix] = element(matrix, row, column) | element(matrix, row + 1, column) << 16;
            }
        }
    });
}

inline float as_float(uint32_t word) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline uint32_t as_word(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return word;
}
inline float low_bfloat16(uint32_t word) { return as_float(word << 16); }
inline float high_bfloat16(uint32_t word) { return as_float(word & 0xffff0000u); }
inline float from_bfloat16(uint16_t bits) { return as_float(uint32_t{bits} << 16); }
inline float from_float16(uint16_t bits) {
    // The exponent moves to where float32 has it; the product sets its bias right, for subnormal numbers, too.
    float magnitude = as_float((bits & 0x7fffu) << 13) * 0x1p112f;
    if (magnitude >= 65536) magnitude = as_float(as_word(magnitude) | 0x7f800000u);
    return as_float(as_word(magnitude) | (bits & 0x8000u) << 16);
}

inline uint16_t bfloat16_bits(float value) {
    const uint32_t word = as_word(value);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline uint16_t float16_bits(float value) {
    const uint32_t sign = as_word(value) >> 16 & 0x8000, word = as_word(value) & 0x7fffffff;
    const float magnitude = as_float(word);
    uint32_t bits;
    if (std::isnan(value)) return 0x7fff;
    if (magnitude >= 65520) {
        bits = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
        bits = static_cast<uint32_t>(std::lrint(magnitude * 0x1p24f));
    } else {
        bits = (word + 0xfff + (word >> 13 & 1) - (112u << 23)) >> 13;
    }
    return static_cast<uint16_t>(sign | bits);
}

struct BFloat16 {
    static constexpr const char* kMultiplyAdd = "multiply_add of bfloat16";
    static float value(uint32_t bits) { return as_float(bits << 16); }
};
struct Float16 {
    static constexpr const char* kMultiplyAdd = "multiply_add of float16";
    static float value(uint32_t bits) { return from_float16(static_cast<uint16_t>(bits)); }
};

template <class Element>
void multiply_add(Element, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    typedef float Four __attribute__((vector_size(16)));
    struct Fragments {
        float (&d)[4];
        const uint32_t (&a)[4];
        const uint32_t (&b)[2];
    } mine = {d, a, b};
    simt::together<simt::kLanes>(Element::kMultiplyAdd, 0, mine, [](simt::Members<Fragments> lanes) {
        float left[16][16];
        alignas(16) float right[16][8], sum[16][8];
        for (int lane = 0; lane < simt::kLanes; ++lane) {
            const Fragments& given = lanes[lane];
            const int row = lane / 4, pair = lane % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) {
                    left[row + i % 2 * 8][pair + i / 2 * 8 + half] = Element::value(given.a[i] >> half * 16 & 0xffff);
                }
                for (int i = 0; i < 2; ++i) {
                    right[pair + i * 8 + half][row] = Element::value(given.b[i] >> half * 16 & 0xffff);
                    sum[row + i * 8][pair + half] = given.d[i * 2 + half];
                }
            }
        }
        for (int row = 0; row < 16; ++row) {
            Four* const place = reinterpret_cast<Four*>(sum[row]);
            Four low = place[0], high = place[1];
            for (int k = 0; k < 16; ++k) {
                const Four* const factors = reinterpret_cast<const Four*>(right[k]);
                low += left[row][k] * factors[0];
                high += left[row][k] * factors[1];
            }
            place[0] = low;
            place[1] = high;
        }
        for (int lane = 0; lane < simt::kLanes; ++lane) {
            for (int i = 0; i < 4; ++i) lanes[lane].d[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        }
    });
}

inline Words4 load_once(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) simt::fail("load_once needs an address that 16 divides");
    simt::check_readable("load_once", address, 16);
    Words4 words;
    std::memcpy(&words, address, 16);
    return words;
}

}  // namespace tikmix_fast::gpu
