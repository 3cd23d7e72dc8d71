// Attention of many queries at once, for each instruction level: two products by small tiles in registers, in float32, and a
// softmax between them while a few rows of scores lie in the cache.
#pragma once

#include "attention.h"
#include "steps.h"

namespace decoct {
namespace DECOCT_LEVEL {

#if defined(__AVX512F__)
constexpr int kTall = 8;  // with two vectors beside each other half of the registers
#else
constexpr int kTall = 2;
#endif

typedef Floats Tile[kTall][2];

// sums[i] += a[i][k] * b[k] over all k; rows of `a` lie `step` apart, rows of `b` hold kAbreast numbers.
DECOCT_INLINE void add_products(const float* a, int64_t step, const float* b, int64_t count, Tile& sums) {
  for (int64_t k = 0; k < count; ++k) {
    const Floats low = load<Floats>(b + kAbreast * k), high = load<Floats>(b + kAbreast * k + 16);
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i) {
      const Floats one = Floats{} + a[i * step + k];
      sums[i][0] += one * low;
      sums[i][1] += one * high;
    }
  }
}

DECOCT_INLINE void store_tile(const Tile& sums, int64_t step, float* to) {
#pragma GCC unroll 8
  for (int i = 0; i < kTall; ++i) {
    store(to + i * step, sums[i][0]);
    store(to + i * step + 16, sums[i][1]);
  }
}

// Numbers that are not negative nor subnormal, or zero, as the type holds them.
DECOCT_INLINE Floats rounded_share(Floats share, int32_t type) {
  if (type == DECOCT_F32) return share;
  if (type == DECOCT_F16) return from_f16(to_f16(share));
#if defined(__AVX512BF16__)
  return from_bf16((Halves)_mm512_cvtneps_pbh((__m512)share));
#else
  return from_bf16(to_bf16(share));
#endif
}

// e**(score - the largest of them), rounded to the type; gives what makes their sum one. As torch: what they are multiplied
// with sees rounded numbers, the sum does not.
DECOCT_INLINE float raise(float* scores, int64_t count, int32_t type) {
  Floats most = Floats{} - INFINITY, total = {};
  for (int64_t p = 0; p < count; p += 16) {
    const Floats s = load<Floats>(scores + p);
    most = s > most ? s : most;
  }
  float largest = most[0];
  for (int i = 1; i < 16; ++i) largest = most[i] > largest ? most[i] : largest;
  for (int64_t p = 0; p < count; p += 16) {
    const Floats s = load<Floats>(scores + p), share = s > Floats{} - INFINITY ? exponential(s - largest) : Floats{};
    total += share;
    store(scores + p, rounded_share(share, type));
  }
  return 1.0f / sum_lanes(total);
}

void pack_head(const DecoctAttention& a, int64_t head, int64_t first, int64_t last, float* keys, float* values) {
  const int64_t size = a.head_size, all = rounded_up(a.seen, kAbreast);
  for (int64_t p = first; p < last; p += 16)
    for (int64_t c = 0; c < rounded_up(size, kAbreast); c += 16) {
      Floats block[16] = {};
      for (int r = 0; r < 16; ++r) {
        const auto at = [&](const DecoctHeads& from) { return head * from.head + (p + r) * from.token + c; };
        const bool real = p + r < a.seen && c < size;
        store(values + c / kAbreast * kAbreast * all + (p + r) * kAbreast + c % kAbreast,
              real ? load_some(a.values.numbers, at(a.values), a.type, size - c) : Floats{});
        if (real) block[r] = load_some(a.keys.numbers, at(a.keys), a.type, size - c);
      }
      transpose(block);
      float* to = keys + p / kAbreast * kAbreast * size + p % kAbreast;
      for (int i = 0; i < 16 && c + i < size; ++i) store(to + (c + i) * kAbreast, block[i]);
    }
}

void attend_prompt(const DecoctAttention& a, int64_t head, int64_t first, int64_t last, const float* keys, const float* values, float* room) {
  const int64_t size = a.head_size, padded = rounded_up(size, kAbreast), all = rounded_up(a.seen, kAbreast);
  const int64_t group = a.heads / a.kv_heads, before = a.seen - a.tokens;
  float *query = room, *scores = query + kTall * size, *found = scores + kTall * all;
  for (int64_t row = first; row < last; row += kTall) {
    const int64_t count = last - row < kTall ? last - row : kTall;
    const auto past = [&](int64_t i) { return before + (row + i) / group + 1; };  // behind the query's own position
    const auto since = [&](int64_t i) { return a.window > 0 && past(i) > a.window ? past(i) - a.window : 0; };
    const int64_t begin = since(0) / kAbreast * kAbreast, end = rounded_up(past(count - 1), kAbreast);
    for (int64_t i = 0; i < kTall; ++i)
      for (int64_t c = 0; c < size; ++c) query[i * size + c] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (row + i) / group * a.queries.token + (head * group + (row + i) % group) * a.queries.head;
      for (int64_t c = 0; c < size; c += 16)
        store_some(query, i * size + c, DECOCT_F32, load_some(a.queries.numbers, at + c, a.type, size - c) * a.scale, size - c);
    }
    for (int64_t p = begin; p < end; p += kAbreast) {
      Tile sums = {};
      add_products(query, size, keys + p * size, size, sums);
      store_tile(sums, all, scores + p);
    }
    float factors[kTall] = {};
    for (int64_t i = 0; i < count; ++i) {
      float* mine = scores + i * all;
      if (a.score_cap > 0) cap(mine + begin, end - begin, a.score_cap);
      for (int64_t p = begin; p < since(i); ++p) mine[p] = -INFINITY;
      for (int64_t p = past(i); p < end; ++p) mine[p] = -INFINITY;
      factors[i] = raise(mine + begin, end - begin, a.type);
    }
    for (int64_t c = 0; c < padded; c += kAbreast) {
      Tile sums = {};
      add_products(scores + begin, all, values + c * all + begin * kAbreast, end - begin, sums);
      store_tile(sums, padded, found + c);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = ((row + i) / group * a.heads + head * group + (row + i) % group) * size;
      for (int64_t c = 0; c < size; c += 16) store_some(a.out, at + c, a.type, load<Floats>(found + i * padded + c) * factors[i], size - c);
    }
  }
}

constexpr Prompts prompts = {kTall, pack_head, attend_prompt};

}  // namespace DECOCT_LEVEL
}  // namespace decoct
