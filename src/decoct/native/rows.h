// Rows: matrices stored row by row. A reader gives the entries of one row as floats, 16 columns at a time, from the first on.
#pragma once

#include "matrix.h"
#include "vector.h"

namespace decoct {
namespace DECOCT_LEVEL {

// The dot products of one row with `COUNT` inputs, which are zero behind the row's end.
template <int COUNT, class Reader>
void dot_products(Reader reader, const Inputs& in, int64_t cols, float* out, int64_t step) {
  constexpr int CHAINS = COUNT == 1 ? 4 : kChains;  // sums that do not wait for one another
  Floats sums[COUNT][CHAINS] = {};
  int64_t column = 0;
  for (; column + 16 * CHAINS <= cols; column += 16 * CHAINS)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const Floats w = reader(column + 16 * c);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k) sums[k][c] += w * load<Floats>(in.x + k * in.width + column + 16 * c);
    }
  for (; column < cols; column += 16) {
    const Floats w = reader(column);
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) sums[k][0] += w * load<Floats>(in.x + k * in.width + column);
  }
#pragma GCC unroll 4
  for (int k = 0; k < COUNT; ++k) {
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; ++c) sums[k][0] += sums[k][c];
    out[k * step] = sum_lanes(sums[k][0]);
  }
}

// Values in memory of any type.
template <int TYPE>
struct DenseReader {
  const DecoctMatrix& m;
  int64_t first;
  DenseReader(const DecoctMatrix& matrix, int64_t row) : m(matrix), first(row * matrix.cols) {}
  DECOCT_INLINE Floats operator()(int64_t column) const {
    if (m.cols - column < 16) return load_some(m.values, first + column, TYPE, m.cols - column);
    __builtin_prefetch((const char*)m.values + (first + column) * kSizes[TYPE] + 64 * kAhead);
    return load_numbers(m.values, first + column, TYPE);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// For eight bits of a bitmap the value that each lane takes; 128 for none.
struct Places {
  uint8_t of[256][8] = {};
  constexpr Places() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, next = 0; lane < 8; ++lane) of[mask][lane] = mask >> lane & 1 ? next++ : 128;
  }
};
constexpr Places kPlaces;

DECOCT_INLINE Eight spread_eight(Eight values, uint32_t mask) {
  const __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kPlaces.of[mask & 255]));
  const __m256i none = _mm256_srai_epi32(_mm256_slli_epi32(places, 24), 31);
  return (Eight)_mm256_andnot_ps(_mm256_castsi256_ps(none), _mm256_permutevar8x32_ps((__m256)values, places));
}
#endif

// A bitmap, and the values where it is set.
template <int TYPE>
struct BitmapReader {
  const DecoctMatrix& m;
  const uint8_t* bitmap;
  int64_t at;
  BitmapReader(const DecoctMatrix& matrix, int64_t row)
      : m(matrix), bitmap((const uint8_t*)matrix.codes + row * matrix.stride), at(matrix.starts[row]) {}
  DECOCT_INLINE Floats operator()(int64_t column) {
    uint32_t mask = bitmap[column / 8];
    if (column + 8 < m.cols) mask |= (uint32_t)bitmap[column / 8 + 1] << 8;
    __builtin_prefetch((const char*)m.values + at * kSizes[TYPE] + 64 * kAhead);
    const Floats values = values_from(at);
#if defined(__AVX512F__)
    at += __builtin_popcount(mask);
    return (Floats)_mm512_maskz_expand_ps((__mmask16)mask, (__m512)values);
#elif defined(__AVX2__)
    const Floats later = values_from(at + __builtin_popcount(mask & 255));
    at += __builtin_popcount(mask);
    return {spread_eight(values.low, mask), spread_eight(later.low, mask >> 8)};
#else
    uint32_t lanes[16], spread[16];
    store(lanes, values);
    int next = 0;
    for (int i = 0; i < 16; ++i) {  // without a branch, which could not be foretold
      const uint32_t set = mask >> i & 1;
      spread[i] = lanes[next & 15] & -set;
      next += set;
    }
    at += next;
    return load<Floats>(spread);
#endif
  }
  DECOCT_INLINE Floats values_from(int64_t first) const {
    if (first > m.count) return Floats{};  // a damaged bitmap has more bits set than there are values
    return m.count - first >= 16 ? load_numbers(m.values, first, TYPE) : load_some(m.values, first, TYPE, m.count - first);
  }
};

// Codes of 8 * bits bits or less from any byte on; what lies beyond the codes' end is zero.
DECOCT_INLINE uint64_t eight_codes(const DecoctMatrix& m, int64_t byte) {
  uint64_t word = 0;
  const int64_t left = m.count - byte;
  if (left >= 8) {
    memcpy(&word, (const uint8_t*)m.codes + byte, 8);
  } else if (left > 0) {
    memcpy(&word, (const uint8_t*)m.codes + byte, left);
  }
  return word;
}

// Codes into a table of the row.
template <int BITS>
struct TableReader {
  const DecoctMatrix& m;
  int64_t first;
  Table table;
  TableReader(const DecoctMatrix& matrix, int64_t row)
      : m(matrix), first(row * matrix.stride), table(matrix.table + 16 * (row / matrix.rows_per_table)) {}
  DECOCT_INLINE Floats operator()(int64_t column) const {
    static constexpr uint32_t shifts[16] = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS,
                                            0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS};
    static constexpr int32_t second[16] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
    const int64_t byte = first + column / 8 * BITS;  // eight codes take BITS bytes
    const uint8_t* codes = (const uint8_t*)m.codes + byte;
    uint32_t low, high;
    if (m.count - byte >= BITS + 4) {
      __builtin_prefetch(codes + 64 * kAhead);
      memcpy(&low, codes, 4);
      memcpy(&high, codes + BITS, 4);
    } else {
      low = (uint32_t)eight_codes(m, byte), high = (uint32_t)eight_codes(m, byte + BITS);
    }
    return table[pick(load<Ints>(second), Words{} + high, Words{} + low) >> load<Words>(shifts)];
  }
};

