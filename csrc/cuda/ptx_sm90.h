// What only sm_90a has: barriers that count bytes, bulk copies by tensor map, products by warpgroup, clusters. As with
// ptx.h, the tests bring the same functions for a CPU (tests/native/simt_sm90.h).
//
// Shared memory is read by the tensor cores and written by bulk copies through the "async proxy". What threads write
// themselves, cp.async included, is seen there only after fence_async_proxy by the thread that wrote and a barrier.
#pragma once

#include "ptx.h"

#ifdef TIKMIX_FAST_SIMULATED
#include "simt_sm90.h"
#else

namespace tikmix_fast::gpu {

// A CUtensorMap, made by the host.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// Barriers in shared memory: a phase ends when `arrivals` arrivals and all bytes expected in it have come, and the next
// begins. A waiter names the parity of the phase (0, 1, 0, ...) whose end it waits for; the phase before the first
// counts as ended.
TIKMIX_FAST_DEVICE void barrier_init(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Shows this thread's barriers to the other blocks of the cluster and to bulk copies, once followed by a sync.
TIKMIX_FAST_DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}
TIKMIX_FAST_DEVICE void barrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, after adding to the bytes that the phase waits for.
TIKMIX_FAST_DEVICE void barrier_arrive_expect(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster, which may be this one. It says that reads are over, and
// shows no writes to the other block: release and acquire at the scope of the cluster would, at the price of a fence of
// the whole GPU before every arrival (MEMBAR.ALL.GPU) and of the L1 cache after every wait (CCTL.IVALL).
TIKMIX_FAST_DEVICE void barrier_arrive_at(SharedAddress barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cta.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
// Waits for arrivals and bytes.
TIKMIX_FAST_DEVICE void barrier_wait(SharedAddress barrier, uint32_t parity) {
    uint32_t ended;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(ended)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!ended);
}
// What this thread wrote to shared memory before is seen by bulk copies and products that others start after a barrier.
TIKMIX_FAST_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

TIKMIX_FAST_DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Copies the box whose first element is (row, column) to shared memory, zeros where it leaves the matrix, and takes its
// bytes off what the barrier's phase waits for. One thread calls it.
TIKMIX_FAST_DEVICE void copy_box(SharedAddress to, const TensorMap& map, int column, int row, SharedAddress barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// The same into every block of the cluster whose bit is set in `blocks`, at the same addresses there.
TIKMIX_FAST_DEVICE void copy_box_to_blocks(SharedAddress to, const TensorMap& map, int column, int row,
                                           SharedAddress barrier, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
        : "memory");
}

TIKMIX_FAST_DEVICE int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}
// Waits for all threads of the cluster; what they wrote and where they arrived before is seen after.
TIKMIX_FAST_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Takes registers from the pool of the block, or gives them back; a whole warpgroup calls it.
template <int registers>
TIKMIX_FAST_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
TIKMIX_FAST_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// The accumulators of a warpgroup's 64 x 256 products: place_of_register(256, lane, 4 block + i) is [block][i].
using ProductTile = float[32][4];

// The 128 of them as operands of an asm statement.
#define TIKMIX_FAST_4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TIKMIX_FAST_16(d, i) \
    TIKMIX_FAST_4(d, i), TIKMIX_FAST_4(d, (i) + 1), TIKMIX_FAST_4(d, (i) + 2), TIKMIX_FAST_4(d, (i) + 3)
#define TIKMIX_FAST_64(d, i) \
    TIKMIX_FAST_16(d, i), TIKMIX_FAST_16(d, (i) + 4), TIKMIX_FAST_16(d, (i) + 8), TIKMIX_FAST_16(d, (i) + 12)
#define TIKMIX_FAST_128(d) TIKMIX_FAST_64(d, 0), TIKMIX_FAST_64(d, 16)

// Products run on their own between products_begin and products_wait, and nothing may touch the accumulators then. The
// two name them, so that the compiler moves no access across.
TIKMIX_FAST_DEVICE void products_begin(ProductTile& d) {
    asm volatile("wgmma.fence.sync.aligned;" : TIKMIX_FAST_128(d) : : "memory");
}
TIKMIX_FAST_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most one committed group is under way: what those before it read may be overwritten.
TIKMIX_FAST_DEVICE void products_wait_but_one() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
TIKMIX_FAST_DEVICE void products_wait(ProductTile& d) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : TIKMIX_FAST_128(d) : : "memory");
}

// d += a b, 64 x 16 times 16 x 256, summed in float32; a whole warpgroup calls it. Both operands lie row by row of K in
// shared memory, the "transposed" order of wgmma; for the descriptors see swizzle128.h.
#define TIKMIX_FAST_PRODUCT(element)                                                                         \
    asm volatile(                                                                                            \
        "{\n"                                                                                                \
        ".reg .pred add;\n"                                                                                  \
        "setp.eq.u32 add, 0, 0;\n"                                                                           \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." element "." element                                   \
        "\n"                                                                                                 \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,\n"                           \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,\n"                  \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,\n"                  \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,\n"                  \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,\n"                  \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,\n"                  \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,\n"      \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127},\n" \
        "%128, %129, add, 1, 1, 1, 1;\n"                                                                     \
        "}"                                                                                                  \
        : TIKMIX_FAST_128(d)                                                                                 \
        : "l"(a), "l"(b)                                                                                     \
        : "memory")
TIKMIX_FAST_DEVICE void multiply_add(BFloat16, ProductTile& d, uint64_t a, uint64_t b) { TIKMIX_FAST_PRODUCT("bf16"); }
TIKMIX_FAST_DEVICE void multiply_add(Float16, ProductTile& d, uint64_t a, uint64_t b) { TIKMIX_FAST_PRODUCT("f16"); }

#undef TIKMIX_FAST_PRODUCT
#undef TIKMIX_FAST_128
#undef TIKMIX_FAST_64
#undef TIKMIX_FAST_16
#undef TIKMIX_FAST_4

}  // namespace tikmix_fast::gpu

#endif
