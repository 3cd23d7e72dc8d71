// Pairs: as panels, two codes of a row at a time. Codes become bf16, which holds them exactly, and one instruction multiplies
// them with two bf16 inputs and adds both products to a float32 sum. For inputs that are bf16 themselves.
#pragma once

#include "panels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

namespace decoct {
namespace DECOCT_LEVEL {

constexpr int power_of_two_in(int bits) { return bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1; }

// Codes that fill an odd number of words. Code k of the first half and code k of the second then lie 16 bits apart in the
// bit stream, or an odd number of half-words: one can be brought above the other by a blend.
template <int BITS>
struct Period {
  static constexpr int words = BITS / power_of_two_in(BITS), codes = kUnit / power_of_two_in(BITS), pairs = codes / 2;
};

typedef uint16_t Shorts __attribute__((vector_size(64)));

// Half-word `i` of the first codes below half-word `i` of the second ones, for 16 rows.
template <int BITS>
DECOCT_INLINE Words half_words(const uint32_t* period, int i) {
  constexpr int words = Period<BITS>::words;
  if constexpr (words == 1) return load<Words>(period);
  const bool odd = i % 2;
  const Words low = load<Words>(period + (odd ? (words + i) / 2 : i / 2) * kRows);
  const Words high = load<Words>(period + (odd ? i / 2 : (words + i) / 2) * kRows);
  const Words both = (Words)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)low, (__m512i)high);
  return odd ? both << 16 | both >> 16 : both;
}

// Both codes of pair `k` in the low bits of their halves; above them lie the codes that follow.
template <int BITS>
DECOCT_INLINE Shorts shifted_pair(const Words (&halves)[Period<BITS>::words], int k) {
  const int bit = k * BITS, half = bit / 16, shift = bit % 16;
  const Shorts low = (Shorts)halves[half] >> (uint16_t)shift;
  return shift + BITS <= 16 ? low : low | (Shorts)halves[half + 1] << (uint16_t)(16 - shift);
}

// Values of codes of up to 5 bits, by a table of 32: more than 5 bits of an index do not matter.
struct PairTable {
  __m512i entries;
  template <class F>
  DECOCT_INLINE explicit PairTable(const F& entry) {
    uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
      const float value = entry(i);
      uint32_t bits;
      memcpy(&bits, &value, 4);
      table[i] = (uint16_t)(bits >> 16);  // exact: see `pairs_fit`
    }
    entries = _mm512_loadu_si512(table);
  }
  DECOCT_INLINE __m512bh operator[](Shorts index) const {
    return (__m512bh)_mm512_permutexvar_epi16((__m512i)index, entries);
  }
};

DECOCT_INLINE __m512 dot(__m512 sum, __m512bh codes, uint32_t inputs) {
  return _mm512_dpbf16_ps(sum, codes, (__m512bh)_mm512_set1_epi32((int)inputs));
}

// Integers, counted from the middle up to 5 bits.
template <int BITS>
struct PairIntegers {
  static constexpr int offset = BITS > 5 ? -128 : 1 << (BITS - 1);
  PairTable table;
  explicit PairIntegers(const DecoctMatrix&)
      : table([](int i) { return (float)(i % (1 << (BITS < 5 ? BITS : 5)) - offset); }) {}
  DECOCT_INLINE void add(__m512& sum, Shorts codes, uint32_t inputs) const {
    if constexpr (BITS > 5) {  // 0x4300 is 128, whose last place is 1
      sum = dot(sum, (__m512bh)((codes & (uint16_t)((1 << BITS) - 1)) | (uint16_t)0x4300), inputs);
    } else {
      sum = dot(sum, table[codes], inputs);
    }
  }
};

// Codes into one table for the whole matrix.
template <int BITS>
struct PairEntries {
  static constexpr int offset = 0;
  PairTable table;
  explicit PairEntries(const DecoctMatrix& m) : table([&](int i) { return m.table[i % (1 << BITS)]; }) {}
  DECOCT_INLINE void add(__m512& sum, Shorts codes, uint32_t inputs) const { sum = dot(sum, table[codes], inputs); }
};

