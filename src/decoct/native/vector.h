// Sixteen lanes of float and int32, and the few operations that instruction levels do differently: all levels share the rest.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DECOCT_INLINE inline __attribute__((always_inline))

#include "wide.h"

namespace decoct {
namespace DECOCT_LEVEL {

typedef float Four __attribute__((vector_size(16)));
#if defined(__AVX2__)
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));
typedef uint16_t EightHalves __attribute__((vector_size(16)));
typedef uint8_t EightBytes __attribute__((vector_size(8)));
#else
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint32_t FourWords __attribute__((vector_size(16)));
typedef uint16_t FourHalves __attribute__((vector_size(8)));
typedef uint8_t FourBytes __attribute__((vector_size(4)));
typedef Pair<Four> Eight;
typedef Pair<FourInts> EightInts;
typedef Pair<FourWords> EightWords;
typedef Pair<FourHalves> EightHalves;
typedef Pair<FourBytes> EightBytes;
#endif
#if defined(__AVX512F__)
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
#else
typedef Pair<Eight> Floats;
typedef Pair<EightInts> Ints;
typedef Pair<EightWords> Words;
typedef Pair<EightHalves> Halves;
typedef Pair<EightBytes> Bytes;
#endif

template <class V>
DECOCT_INLINE V load(const void* from) {
  if constexpr (IsPair<V>::value) {
    typedef decltype(V::low) Half;
    return {load<Half>(from), load<Half>((const char*)from + sizeof(Half))};
  } else {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
  }
}

template <class V>
DECOCT_INLINE void store(void* to, V v) {
  if constexpr (IsPair<V>::value) {
    store(to, v.low);
    store((char*)to + sizeof v.low, v.high);
  } else {
    memcpy(to, &v, sizeof v);
  }
}

// The same numbers in another type.
template <class To, class From>
DECOCT_INLINE To convert(From v) {
  if constexpr (IsPair<To>::value) {
    return {convert<decltype(To::low)>(v.low), convert<decltype(To::low)>(v.high)};
  } else {
    return __builtin_convertvector(v, To);
  }
}

// Lanes of one or the other, by comparisons.
template <class Mask, class V>
DECOCT_INLINE V pick(Mask mask, V yes, V no) {
  if constexpr (IsPair<V>::value) {
    return {pick(mask.low, yes.low, no.low), pick(mask.high, yes.high, no.high)};
  } else {
    return mask ? yes : no;
  }
}

DECOCT_INLINE Floats beside(Eight first, Eight second) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return {first, second};
#endif
}

// Codes are below 2**31, so they convert as signed numbers, which every level does in one instruction.
DECOCT_INLINE Floats to_floats(Words codes) { return convert<Floats>((Ints)codes); }

DECOCT_INLINE Floats from_bf16(Halves halves) {
  return (Floats)(convert<Words>(halves) << 16);
}

DECOCT_INLINE Floats from_f16(Halves halves) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__AVX2__)
  return {(Eight)_mm256_cvtph_ps((__m128i)halves.low), (Eight)_mm256_cvtph_ps((__m128i)halves.high)};
#else
  // The difference of the exponents' biases is a factor of 2**112, right for subnormal numbers too; infinities and NaN
  // have all bits of the exponent set, before and after.
  const Words wide = convert<Words>(halves);
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
  return convert<Halves>(((quiet & nan) | (rounded & ~nan)) >> 16);
}

DECOCT_INLINE Halves to_f16(Floats values) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return {(EightHalves)_mm256_cvtps_ph((__m256)values.low, _MM_FROUND_TO_NEAREST_INT),
          (EightHalves)_mm256_cvtps_ph((__m256)values.high, _MM_FROUND_TO_NEAREST_INT)};
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
  return convert<Halves>(out | (bits >> 16 & 0x8000u));
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
  DECOCT_INLINE Eight eight(__m256i index) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return (Eight)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
  }
  DECOCT_INLINE Floats operator[](Words index) const { return {eight((__m256i)index.low), eight((__m256i)index.high)}; }
#else
  const float* entries;
  DECOCT_INLINE explicit Table(const float* from) : entries(from) {}
  DECOCT_INLINE Floats operator[](Words index) const {
    uint32_t at[16];
    float found[16];
    store(at, index);
    for (int i = 0; i < 16; ++i) found[i] = entries[at[i] & 15u];
    return load<Floats>(found);
  }
#endif
};

// Whether looking integers up in a table is faster than converting them; and how many sums of each of several inputs fit into the
// registers.
#if defined(__AVX512F__)
constexpr bool kLookUpIntegers = true;
constexpr int kChains = 2;
#else
constexpr bool kLookUpIntegers = false;
constexpr int kChains = 1;
#endif

DECOCT_INLINE Floats load_numbers(const void* from, int64_t first, int32_t type) {
  const char* bytes = (const char*)from;
  switch (type) {
    case DECOCT_F32: return load<Floats>(bytes + 4 * first);
    case DECOCT_F16: return from_f16(load<Halves>(bytes + 2 * first));
    case DECOCT_BF16: return from_bf16(load<Halves>(bytes + 2 * first));
    default: return to_floats(convert<Words>(load<Bytes>(bytes + first)));
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

DECOCT_INLINE float sum_lanes(Floats v) {
#if defined(__AVX512F__)
  const Eight eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const Eight eight = v.low + v.high;
#endif
#if defined(__AVX2__)
  const Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const Four four = eight.low + eight.high;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

DECOCT_INLINE float largest_lane(Floats v) {
  float lanes[16];
  store(lanes, v);
  float largest = lanes[0];
  for (int i = 1; i < 16; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
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

// One step of a transposition: two rows that are STEP apart exchange what lies STEP lanes beside the diagonal.
template <int STEP, int LANES>
constexpr int upper_lane(int lane) { return lane & STEP ? LANES + lane - STEP : lane; }
template <int STEP, int LANES>
constexpr int lower_lane(int lane) { return lane & STEP ? LANES + lane : lane + STEP; }

template <int STEP, class V, int... LANE>
DECOCT_INLINE void exchange_lanes(V& upper, V& lower, std::integer_sequence<int, LANE...>) {
  const V a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, upper_lane<STEP, sizeof...(LANE)>(LANE)...);
  lower = __builtin_shufflevector(a, b, lower_lane<STEP, sizeof...(LANE)>(LANE)...);
}

template <int STEP, class V>
DECOCT_INLINE void exchange(V& upper, V& lower) {
  if constexpr (!IsPair<V>::value) {
    exchange_lanes<STEP>(upper, lower, std::make_integer_sequence<int, sizeof(V) / sizeof(float)>());
  } else if constexpr (STEP * 2 * sizeof(float) == sizeof(V)) {
    std::swap(upper.high, lower.low);
  } else {
    exchange<STEP>(upper.low, lower.low);
    exchange<STEP>(upper.high, lower.high);
  }
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

}  // namespace DECOCT_LEVEL
}  // namespace decoct
