// Rows: matrices stored row by row. A row is turned into floats that stay in the cache, then multiplied.
#pragma once

#include "matrix.h"
#include "vector.h"

namespace decoct {
namespace DECOCT_LEVEL {

// The dot products of one row with `COUNT` inputs; `row` is padded with zeros to whole vectors.
template <int COUNT>
DECOCT_INLINE void dot_products(const float* row, const Inputs& in, int64_t cols, float* out, int64_t step) {
  constexpr int CHAINS = COUNT == 1 ? 4 : 2;
  Floats sums[COUNT][CHAINS] = {};
  int64_t column = 0;
  for (; column + 16 * CHAINS <= cols; column += 16 * CHAINS)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const Floats w = load<Floats>(row + column + 16 * c);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k) sums[k][c] += w * load<Floats>(in.x + k * in.width + column + 16 * c);
    }
  for (; column < cols; column += 16)
    for (int k = 0; k < COUNT; ++k) sums[k][0] += load<Floats>(row + column) * load<Floats>(in.x + k * in.width + column);
  for (int k = 0; k < COUNT; ++k) {
    for (int c = 1; c < CHAINS; ++c) sums[k][0] += sums[k][c];
    out[k * step] = sum_lanes(sums[k][0]);
  }
}

// The same for values in memory of any type.
template <int COUNT, int TYPE>
void dense_row(const DecoctMatrix& m, const Inputs& in, int64_t row, float* out, int64_t step) {
  constexpr int CHAINS = 4;
  Floats sums[COUNT][CHAINS] = {};
  const int64_t first = row * m.cols;
  int64_t column = 0;
  for (; column + 16 * CHAINS <= m.cols; column += 16 * CHAINS)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const Floats w = load_numbers(m.values, first + column + 16 * c, TYPE);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k) sums[k][c] += w * load<Floats>(in.x + k * in.width + column + 16 * c);
    }
  for (; column < m.cols; column += 16) {
    const Floats w = load_some(m.values, first + column, TYPE, m.cols - column);
    for (int k = 0; k < COUNT; ++k) sums[k][0] += w * load<Floats>(in.x + k * in.width + column);
  }
  for (int k = 0; k < COUNT; ++k)
    out[k * step] = sum_lanes((sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]));
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

__attribute__((noinline)) void fill_dense(const DecoctMatrix& m, int64_t row, float* out) {
  for (int64_t column = 0; column < m.cols; column += 16)
    store(out + column, load_some(m.values, row * m.cols + column, m.value_type, m.cols - column));
}

// A bitmap of 16 columns at a time, and the values of those that are set.
__attribute__((noinline)) void fill_bitmap(const DecoctMatrix& m, int64_t row, float* out) {
  const uint8_t* bitmap = (const uint8_t*)m.codes + row * m.stride;
  int64_t at = m.starts[row];
  for (int64_t column = 0; column < m.cols; column += 16) {
    uint32_t mask = bitmap[column / 8];
    if (column + 8 < m.cols) mask |= (uint32_t)bitmap[column / 8 + 1] << 8;
    const Floats values = m.count - at >= 16 ? load_numbers(m.values, at, m.value_type)
                                             : load_some(m.values, at, m.value_type, m.count - at);
#if defined(__AVX512F__)
    store(out + column, (Floats)_mm512_maskz_expand_ps((__mmask16)mask, (__m512)values));
#else
    float lanes[16];
    store(lanes, values);
    for (int i = 0, next = 0; i < 16; ++i) out[column + i] = mask >> i & 1 ? lanes[next++] : 0.0f;
#endif
    at += __builtin_popcount(mask);
  }
}

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

template <int BITS>
DECOCT_INLINE Words sixteen_codes(const DecoctMatrix& m, int64_t byte) {
  const Words shifts = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS,
                        0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS};
  const uint64_t word = eight_codes(m, byte);  // eight codes take BITS bytes
  const uint32_t low = (uint32_t)word, high = (uint32_t)(word >> 8 * BITS);
  const Words first = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0, 0, 0, 0, 0, 0, 0, 0};
  const Words words = ((Words{} + low) & first) | ((Words{} + high) & ~first);
  return words >> shifts;
}

template <int BITS>
void fill_from_table(const DecoctMatrix& m, int64_t row, float* out) {
  const Table table(m.table + 16 * (row / m.rows_per_table));
  for (int64_t column = 0; column < m.cols; column += 16)
    store(out + column, table[sixteen_codes<BITS>(m, row * m.stride + column / 8 * BITS)]);
}

DECOCT_INLINE uint32_t code_at(const DecoctMatrix& m, int64_t start, int64_t index) {
  if (m.bits == 8) return ((const uint8_t*)m.codes)[start + index];
  const int64_t bit = index * m.bits;
  return (uint32_t)(eight_codes(m, start + bit / 8) >> bit % 8) & ((1u << m.bits) - 1);
}

// Short vectors that codes stand for, of all books added.
template <int D>
void fill_vectors(const DecoctMatrix& m, int64_t row, float* out) {
  const int64_t d = D ? D : m.d, entries = (int64_t)1 << m.bits, per_book = m.rows * m.stride;
  const float* tables = m.table + row / m.rows_per_table * m.books * entries * d;
  float scale[16];
  store(scale, m.scale ? load_some(m.scale, row, m.scale_type, 1) : Floats{} + 1.0f);
  for (int64_t i = 0; i * d < m.cols; ++i) {
    float sum[8] = {};
    for (int64_t book = 0; book < m.books; ++book) {
      const float* entry = tables + (book * entries + code_at(m, book * per_book + row * m.stride, i)) * d;
      for (int64_t k = 0; k < d; ++k) sum[k] += entry[k];
    }
    for (int64_t k = 0; k < d; ++k) out[i * d + k] = sum[k] * scale[0];
  }
}

__attribute__((noinline)) void fill_row(const DecoctMatrix& m, int64_t row, float* out) {
  if (m.layout == DECOCT_DENSE) return fill_dense(m, row, out);
  if (m.layout == DECOCT_BITMAP) return fill_bitmap(m, row, out);
  if (m.layout == DECOCT_INDEXED) return fill_indexed(m, row, out);
  if (m.layout == DECOCT_ROW_TABLES) {
    switch (m.bits) {
      case 1: return fill_from_table<1>(m, row, out);
      case 2: return fill_from_table<2>(m, row, out);
      case 3: return fill_from_table<3>(m, row, out);
      default: return fill_from_table<4>(m, row, out);
    }
  }
  switch (m.d) {
    case 1: return fill_vectors<1>(m, row, out);
    case 2: return fill_vectors<2>(m, row, out);
    case 4: return fill_vectors<4>(m, row, out);
    case 8: return fill_vectors<8>(m, row, out);
    default: return fill_vectors<0>(m, row, out);
  }
}

}  // namespace DECOCT_LEVEL
}  // namespace decoct