template <int BITS, int COUNT, class Value>
void multiply_pairs_panel(const DecoctMatrix& m, const Inputs& in, int64_t panel, const Value& value, bool integers, float* out) {
  typedef Period<BITS> P;
  constexpr int CHAINS = COUNT == 1 ? 4 : 2;  // sums that do not wait for one another
  const int64_t units = in.width / kUnit, half = in.width / 2;
  const uint32_t* unit = (const uint32_t*)m.codes + panel * units * BITS * kRows;
  const float middle = integers ? (float)(1 << BITS) / 2 : 0;
  const bool shift = integers && (m.zero || Value::offset != 1 << (BITS - 1));
  int64_t at = panel * m.groups * kRows;
  Floats total[COUNT] = {};
  for (int64_t group = 0, column = 0; group < m.groups; ++group, at += kRows) {
    const int64_t end = m.groups == 1 ? in.width : column + m.group_size;
    __m512 sums[COUNT][CHAINS] = {};
    for (; column < end; column += kUnit) {
#pragma GCC unroll 8
      for (int period = 0; period < kUnit / P::codes; ++period, unit += P::words * kRows) {
        Words halves[P::words];
        ask_for<P::words>(unit);
#pragma GCC unroll 8
        for (int i = 0; i < P::words; ++i) halves[i] = half_words<BITS>(unit, i);
#pragma GCC unroll 16
        for (int k = 0; k < P::pairs; ++k) {
          const Shorts codes = shifted_pair<BITS>(halves, k);
#pragma GCC unroll 4
          for (int c = 0; c < COUNT; ++c)
            value.add(sums[c][k % CHAINS], codes, in.pairs[c * half + column / 2 + period * P::pairs + k]);
        }
      }
    }
    const Floats scale = m.scale ? load_numbers(m.scale, at, m.scale_type) : Floats{} + 1.0f;
    const Floats zero = (m.zero ? load_numbers(m.zero, at, m.zero_type) : Floats{} + middle) - (float)Value::offset;
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; ++c) {
      Floats sum = (Floats)sums[c][0];
#pragma GCC unroll 8
      for (int chain = 1; chain < CHAINS; ++chain) sum += (Floats)sums[c][chain];
      if (shift) sum -= zero * in.sums[c * in.groups + group];
      total[c] += scale * sum;
    }
  }
  for (int c = 0; c < COUNT; ++c) store(out + c * rounded_up(m.rows, kRows) + panel * kRows, total[c]);
}

// Rows of bf16, 32 columns at a time: dense, or those that a bitmap has.
struct PairDense {
  const uint16_t* values;
  int64_t cols;
  PairDense(const DecoctMatrix& m, int64_t row) : values((const uint16_t*)m.values + row * m.cols), cols(m.cols) {}
  DECOCT_INLINE __m512bh operator()(int64_t column) const {
    if (cols - column < 32) return (__m512bh)_mm512_maskz_loadu_epi16((1u << (cols - column)) - 1, values + column);
    __builtin_prefetch((const char*)(values + column) + 64 * kAhead);
    return (__m512bh)_mm512_loadu_si512(values + column);
  }
};

struct PairBitmap {
  const uint16_t *values, *end;
  const uint8_t* bitmap;
  int64_t bytes;
  PairBitmap(const DecoctMatrix& m, int64_t row)
      : values((const uint16_t*)m.values + m.starts[row]), end((const uint16_t*)m.values + m.count),
        bitmap((const uint8_t*)m.codes + row * m.stride), bytes(m.stride) {}
  DECOCT_INLINE __m512bh operator()(int64_t column) {
    uint32_t mask = 0;
    const int64_t left = bytes - column / 8;
    if (left >= 4) memcpy(&mask, bitmap + column / 8, 4);
    else
      for (int64_t i = 0; i < left; ++i) mask |= (uint32_t)bitmap[column / 8 + i] << 8 * i;
    __builtin_prefetch((const char*)values + 64 * kAhead);
    const __m512i some = end - values >= 32 ? _mm512_loadu_si512(values)
                                            : _mm512_maskz_loadu_epi16((1u << (end - values)) - 1, values);
    values += __builtin_popcount(mask);
    return (__m512bh)_mm512_maskz_expand_epi16(mask, some);
  }
};

