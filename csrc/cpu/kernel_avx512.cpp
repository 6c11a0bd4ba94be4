// Compiled with AVX-512 F, BW, DQ and VL: 24 of 32 registers hold the micro-tile.
#define TIKMIX_FAST_VECTOR_BYTES 64
#define TIKMIX_FAST_MICRO_ROWS 12
#include "kernel.h"

const tikmix_fast::Kernel tikmix_fast::avx512_kernel = {"avx512",   kMicroRows,     kMicroColumns, kRowsTogether,
                                                        nullptr,    packed_element, pack_queries,  pack_grad_output,
                                                        pack_input, accumulate_tile};
