// Panels: 16 rows side by side, a lane each. A code is shifted into place, turned into its value and multiplied with
// an input that all rows share.
#pragma once

#include <type_traits>

#include "matrix.h"
#include "vector.h"

// Levels that are there for any processor are compiled without unrolling: shorter, slower code.
#if defined(DECOCT_COMPACT)
#define DECOCT_UNROLL _Pragma("GCC unroll 1")
#else
#define DECOCT_UNROLL _Pragma("GCC unroll 8")
#endif

namespace decoct {
namespace DECOCT_LEVEL {

// Asks memory for what is read some time later: processors do so themselves, but not early enough to keep memory busy.
template <int LINES>
DECOCT_INLINE void ask_for(const void* now) {
#pragma GCC unroll 8
  for (int i = 0; i < LINES; ++i) __builtin_prefetch((const char*)now + 64 * (kAhead + i));
}

// Code `index` of a unit, in the low bits of each lane; above them lie the codes that follow.
template <int BITS>
DECOCT_INLINE Words shifted(const uint32_t* unit, int index) {
  const int bit = index * BITS, word = bit / 32, shift = bit % 32;
  const Words low = load<Words>(unit + word * kRows) >> shift;
  if (shift + BITS <= 32) return low;
  return low | load<Words>(unit + (word + 1) * kRows) << (32 - shift);
}

// Codes as numbers; counted from the middle where that costs nothing.
template <int BITS>
struct Integers {
  static constexpr bool centred = kLookUpIntegers && BITS <= 4;
  float entries[16];
  Table table;
  explicit Integers(const DecoctMatrix&) : entries(), table((fill(entries), entries)) {}
  static void fill(float* entries) {
    for (int i = 0; i < 16; ++i) entries[i] = (float)(i % (1 << BITS)) - (float)(1 << BITS) / 2;
  }
  DECOCT_INLINE Floats operator()(Words code) const {
    if constexpr (centred) return table[code];
    return to_floats(code & ((1u << BITS) - 1));
  }
};

// Codes into one table for the whole matrix.
template <int BITS>
struct Entries {
  static constexpr bool centred = true;
  Table table;
  explicit Entries(const DecoctMatrix& m) : table(m.table) {}
  DECOCT_INLINE Floats operator()(Words code) const { return table[BITS == 4 ? code : code & ((1u << BITS) - 1)]; }
};

// Sign, exponent and mantissa of a small floating-point number, moved to where those of a float are.
template <int BITS>
struct Minifloats {
  static constexpr bool centred = true;
  uint32_t shift;
  float bias;
  explicit Minifloats(const DecoctMatrix& m) : shift(23 - m.mantissa) {
    const uint32_t bits = (uint32_t)(127 + 127 - ((1 << (m.exponent - 1)) - 1)) << 23;
    memcpy(&bias, &bits, 4);
  }
  DECOCT_INLINE Floats operator()(Words code) const {
    const Words sign = (code >> (BITS - 1)) << 31, magnitude = (code & ((1u << (BITS - 1)) - 1)) << shift;
    return (Floats)(sign | magnitude) * bias;
  }
};

// Scales and zero points of one panel.
struct Groups {
  const DecoctMatrix& m;
  int64_t first;
  float middle;  // what zero points are counted from
  bool shift;    // whether there is anything to take off
  Groups(const DecoctMatrix& matrix, int64_t panel, bool centred, bool integers)
      : m(matrix), first(panel * matrix.groups * kRows) {
    middle = integers ? (float)(1 << m.bits) / 2 : 0;
    shift = integers && (m.zero || !centred);
    offset = centred ? middle : 0;
  }
  DECOCT_INLINE Floats scale(int64_t group) const {
    return m.scale ? numbers_at(m.scale, first + group * kRows, m.scale_type) : Floats{} + 1.0f;
  }
  DECOCT_INLINE Floats zero(int64_t group) const {
    return (m.zero ? numbers_at(m.zero, first + group * kRows, m.zero_type) : Floats{} + middle) - offset;
  }

