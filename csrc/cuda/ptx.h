// The instructions that CUDA C++ has no words for, each as a function. The tests define TIKMIX_FAST_SIMULATED and bring
// the same functions for a CPU (tests/native/simt.h), so that the kernels themselves run there.
#pragma once

#include "target.h"

#ifdef TIKMIX_FAST_SIMULATED
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace tikmix_fast::gpu {

using SharedAddress = uint32_t;

struct alignas(16) Words4 {
    uint32_t word[4];
};

TIKMIX_FAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same number, but what is computed from it is not computed before: no register holds it all through a loop.
TIKMIX_FAST_DEVICE int opaque(int number) {
    asm volatile("" : "+r"(number));
    return number;
}
TIKMIX_FAST_DEVICE int64_t block_index() { return blockIdx.x; }
TIKMIX_FAST_DEVICE int64_t block_count() { return gridDim.x; }
TIKMIX_FAST_DEVICE void sync_block() { __syncthreads(); }
TIKMIX_FAST_DEVICE void sync_warp() { __syncwarp(); }
// Waits for `threads` threads, whole warps, at barrier 1 ... 15.
TIKMIX_FAST_DEVICE void sync_some(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
TIKMIX_FAST_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
TIKMIX_FAST_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// Whether the predicate holds for a lane of the warp.
TIKMIX_FAST_DEVICE bool any_lane(bool predicate) { return __any_sync(0xffffffffu, predicate); }
TIKMIX_FAST_DEVICE void atomic_or(int32_t* address, int32_t bits) { atomicOr(address, bits); }

TIKMIX_FAST_DEVICE SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Copies the first `bytes` of 16 from device to shared memory and fills the rest with zeros; done when waited for.
// With bytes == 0 the source is not read.
TIKMIX_FAST_DEVICE void copy_async_16(SharedAddress to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
TIKMIX_FAST_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of this thread's committed groups are under way.
template <int groups>
TIKMIX_FAST_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lanes 8i ... 8i + 7 give the addresses of the rows of matrix i. Lane l gets,
// in word i, the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
TIKMIX_FAST_DEVICE void load_matrices(uint32_t (&words)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}
// The same of the transposed matrices: word i has the elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
TIKMIX_FAST_DEVICE void load_matrices_transposed(uint32_t (&words)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

struct BFloat16 {};
struct Float16 {};

// d += a b, 16 x 16 times 16 x 8, summed in float32. Fragments: PTX ISA, mma.m16n8k16.
TIKMIX_FAST_DEVICE void multiply_add(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
TIKMIX_FAST_DEVICE void multiply_add(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Sixteen bytes that no one writes while the kernel runs, past the L1 cache: they are read once.
TIKMIX_FAST_DEVICE Words4 load_once(const void* address) {
    Words4 words;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
                 : "l"(address));
    return words;
}

// The two halves of a word of bfloat16 numbers as float32, lower first.
TIKMIX_FAST_DEVICE float low_bfloat16(uint32_t word) { return __uint_as_float(word << 16); }
TIKMIX_FAST_DEVICE float high_bfloat16(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
TIKMIX_FAST_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }
// Rounds to nearest, ties to even.
TIKMIX_FAST_DEVICE uint16_t bfloat16_bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
TIKMIX_FAST_DEVICE uint16_t float16_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
TIKMIX_FAST_DEVICE float from_bfloat16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
TIKMIX_FAST_DEVICE float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

}  // namespace tikmix_fast::gpu

#endif
