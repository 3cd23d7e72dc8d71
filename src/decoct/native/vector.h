// Sixteen lanes of float and int32, and the few operations that instruction levels do differently.
// The compiler splits them into registers of the level's width, so all levels share the code of kernels.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DECOCT_INLINE inline __attribute__((always_inline))

namespace decoct {
namespace DECOCT_LEVEL {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

template <class V>
DECOCT_INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
DECOCT_INLINE void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

// Codes are below 2**31, so they convert as signed numbers, which every level does in one instruction.
DECOCT_INLINE Floats to_floats(Words codes) { return __builtin_convertvector((Ints)codes, Floats); }

DECOCT_INLINE Floats from_bf16(Halves halves) {
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

DECOCT_INLINE Floats from_f16(Halves halves) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__AVX2__)
  Floats out;
  const __m128i* half = (const __m128i*)&halves;
  __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(half)), high = _mm256_cvtph_ps(_mm_loadu_si128(half + 1));
  memcpy(&out, &low, 32);
  memcpy((char*)&out + 32, &high, 32);
  return out;
#else
  // The difference of the exponents' biases is a factor of 2**112, right for subnormal numbers too; infinities and NaN
  // have all bits of the exponent set, before and after.
  const Words wide = __builtin_convertvector(halves, Words);
  const Words magnitude = (wide & 0x7fffu) << 13;
  const Words finite = (Words)((Floats)magnitude * 5.192296858534828e33f);
  const Words special = (Words)((wide & 0x7c00u) == 0x7c00u);
  return (Floats)((finite & ~special) | ((magnitude | 0x7f800000u) & special) | (wide & 0x8000u) << 16);
#endif
}

DECOCT_INLINE Halves to_bf16(Floats values) {
  const Words bits = (Words)values;
  const Words rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const Words quiet = bits | 0x400000u;  // a NaN stays one
  const Words nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector(((quiet & nan) | (rounded & ~nan)) >> 16, Halves);
}

DECOCT_INLINE Halves to_f16(Floats values) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  Halves out;
  __m256 half[2];
  memcpy(half, &values, 64);
  for (int i = 0; i < 2; ++i) {
    const __m128i packed = _mm256_cvtps_ph(half[i], _MM_FROUND_TO_NEAREST_INT);
    memcpy((char*)&out + 16 * i, &packed, 16);
  }
  return out;
#else
  // Adding a number whose last place is the half's last place rounds to it, ties to even.
  const Words bits = (Words)values, magnitude = bits & 0x7fffffffu;
  const Words exponent = magnitude & 0x7f800000u;
  const Words least = (Words)(exponent < 0x38800000u);
  const Words place = (exponent & ~least) | (0x38800000u & least);
  const Floats big = (Floats)(place + (13u << 23));
  const Words sum = (Words)((Floats)magnitude + big) - (Words)big;  // in units of the last place
  const Words normal = sum + ((place - 0x38800000u) >> 13);
  const Words special = (Words)(magnitude >= 0x7f800000u), huge = (Words)(normal >= 0x7c00u);
  const Words nan = (Words)(magnitude > 0x7f800000u);
  const Words top = 0x7c00u | (nan & 0x200u);
  const Words out = (normal & ~(special | huge)) | (top & (special | huge));
  return __builtin_convertvector(out | (bits >> 16 & 0x8000u), Halves);
#endif
}

// Sixteen values of a table by the low four bits of each lane; the bits above them do not matter.
struct Table {
#if defined(__AVX512F__)
  __m512 entries;
  DECOCT_INLINE explicit Table(const float* from) : entries(_mm512_loadu_ps(from)) {}
  DECOCT_INLINE Floats operator[](Words index) const {
    return (Floats)_mm512_permutexvar_ps((__m512i)index, entries);
  }
#elif defined(__AVX2__)
  __m256 low, high;
  DECOCT_INLINE explicit Table(const float* from) : low(_mm256_loadu_ps(from)), high(_mm256_loadu_ps(from + 8)) {}
  DECOCT_INLINE Floats operator[](Words index) const {
    Floats out;
    __m256i half[2];
    memcpy(half, &index, 64);
    for (int i = 0; i < 2; ++i) {
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(half[i], 28));
      const __m256 found = _mm256_blendv_ps(
          _mm256_permutevar8x32_ps(low, half[i]), _mm256_permutevar8x32_ps(high, half[i]), upper);
      memcpy((char*)&out + 32 * i, &found, 32);
    }
    return out;
  }
