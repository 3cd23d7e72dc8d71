// Trellises: a weight is a state, a window of its sequence's digits; a table says what it stands for. A stripe's columns lie one
// after the other, so 16 rows of a column are neighbours in a stream of digits, and all of them meet the same input.
#pragma once

#include "matrix.h"
#include "vector.h"

namespace decoct {
namespace DECOCT_LEVEL {

#if defined(__AVX512F__)
typedef uint64_t Longs __attribute__((vector_size(64)));
#endif

// Walks down the rows of one column, 16 at a time.
struct TrellisColumn {
  const DecoctMatrix& m;
  const uint8_t* sequence;
  int64_t digit;  // of the sequence, a multiple of 8
  const uint64_t mask;
  const int before;  // bits of a state that belong to earlier digits

  TrellisColumn(const DecoctMatrix& matrix, int64_t column, int64_t row)
      : m(matrix), mask(((uint64_t)1 << (matrix.books + 1) * matrix.bits) - 1), before(matrix.books * matrix.bits) {
    const int64_t at = column % m.d * m.rows + row, number = at / m.rows_per_table;
    sequence = (const uint8_t*)m.codes + (column / m.d * m.count + number) * m.stride;
    digit = at - number * m.rows_per_table;
  }

  // Eight digits and those before them; before a sequence's first digit lies its last.
  DECOCT_INLINE uint64_t eight() {
    const int64_t byte = digit / 8 * m.bits;
    uint32_t digits;
    memcpy(&digits, sequence + byte, 4);
    uint16_t earlier;
    if (byte >= 2) {
      memcpy(&earlier, sequence + byte - 2, 2);
    } else {
      earlier = (uint16_t)(sequence[byte ? 0 : m.stride - 1] << 8 | sequence[m.stride - 2 + byte]);
    }
    digit += 8;
    if (digit == m.rows_per_table) digit = 0, sequence += m.stride;
    return ((uint64_t)digits << 16 | earlier) >> (16 - before);
  }

  // Values of the next 16 rows, or of the last 8.
  DECOCT_INLINE Floats next(bool whole) {
    const uint64_t first = eight(), second = whole ? eight() : first;
#if defined(__AVX512F__)
    const Longs shifts = Longs{0, 1, 2, 3, 4, 5, 6, 7} * (uint64_t)m.bits;
    const EightWords low = __builtin_convertvector(((Longs{} + first) >> shifts) & mask, EightWords);
    const EightWords high = __builtin_convertvector(((Longs{} + second) >> shifts) & mask, EightWords);
    const Words both = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Floats)_mm512_i32gather_ps((__m512i)both, m.table, 4);
#else
    float found[16];
    for (int i = 0; i < 8; ++i) {
      found[i] = m.table[first >> i * m.bits & mask];
      found[8 + i] = m.table[second >> i * m.bits & mask];
    }
    return load<Floats>(found);
#endif
  }
};

template <int COUNT>
void multiply_trellis(const DecoctMatrix& m, const Inputs& in, int64_t first, int64_t last, float* out) {
  const int64_t step = rounded_up(m.rows, kRows), top = first * kRows, end = last * kRows < m.rows ? last * kRows : m.rows;
  for (int k = 0; k < COUNT; ++k) memset(out + k * step + top, 0, (last * kRows - top) * sizeof(float));
  for (int64_t column = 0; column < m.cols; ++column) {
    TrellisColumn rows(m, column, top);
    for (int64_t r = top; r < end; r += kRows) {
      const Floats w = rows.next(end - r >= kRows);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k)
        store(out + k * step + r, load<Floats>(out + k * step + r) + w * in.x[k * in.width + column]);
    }
  }
  for (int k = 0; k < COUNT; ++k)
    for (int64_t r = top; r < end; r += kRows)
      store(out + k * step + r, load<Floats>(out + k * step + r) * load_numbers(m.scale, r, m.scale_type));
}

void unpack_trellis(const DecoctMatrix& m, int64_t first, int64_t last, int32_t type, char* out) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t top = block * kRows, rows = m.rows - top < kRows ? m.rows - top : kRows;
    const Floats scale = load_numbers(m.scale, top, m.scale_type);
    Floats values[16] = {};
    for (int64_t column = 0; column < m.cols; column += 16) {
      for (int i = 0; i < 16 && column + i < m.cols; ++i)
        values[i] = TrellisColumn(m, column + i, top).next(rows == kRows) * scale;
      transpose(values);
      for (int64_t r = 0; r < rows; ++r)
        store_some(out, (top - first * kRows + r) * m.cols + column, type, values[r], m.cols - column);
    }
  }
}

}  // namespace DECOCT_LEVEL
}  // namespace decoct
