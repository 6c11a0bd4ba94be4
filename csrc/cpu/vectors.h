// Vectors of float32 of the instruction set, and the elements that become them.
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace {

using tikmix_fast::divide_up;
using tikmix_fast::Element;

constexpr int kLanes = TIKMIX_FAST_VECTOR_BYTES / sizeof(float);

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef float Quad __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t QuadLanes __attribute__((vector_size(4 * sizeof(int32_t))));
typedef double WideQuad __attribute__((vector_size(4 * sizeof(double))));

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "same bits");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

// Both work on one number and on a vector of them; Words are of uint32_t, Floats of float.
template <class Floats, class Words>
inline Floats widen_bfloat16(Words bits) {
    return bits_as<Floats>(bits << 16);
}

template <class Floats, class Words>
inline Floats widen_float16(Words bits) {
    const Words magnitude = bits & 0x7fff;
    // The exponents' biases differ by 112. Multiplying, not adding, is exact for denormals as well.
    const Words finite = bits_as<Words>(bits_as<Floats>(magnitude << 13) * 0x1p112f);
    // The exponent of infinity and NaN, and no other, carries over.
    const Words infinite = ((magnitude + 0x400) >> 15) * 0x7f800000;
    return bits_as<Floats>(finite | infinite | (bits & 0x8000) << 16);
}

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) { return widen_bfloat16<float, uint32_t>(value.bits); }
inline float to_float(Float16 value) { return widen_float16<float, uint32_t>(value.bits); }

inline Bits load_bits(const void* source) {
#if TIKMIX_FAST_VECTOR_BYTES == 64
    // GCC 12 makes four instructions of the conversion below.
    return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(source)));
#else
    HalfBits half;
    memcpy(&half, source, sizeof half);
    return __builtin_convertvector(half, Bits);
#endif
}

inline Vector load_vector(const float* source) {
    Vector result;
    memcpy(&result, source, sizeof result);
    return result;
}

inline Vector load_vector(const Bfloat16* source) { return widen_bfloat16<Vector>(load_bits(source)); }
inline Vector load_vector(const Float16* source) { return widen_float16<Vector>(load_bits(source)); }

inline void store(float* target, Vector value) { memcpy(target, &value, sizeof value); }

// Calls use(element of the dtype) to choose a template by the dtype.
template <class Use>
void with_element(Element element, Use use) {
    if (element == Element::bfloat16) {
        use(Bfloat16{});
    } else if (element == Element::float16) {
        use(Float16{});
    } else {
        use(0.0f);
    }
}

// Four partial sums of the lanes.
inline Quad fold(Vector value) {
#if TIKMIX_FAST_VECTOR_BYTES == 64
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)value), _mm512_extractf32x8_ps((__m512)value, 1));
    return (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif TIKMIX_FAST_VECTOR_BYTES == 32
    return (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
#else
    return value;
#endif
}

#if defined(__clang__)
#define TIKMIX_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TIKMIX_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadLanes{__VA_ARGS__})
#endif

// The sum of each of four quads.
inline Quad sums_of(const Quad (&quads)[4]) {
    const Quad first =
        TIKMIX_FAST_SHUFFLE(quads[0], quads[1], 0, 1, 4, 5) + TIKMIX_FAST_SHUFFLE(quads[0], quads[1], 2, 3, 6, 7);
    const Quad second =
        TIKMIX_FAST_SHUFFLE(quads[2], quads[3], 0, 1, 4, 5) + TIKMIX_FAST_SHUFFLE(quads[2], quads[3], 2, 3, 6, 7);
    return TIKMIX_FAST_SHUFFLE(first, second, 0, 2, 4, 6) + TIKMIX_FAST_SHUFFLE(first, second, 1, 3, 5, 7);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