 private:
  float offset;
};

// `COUNT` inputs with codes [8 * eighth, 8 * eighth + 8) of a unit.
template <int BITS, int COUNT, int CHAINS, class Value>
DECOCT_INLINE void add_eight(
    Floats (&sums)[COUNT][CHAINS], const Value& value, const uint32_t* unit, int eighth, const float* x, int64_t width) {
  DECOCT_UNROLL
  for (int i = 0; i < 8; ++i) {
    const Floats w = value(shifted<BITS>(unit, 8 * eighth + i));
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) sums[k][i % CHAINS] += w * x[k * width + 8 * eighth + i];
  }
}

template <int BITS, int COUNT, class Value>
void multiply_panel(const DecoctMatrix& m, const Inputs& in, int64_t panel, const Value& value, bool integers, float* out) {
  constexpr int CHAINS = COUNT == 1 ? 4 : kChains;  // sums that do not wait for one another
  const int64_t units = in.width / kUnit;
  const uint32_t* unit = (const uint32_t*)m.codes + panel * units * BITS * kRows;
  const Groups groups(m, panel, Value::centred, integers);
  Floats total[COUNT] = {}, sums[COUNT][CHAINS] = {};
  int64_t group = 0, end = m.groups == 1 ? in.width : m.group_size;
  const auto close = [&]() __attribute__((always_inline)) {
    const Floats scale = groups.scale(group);
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) {
      Floats sum = sums[k][0];
      for (int c = 1; c < CHAINS; ++c) sum += sums[k][c];
      if (groups.shift) sum -= groups.zero(group) * in.sums[k * in.groups + group];
      total[k] += scale * sum;
      for (int c = 0; c < CHAINS; ++c) sums[k][c] = Floats{};
    }
    ++group, end += m.group_size;
  };
  if (m.group_size % kUnit == 0 || m.groups == 1) {
    for (int64_t column = 0; column < in.width;) {
      for (; column < end && column < in.width; column += kUnit, unit += BITS * kRows)
      {
        ask_for<BITS>(unit);
        DECOCT_UNROLL
        for (int eighth = 0; eighth < 4; ++eighth)
          add_eight<BITS, COUNT, CHAINS>(sums, value, unit, eighth, in.x + column, in.width);
      }
      close();
    }
  } else {
    for (int64_t column = 0; column < m.cols; column += kUnit, unit += BITS * kRows)
#pragma GCC unroll 1
      for (int eighth = 0; eighth < 4; ++eighth) {
        if (column + 8 * eighth >= m.cols) break;
        add_eight<BITS, COUNT, CHAINS>(sums, value, unit, eighth, in.x + column, in.width);
        if (column + 8 * eighth + 8 == end) close();
      }
  }
  for (int k = 0; k < COUNT; ++k) store(out + k * rounded_up(m.rows, kRows) + panel * kRows, total[k]);
}

// Codes as numbers, not centred: (code - zero) * scale then rounds as torch does.
template <int BITS>
struct Plain {
  static constexpr bool centred = false;
  explicit Plain(const DecoctMatrix&) {}
  DECOCT_INLINE Floats operator()(Words code) const { return to_floats(code & ((1u << BITS) - 1)); }
};

// Sixteen codes of a unit, from its first or its second half on, as values of 16 rows.
template <int BITS, int HALF, class Value>
DECOCT_INLINE void unpack_half(
    const Groups& groups, int64_t group_size, int64_t column, const uint32_t* unit, const Value& value, Floats (&block)[16]) {
  DECOCT_UNROLL
  for (int eight = 0; eight < 2; ++eight) {
    const int64_t group = groups.m.groups == 1 ? 0 : (column + 8 * eight) / group_size;
    if (group >= groups.m.groups) return;
    const Floats scale = groups.scale(group), zero = groups.zero(group);
  DECOCT_UNROLL
    for (int i = 0; i < 8; ++i)
      block[8 * eight + i] = (value(shifted<BITS>(unit, 16 * HALF + 8 * eight + i)) - zero) * scale;
  }
}

template <int BITS, class Value>
void unpack_panel(const DecoctMatrix& m, int64_t panel, const Value& value, bool integers, int32_t type, char* out) {
  const int64_t units = rounded_up(m.cols, kUnit) / kUnit;
  const uint32_t* unit = (const uint32_t*)m.codes + panel * units * BITS * kRows;
  const Groups groups(m, panel, Value::centred, integers);
  const int64_t rows = m.rows - panel * kRows < kRows ? m.rows - panel * kRows : kRows;
  Floats block[16] = {};
  for (int64_t column = 0; column < m.cols; column += 16) {
    if (column % kUnit == 0) {
      unpack_half<BITS, 0>(groups, m.group_size, column, unit, value, block);
    } else {
      unpack_half<BITS, 1>(groups, m.group_size, column, unit, value, block);
      unit += BITS * kRows;
    }
    transpose(block);
    if (type == DECOCT_BF16 && m.cols - column >= 16) {  // what prompts take, without a call for each row
      for (int r = 0; r < rows; ++r) store(out + 2 * (r * m.cols + column), to_bf16(block[r]));
    } else {
      for (int r = 0; r < rows; ++r) store_some(out, r * m.cols + column, type, block[r], m.cols - column);
    }
  }
}

// Calls f with a functor that makes values of codes, made for the matrix's bits.
template <template <int> class Value, int FEWEST, int MOST, class F>
void with_bits(const DecoctMatrix& m, const F& f) {
  if constexpr (FEWEST < MOST) {
    if (m.bits != FEWEST) return with_bits<Value, FEWEST + 1, MOST>(m, f);
  }
  f(std::integral_constant<int, FEWEST>(), Value<FEWEST>(m));
}

}  // namespace DECOCT_LEVEL
}  // namespace decoct
