// The functions of an instruction level, for every layout. Each level includes this once, compiled for itself.
#pragma once

#include <cstdlib>

#include "panels.h"
#include "predictions.h"
#include "prompts.h"
#include "rows.h"
#include "steps.h"
#include "trellis.h"

namespace decoct {
namespace DECOCT_LEVEL {

// Room for a row of floats, zero behind its end. Not a std::vector: its functions would exist once for all levels, compiled for any of them.
struct Row {
  float* entries;
  explicit Row(int64_t count) : entries((float*)calloc(rounded_up(count, 16) + 16, sizeof(float))) {
    if (!entries) abort();
  }
  ~Row() { free(entries); }
  Row(const Row&) = delete;
};

template <int COUNT>
void multiply_count(const DecoctMatrix& m, const Inputs& in, int64_t first, int64_t last, float* out) {
  const int64_t step = rounded_up(m.rows, kRows);
  const auto panels = [&](auto bits, const auto& value) {
    for (int64_t panel = first; panel < last; ++panel)
      multiply_panel<decltype(bits)::value, COUNT>(m, in, panel, value, m.layout == DECOCT_INTS, out);
  };
  switch (m.layout) {
    case DECOCT_TRELLIS: return multiply_trellis<COUNT>(m, in, first, last, out);
    case DECOCT_INTS: return with_bits<Integers, 1, 8>(m, panels);
    case DECOCT_TABLE: return with_bits<Entries, 1, 4>(m, panels);
    case DECOCT_MINIFLOAT: return (m.bits == 6 ? with_bits<Minifloats, 6, 6>(m, panels) : with_bits<Minifloats, 8, 8>(m, panels));
    default: break;
  }
  for (int64_t r = first * kRows; r < last * kRows && r < m.rows; ++r) {
    if (m.layout == DECOCT_INDEXED) {
      indexed_row(m, in, COUNT, r, out + r, step);
    } else {
      with_reader(m, r, [&](const auto& reader) { dot_products<COUNT>(reader, in, m.cols, out + r, step); });
    }
  }
}

void multiply(const DecoctMatrix& m, const Inputs& in, int count, int64_t first, int64_t last, float* out) {
#if defined(DECOCT_COMPACT)
  for (int64_t k = 0; k < count; ++k) {
    const Inputs one{in.x + k * in.width, in.sums + k * in.groups, in.width, in.groups, nullptr};
    multiply_count<1>(m, one, first, last, out + k * rounded_up(m.rows, kRows));
  }
#else
  if (count == 1) return multiply_count<1>(m, in, first, last, out);
  multiply_count<kMostInputs>(m, in, first, last, out);
#endif
}

void unpack(const DecoctMatrix& m, int64_t first, int64_t last, int32_t type, void* to) {
  char* out = (char*)to;
  const auto panels = [&](auto bits, const auto& value) {
    for (int64_t panel = first; panel < last; ++panel)
      unpack_panel<decltype(bits)::value>(
          m, panel, value, m.layout == DECOCT_INTS, type, out + (panel - first) * kRows * m.cols * kSizes[type]);
  };
  switch (m.layout) {
    case DECOCT_TRELLIS: return unpack_trellis(m, first, last, type, out);
    case DECOCT_INTS: return with_bits<Plain, 1, 8>(m, panels);
    case DECOCT_TABLE: return with_bits<Entries, 1, 4>(m, panels);
    case DECOCT_MINIFLOAT: return (m.bits == 6 ? with_bits<Minifloats, 6, 6>(m, panels) : with_bits<Minifloats, 8, 8>(m, panels));
    default: break;
  }
  const Row row(m.cols);
  for (int64_t r = first * kRows; r < last * kRows && r < m.rows; ++r) {
    fill_row(m, r, row.entries);
    for (int64_t column = 0; column < m.cols; column += 16)
      store_some(out, (r - first * kRows) * m.cols + column, type, load<Floats>(row.entries + column), m.cols - column);
  }
}

void widen(const void* from, int32_t type, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16)
    store_some(to, i, DECOCT_F32, load_some(from, i, type, count - i), count - i);
}

void narrow(const float* from, int64_t count, int32_t type, void* to) {
  for (int64_t i = 0; i < count; i += 16)
    store_some(to, i, type, load_some(from, i, DECOCT_F32, count - i), count - i);
}

}  // namespace DECOCT_LEVEL
}  // namespace decoct
