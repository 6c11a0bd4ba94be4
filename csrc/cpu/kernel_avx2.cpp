// Compiled with AVX2 and FMA: 12 of 16 registers hold the micro-tile.
#define TIKMIX_FAST_VECTOR_BYTES 32
#define TIKMIX_FAST_MICRO_ROWS 6
#include "kernel.h"

const tikmix_fast::Kernel tikmix_fast::avx2_kernel = {"avx2",     kMicroRows,     kMicroColumns, kRowsTogether,
                                                      nullptr,    packed_element, pack_queries,  pack_grad_output,
                                                      pack_input, accumulate_tile};