DECOCT_INLINE uint32_t code_at(const DecoctMatrix& m, int64_t start, int64_t index) {
  if (m.bits == 8) return ((const uint8_t*)m.codes)[start + index];
  const int64_t bit = index * m.bits;
  return (uint32_t)(eight_codes(m, start + bit / 8) >> bit % 8) & ((1u << m.bits) - 1);
}

// Short vectors that codes stand for, of all books added; D is 8, or 0 for any number of entries up to that.
template <int D>
struct VectorReader {
  const DecoctMatrix& m;
  int64_t row, start, per_book, d;
  const float* tables;
  float scale;
  int64_t next = 0;  // code
  float pending[32];
  int64_t have = 0;  // of `pending`
  VectorReader(const DecoctMatrix& matrix, int64_t r)
      : m(matrix), row(r), start(r * matrix.stride), per_book(matrix.rows * matrix.stride), d(D ? D : matrix.d),
        tables(matrix.table + r / matrix.rows_per_table * matrix.books * ((int64_t)1 << matrix.bits) * d) {
    float lanes[16];
    store(lanes, m.scale ? load_some(m.scale, row, m.scale_type, 1) : Floats{} + 1.0f);
    scale = lanes[0];
  }
  DECOCT_INLINE const float* entry(int64_t book, int64_t index) const {
    return tables + ((book << m.bits) + code_at(m, book * per_book + start, index)) * d;
  }
  DECOCT_INLINE Eight eight(int64_t index) const {
    Eight sum = load<Eight>(entry(0, index));
    for (int64_t book = 1; book < m.books; ++book) sum += load<Eight>(entry(book, index));
    return sum * scale;
  }
  DECOCT_INLINE Floats operator()(int64_t column) {
    if constexpr (D == 8) {
      const Eight first = eight(column / 8), second = column + 8 < m.cols ? eight(column / 8 + 1) : Eight{};
      return beside(first, second);
    }
    for (; have < 16; have += d, ++next)
      for (int64_t k = 0; k < d; ++k) {
        float sum = 0;
        if (next * d < m.cols)
          for (int64_t book = 0; book < m.books; ++book) sum += entry(book, next)[k];
        pending[have + k] = sum * scale;
      }
    const Floats found = load<Floats>(pending);
    have -= 16;
    memcpy(pending, pending + 16, have * sizeof(float));
    return found;
  }
};

template <template <int> class Reader, class F>
void with_type(const DecoctMatrix& m, int64_t row, const F& f) {
  if (m.value_type == DECOCT_F32) return f(Reader<DECOCT_F32>(m, row));
  if (m.value_type == DECOCT_F16) return f(Reader<DECOCT_F16>(m, row));
  return f(Reader<DECOCT_BF16>(m, row));
}

// Calls f with the reader of a row.
template <class F>
void with_reader(const DecoctMatrix& m, int64_t row, const F& f) {
  if (m.layout == DECOCT_BITMAP) return with_type<BitmapReader>(m, row, f);
  if (m.layout == DECOCT_VECTORS) return m.d == 8 ? f(VectorReader<8>(m, row)) : f(VectorReader<0>(m, row));
  if (m.layout == DECOCT_DENSE) return with_type<DenseReader>(m, row, f);
  switch (m.bits) {
    case 1: return f(TableReader<1>(m, row));
    case 2: return f(TableReader<2>(m, row));
    case 3: return f(TableReader<3>(m, row));
    default: return f(TableReader<4>(m, row));
  }
}

DECOCT_INLINE int64_t number(const void* from, int64_t at, int32_t type) {
  return type == DECOCT_U16 ? ((const uint16_t*)from)[at] : ((const int32_t*)from)[at];
}

// Values with their columns.
__attribute__((noinline)) void indexed_row(const DecoctMatrix& m, const Inputs& in, int count, int64_t row, float* out, int64_t step) {
  float sums[kMostInputs] = {};
  for (int64_t at = m.starts[row]; at < m.starts[row + 1]; at += 16) {
    const int64_t here = m.starts[row + 1] - at < 16 ? m.starts[row + 1] - at : 16;
    float values[16];
    store(values, load_some(m.values, at, m.value_type, here));
    for (int i = 0; i < here; ++i)
      for (int k = 0; k < count; ++k) sums[k] += values[i] * in.x[k * in.width + number(m.index, at + i, m.index_type)];
  }
  for (int k = 0; k < count; ++k) out[k * step] = sums[k];
}

__attribute__((noinline)) void fill_indexed(const DecoctMatrix& m, int64_t row, float* out) {
  memset(out, 0, sizeof(float) * rounded_up(m.cols, 16));
  for (int64_t at = m.starts[row]; at < m.starts[row + 1]; ++at) {
    float value[16];
    store(value, load_some(m.values, at, m.value_type, 1));
    out[number(m.index, at, m.index_type)] = value[0];
  }
}

void fill_row(const DecoctMatrix& m, int64_t row, float* out) {
  if (m.layout == DECOCT_INDEXED) return fill_indexed(m, row, out);
  with_reader(m, row, [&](auto reader) {
    for (int64_t column = 0; column < m.cols; column += 16) store(out + column, reader(column));
  });
}

}  // namespace DECOCT_LEVEL
}  // namespace decoct