#else
  const float* entries;
  DECOCT_INLINE explicit Table(const float* from) : entries(from) {}
  DECOCT_INLINE Floats operator[](Words index) const {
    Floats out;
    for (int i = 0; i < 16; ++i) out[i] = entries[index[i] & 15u];
    return out;
  }
#endif
};

// Whether looking integers up in a table is faster than converting them.
#if defined(__AVX512F__)
constexpr bool kLookUpIntegers = true;
#else
constexpr bool kLookUpIntegers = false;
#endif

DECOCT_INLINE Floats load_numbers(const void* from, int64_t first, int32_t type) {
  const char* bytes = (const char*)from;
  switch (type) {
    case DECOCT_F32: return load<Floats>(bytes + 4 * first);
    case DECOCT_F16: return from_f16(load<Halves>(bytes + 2 * first));
    case DECOCT_BF16: return from_bf16(load<Halves>(bytes + 2 * first));
    default: return to_floats(__builtin_convertvector(load<Bytes>(bytes + first), Words));
  }
}

DECOCT_INLINE void store_numbers(void* to, int64_t first, int32_t type, Floats values) {
  char* bytes = (char*)to;
  switch (type) {
    case DECOCT_F32: store(bytes + 4 * first, values); return;
    case DECOCT_F16: store(bytes + 2 * first, to_f16(values)); return;
    default: store(bytes + 2 * first, to_bf16(values)); return;
  }
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

DECOCT_INLINE float sum_lanes(Floats v) {
  const Eight eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

constexpr int kSizes[] = {4, 2, 2, 1, 2, 4};  // bytes of each DecoctType

// The same as functions of their own, for what is done once for many codes.
__attribute__((noinline)) Floats numbers_at(const void* from, int64_t first, int32_t type) {
  return load_numbers(from, first, type);
}

__attribute__((noinline)) void put_numbers(void* to, int64_t first, int32_t type, const Floats& values) {
  store_numbers(to, first, type, values);
}

// As `store_numbers`, of the first `count` lanes alone.
DECOCT_INLINE void store_some(void* to, int64_t first, int32_t type, Floats values, int64_t count) {
  if (count >= 16) return put_numbers(to, first, type, values);
  char lanes[64];
  put_numbers(lanes, 0, type, values);
  memcpy((char*)to + kSizes[type] * first, lanes, kSizes[type] * count);
}

// As `load_numbers`, of the first `count` lanes alone; the others are zero.
DECOCT_INLINE Floats load_some(const void* from, int64_t first, int32_t type, int64_t count) {
  if (count >= 16) return numbers_at(from, first, type);
  char lanes[64] = {};
  memcpy(lanes, (const char*)from + kSizes[type] * first, kSizes[type] * count);
  return numbers_at(lanes, 0, type);
}

#if defined(__AVX512F__)
constexpr int upper_lane(int step, int lane) { return lane & step ? 16 + lane - step : lane; }
constexpr int lower_lane(int step, int lane) { return lane & step ? 16 + lane : lane + step; }

#define DECOCT_LANES(pick)                                                                                           \
  pick(STEP, 0), pick(STEP, 1), pick(STEP, 2), pick(STEP, 3), pick(STEP, 4), pick(STEP, 5), pick(STEP, 6),           \
      pick(STEP, 7), pick(STEP, 8), pick(STEP, 9), pick(STEP, 10), pick(STEP, 11), pick(STEP, 12), pick(STEP, 13),   \
      pick(STEP, 14), pick(STEP, 15)

// One step of a transposition: two rows that are STEP apart exchange what lies STEP lanes beside the diagonal.
template <int STEP>
DECOCT_INLINE void exchange(Floats& upper, Floats& lower) {
  const Floats a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, DECOCT_LANES(upper_lane));
  lower = __builtin_shufflevector(a, b, DECOCT_LANES(lower_lane));
}

template <int STEP>
DECOCT_INLINE void exchange_all(Floats (&block)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & STEP)) exchange<STEP>(block[i], block[i + STEP]);
}

__attribute__((noinline)) void transpose(Floats (&block)[16]) {
  exchange_all<8>(block);
  exchange_all<4>(block);
  exchange_all<2>(block);
  exchange_all<1>(block);
}
#else
__attribute__((noinline)) void transpose(Floats (&block)[16]) {
  float* entries = (float*)block;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < i; ++k) {
      const float entry = entries[16 * i + k];
      entries[16 * i + k] = entries[16 * k + i];
      entries[16 * k + i] = entry;
    }
}
#endif

}  // namespace DECOCT_LEVEL
}  // namespace decoct