template <int COUNT, class Reader>
void dot_pairs(Reader reader, const Inputs& in, float* out, int64_t step) {
  constexpr int CHAINS = COUNT == 1 ? 4 : 2;
  __m512 sums[COUNT][CHAINS] = {};
  const auto add = [&](int64_t column, int chain) __attribute__((always_inline)) {
    const __m512bh w = reader(column);
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k)
      sums[k][chain] =
          _mm512_dpbf16_ps(sums[k][chain], w, (__m512bh)_mm512_loadu_si512(in.pairs + (k * in.width + column) / 2));
  };
  int64_t column = 0;
  for (; column + kUnit * CHAINS <= in.width; column += kUnit * CHAINS)
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; ++chain) add(column + kUnit * chain, chain);
  for (; column < in.width; column += kUnit) add(column, 0);
#pragma GCC unroll 4
  for (int k = 0; k < COUNT; ++k) {
#pragma GCC unroll 4
    for (int chain = 1; chain < CHAINS; ++chain) sums[k][0] += sums[k][chain];
    out[k * step] = sum_lanes((Floats)sums[k][0]);
  }
}

// Whether a matrix is multiplied so: groups of whole units, values that bf16 holds.
bool pairs_fit(const DecoctMatrix& m) {
  if (m.layout == DECOCT_DENSE || m.layout == DECOCT_BITMAP) return m.value_type == DECOCT_BF16;
  if (m.layout != DECOCT_TABLE && (m.layout != DECOCT_INTS || m.bits > 7)) return false;  // bf16 holds no 8 bits in one step
  if (m.groups > 1 && m.group_size % kUnit) return false;
  if (m.layout == DECOCT_TABLE)
    for (int i = 0; i < 1 << m.bits; ++i) {
      uint32_t bits;
      memcpy(&bits, m.table + i, 4);
      if (bits & 0xffffu) return false;
    }
  return true;
}

template <int COUNT>
void multiply_pairs_count(const DecoctMatrix& m, const Inputs& in, int64_t first, int64_t last, float* out) {
  const auto panels = [&](auto bits, const auto& value) {
    for (int64_t panel = first; panel < last; ++panel)
      multiply_pairs_panel<decltype(bits)::value, COUNT>(m, in, panel, value, m.layout == DECOCT_INTS, out);
  };
  if (m.layout == DECOCT_TABLE) return with_bits<PairEntries, 1, 4>(m, panels);
  if (m.layout == DECOCT_DENSE || m.layout == DECOCT_BITMAP) {
    const int64_t step = rounded_up(m.rows, kRows);
    for (int64_t r = first * kRows; r < last * kRows && r < m.rows; ++r) {
      if (m.layout == DECOCT_DENSE) dot_pairs<COUNT>(PairDense(m, r), in, out + r, step);
      else dot_pairs<COUNT>(PairBitmap(m, r), in, out + r, step);
    }
    return;
  }
  with_bits<PairIntegers, 1, 7>(m, panels);
}

void multiply_pairs(const DecoctMatrix& m, const Inputs& in, int count, int64_t first, int64_t last, float* out) {
  if (count == 1) return multiply_pairs_count<1>(m, in, first, last, out);
  multiply_pairs_count<kMostInputs>(m, in, first, last, out);
}

// Inputs whose codes are multiplied together side by side; `x` is [width] of bf16, zero behind its end.
void pair_inputs(const DecoctMatrix& m, const uint16_t* x, int64_t width, uint32_t* pairs) {
  if (m.layout == DECOCT_DENSE || m.layout == DECOCT_BITMAP) {  // neighbours, as rows have them
    memcpy(pairs, x, width * sizeof(uint16_t));
    return;
  }
  const int codes = kUnit / power_of_two_in(m.bits);
  for (int64_t column = 0; column < width; column += codes)
    for (int k = 0; k < codes / 2; ++k) *pairs++ = x[column + k] | (uint32_t)x[column + codes / 2 + k] << 16;
}

}  // namespace DECOCT_LEVEL
}  // namespace decoct

#endif
