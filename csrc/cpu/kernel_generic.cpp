// The baseline that every processor of this architecture runs: SSE2 on x86-64, NEON on aarch64.
#define TIKMIX_FAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define TIKMIX_FAST_MICRO_ROWS 12
#else
#define TIKMIX_FAST_MICRO_ROWS 6
#endif
#include "kernel.h"

const tikmix_fast::Kernel tikmix_fast::generic_kernel = {"generic",  kMicroRows,     kMicroColumns, kRowsTogether,
                                                         nullptr,    packed_element, pack_queries,  pack_grad_output,
                                                         pack_input, accumulate_tile};
