// Products of many inputs, rounded to 8 bits, with integers: sums of products of bytes, four to an instruction's lane. For prompts,
// and only where a caller asks for it: rounding inputs is what other engines do, and loses about half a percent of each.
#pragma once

#include "panels.h"

#if defined(__AVX512VNNI__)

namespace decoct {
namespace DECOCT_LEVEL {

typedef int8_t SignedBytes __attribute__((vector_size(16)));

// Inputs [count][cols] of `type` as bytes: whole tiles of kTile, a tile's numbers of four columns side by side.
void round_inputs(const DecoctMatrix& m, const void* x, int32_t type, int64_t first, int64_t last, const RoundedInputs& to) {
  for (int64_t i = first; i < last; ++i) {
    int8_t* codes = to.codes + i / kTile * to.width * kTile + i % kTile * 4;
    for (int64_t block = 0; block < to.blocks; ++block) {
      const int64_t begin = block * to.size, end = begin + to.size < m.cols ? begin + to.size : m.cols;
      Floats most = {};
      for (int64_t c = begin; c < end; c += 16) {
        const Floats v = load_some(x, i * m.cols + c, type, end - c);
        most = v > most ? v : -v > most ? -v : most;
      }
      float largest = most[0];
      for (int k = 1; k < 16; ++k) largest = most[k] > largest ? most[k] : largest;
      const float scale = largest / 127, factor = largest > 0 ? 127 / largest : 0;
      int64_t sum = 0;
      for (int64_t c = begin; c < end; c += 16) {
        const Floats shifter = Floats{} + 12582912.0f;  // adding it rounds to whole numbers
        const Floats whole = (load_some(x, i * m.cols + c, type, end - c) * factor + shifter) - shifter;
        int8_t bytes[16];
        store(bytes, __builtin_convertvector(__builtin_convertvector(whole, Ints), SignedBytes));
        for (int k = 0; k < 16; ++k) sum += bytes[k];
        for (int k = 0; k < 16 && c + k < end; k += 4) memcpy(codes + (c + k) * kTile, bytes + k, 4);
      }
      const int64_t at = (i / kTile * to.blocks + block) * kTile + i % kTile;
      to.scale[at] = scale;
      to.sums[at] = scale * (float)sum;
    }
  }
}

// A panel's codes as bytes, four columns of a row to a lane.
template <int BITS>
void spread_codes(const DecoctMatrix& m, int64_t panel, int64_t width, uint32_t* to) {
  const uint32_t* unit = (const uint32_t*)m.codes + panel * (width / kUnit) * BITS * kRows;
  for (int64_t column = 0; column < width; column += kUnit, unit += BITS * kRows)
#pragma GCC unroll 8
    for (int four = 0; four < kUnit / 4; ++four, to += kRows) {
      constexpr uint32_t mask = (1u << BITS) - 1;
      Words bytes = shifted<BITS>(unit, 4 * four) & mask;
#pragma GCC unroll 3
      for (int k = 1; k < 4; ++k) bytes |= (shifted<BITS>(unit, 4 * four + k) & mask) << 8 * k;
      store(to, bytes);
    }
}

// One tile of inputs with one panel; `codes` are the panel's, spread.
void multiply_tile(const DecoctMatrix& m, const RoundedInputs& in, int64_t tile, int64_t panel, const uint32_t* codes, Floats (&total)[kTile]) {
  const uint32_t* x = (const uint32_t*)(in.codes + tile * in.width * kTile);
  const float *scales = in.scale + tile * in.blocks * kTile, *sums = in.sums + tile * in.blocks * kTile;
  const float middle = (float)(1 << m.bits) / 2;
  for (int t = 0; t < kTile; ++t) total[t] = Floats{};
  for (int64_t block = 0; block < in.blocks; ++block, scales += kTile, sums += kTile) {
    const int64_t last = (block + 1) * in.size < m.cols ? in.size : m.cols - block * in.size;
    __m512i products[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) products[t] = _mm512_setzero_si512();
    for (int64_t column = 0; column < last; column += 4, x += kTile, codes += kRows) {
      const __m512i w = _mm512_loadu_si512(codes);
#pragma GCC unroll 16
      for (int t = 0; t < kTile; ++t)  // as text, since GCC 12 copies every sum in front of the intrinsic
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(products[t]) : "v"(w), "m"(x[t]));
    }
    const int64_t group = m.groups == 1 ? 0 : block * in.size / m.group_size, at = (panel * m.groups + group) * kRows;
    const Floats scale = m.scale ? load_numbers(m.scale, at, m.scale_type) : Floats{} + 1.0f;
    const Floats zero = scale * (m.zero ? load_numbers(m.zero, at, m.zero_type) : Floats{} + middle);
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t)
      total[t] += (Floats)_mm512_cvtepi32_ps(products[t]) * (scale * scales[t]) - zero * sums[t];
  }
}

void multiply_rounded(
    const DecoctMatrix& m, const RoundedInputs& in, int64_t first, int64_t last, int32_t type, char* out, int64_t stride, uint32_t* room) {
  const auto spread = [&](int64_t panel, uint32_t* to) {
    switch (m.bits) {
      case 1: return spread_codes<1>(m, panel, in.width, to);
      case 2: return spread_codes<2>(m, panel, in.width, to);
      case 3: return spread_codes<3>(m, panel, in.width, to);
      case 4: return spread_codes<4>(m, panel, in.width, to);
      case 5: return spread_codes<5>(m, panel, in.width, to);
      case 6: return spread_codes<6>(m, panel, in.width, to);
      case 7: return spread_codes<7>(m, panel, in.width, to);
      default: return spread_codes<8>(m, panel, in.width, to);
    }
  };
  const int64_t panel_words = in.width / 4 * kRows;
  for (int64_t panel = first; panel < last; ++panel) spread(panel, room + (panel - first) * panel_words);
  for (int64_t tile = 0; tile * kTile < in.count; ++tile)
    for (int64_t panel = first; panel < last; ++panel) {
      Floats total[kTile];
      multiply_tile(m, in, tile, panel, room + (panel - first) * panel_words, total);
      const int64_t rows = m.rows - panel * kRows;
      for (int64_t t = 0; t < kTile && tile * kTile + t < in.count; ++t)
        store_some(out, (tile * kTile + t) * stride + panel * kRows, type, total[t], rows);
    }
}

constexpr RoundedProduct rounded_product = {round_inputs, multiply_rounded};

}  // namespace DECOCT_LEVEL
}  // namespace decoct

#endif
