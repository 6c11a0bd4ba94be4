// Compiled with AVX512-BF16 on top of what the AVX-512 kernel needs: two bfloat16 rows are multiplied at a time.
#define TIKMIX_FAST_VECTOR_BYTES 64
#define TIKMIX_FAST_MICRO_ROWS 12
#define TIKMIX_FAST_ROW_PAIRS
#include "kernel.h"

const tikmix_fast::Kernel tikmix_fast::avx512_bf16_kernel = {
    "avx512_bf16",  kMicroRows,   kMicroColumns,    kRowsTogether, &tikmix_fast::avx512_kernel,
    packed_element, pack_queries, pack_grad_output, pack_input,    accumulate_tile};
