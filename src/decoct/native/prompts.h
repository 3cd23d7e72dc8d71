// Attention of many queries at once, for each instruction level: two products by small tiles in registers, in float32, and a
// softmax between them while a few rows of scores lie in the cache.
#pragma once

#include "attention.h"
#include "steps.h"

namespace decoct {
namespace DECOCT_LEVEL {

#if defined(__AVX512F__)
constexpr int kTall = 8;  // with two vectors beside each other half of the registers
#elif defined(__AVX2__)
constexpr int kTall = 3;
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

DECOCT_INLINE Floats numbers_of(const DecoctHeads& from, int32_t type, int64_t at, int64_t count) {
  return load_some(from.numbers, at, type, count);
}

// Channels across positions: [position / 32][channel][position % 32].
void pack_across(const DecoctHeads& from, const DecoctAttention& a, Head of, int64_t first, int64_t last, float* to) {
  const int64_t size = a.head_size;
  for (int64_t p = first; p < last; p += 16)
    for (int64_t c = 0; c < size; c += 16) {
      Floats block[16] = {};
      for (int r = 0; r < 16 && p + r < a.seen; ++r)
        block[r] = numbers_of(from, a.type, of.sequence * from.sequence + of.head * from.head + (p + r) * from.token + c, size - c);
      transpose(block);
      float* panel = to + p / kAbreast * kAbreast * size + p % kAbreast;
      for (int i = 0; i < 16 && c + i < size; ++i) store(panel + (c + i) * kAbreast, block[i]);
    }
}

// Positions across channels: [channel / 32][position][channel % 32].
void pack_along(const DecoctHeads& from, const DecoctAttention& a, Head of, int64_t first, int64_t last, float* to) {
  const int64_t size = a.head_size, all = rounded_up(a.seen, kAbreast);
  for (int64_t p = first; p < last; ++p)
    for (int64_t c = 0; c < rounded_up(size, kAbreast); c += 16) {
      const bool real = p < a.seen && c < size;
      const int64_t at = of.sequence * from.sequence + of.head * from.head + p * from.token + c;
      store(to + c / kAbreast * kAbreast * all + p * kAbreast + c % kAbreast, real ? numbers_of(from, a.type, at, size - c) : Floats{});
    }
}

void pack_head(const DecoctAttention& a, Head of, int64_t first, int64_t last, float* keys, float* values) {
  pack_across(a.keys, a, of, first, last, keys);
  pack_along(a.values, a, of, first, last, values);
}

// Some neighbouring queries of a head of keys and values, counted token by token.
struct Queries {
  const DecoctAttention& a;
  Head of;
  int64_t row, count, group, begin, end;  // begin, end: positions that any of them sees, in whole panels

  Queries(const DecoctAttention& attention, Head head, int64_t first, int64_t last)
      : a(attention), of(head), row(first), count(last - first < kTall ? last - first : kTall), group(a.heads / a.kv_heads) {
    begin = since(0) / kAbreast * kAbreast;
    end = rounded_up(past(count - 1), kAbreast);
  }
  int64_t token(int64_t i) const { return (row + i) / group; }
  int64_t head(int64_t i) const { return of.head * group + (row + i) % group; }
  int64_t past(int64_t i) const { return a.seen - a.tokens + token(i) + 1; }  // behind the query's own position
  int64_t since(int64_t i) const { return a.window > 0 && past(i) > a.window ? past(i) - a.window : 0; }
  int64_t in(const DecoctHeads& from, int64_t i) const { return of.sequence * from.sequence + head(i) * from.head + token(i) * from.token; }
  int64_t in_rows(int64_t i) const { return ((of.sequence * a.tokens + token(i)) * a.heads + head(i)) * a.head_size; }
  int64_t level(int64_t i) const { return (of.sequence * a.heads + head(i)) * a.tokens + token(i); }

  // Rows of floats times `factor`, `step` apart; what lies behind them, and behind the last query, is zero.
  void widen(const DecoctHeads& from, float factor, int64_t step, float* to) const {
    memset(to, 0, kTall * step * sizeof(float));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < a.head_size; c += 16)
        store_some(to, i * step + c, DECOCT_F32, numbers_of(from, a.type, in(from, i) + c, a.head_size - c) * factor, a.head_size - c);
  }

  // Products with every position's channels, packed across.
  void score(const float* rows, int64_t step, const float* across, float* to) const {
    const int64_t all = rounded_up(a.seen, kAbreast);
    for (int64_t p = begin; p < end; p += kAbreast) {
      Tile sums = {};
      add_products(rows, step, across + p * a.head_size, a.head_size, sums);
      store_tile(sums, all, to + p);
    }
  }

  // Sums over positions, packed along.
  void gather(const float* shares, const float* along, float* to) const {
    const int64_t padded = rounded_up(a.head_size, kAbreast), all = rounded_up(a.seen, kAbreast);
    for (int64_t c = 0; c < padded; c += kAbreast) {
      Tile sums = {};
      add_products(shares + begin, all, along + c * all + begin * kAbreast, end - begin, sums);
      store_tile(sums, padded, to + c);
    }
  }

  void hide(int64_t i, float value, float* row_of) const {
    for (int64_t p = begin; p < since(i); ++p) row_of[p] = value;
    for (int64_t p = past(i); p < end; ++p) row_of[p] = value;
  }
};

void attend_prompt(const DecoctAttention& a, Head of, int64_t first, int64_t last, const float* keys, const float* values, float* room) {
  const int64_t size = a.head_size, padded = rounded_up(size, kAbreast), all = rounded_up(a.seen, kAbreast);
  float *query = room, *scores = query + kTall * size, *found = scores + kTall * all;
  for (int64_t row = first; row < last; row += kTall) {
    const Queries some(a, of, row, last);
    some.widen(a.queries, a.scale, size, query);
    some.score(query, size, keys, scores);
    float factors[kTall] = {};
    for (int64_t i = 0; i < some.count; ++i) {
      float* mine = scores + i * all;
      if (a.score_cap > 0) cap(mine + some.begin, some.end - some.begin, a.score_cap);
      some.hide(i, -INFINITY, mine);
      const Raised raised = raise(mine + some.begin, some.end - some.begin, a.score_cap > 0 ? (int32_t)DECOCT_F32 : a.type);
      factors[i] = 1.0f / raised.sum;
      if (a.score_cap > 0) {  // as torch's plain softmax, which models with a cap use: shares are rounded last
        for (int64_t p = some.begin; p < some.end; p += 16) store(mine + p, rounded_share(load<Floats>(mine + p) * factors[i], a.type));
        factors[i] = 1.0f;
      }
      if (a.levels) a.levels[some.level(i)] = raised.largest + std::log(raised.sum);
    }
    some.gather(scores, values, found);
    for (int64_t i = 0; i < some.count; ++i)
      for (int64_t c = 0; c < size; c += 16)
        store_some(a.out, some.in_rows(i) + c, a.type, load<Floats>(found + i * padded + c) * factors[i], size - c);
  }
}

// sums[p] += shares[i][p] * rows[i] for positions [begin, end); rows and sums are `padded` wide.
DECOCT_INLINE void scatter(const float* shares, int64_t all, const float* rows, int64_t padded, int64_t begin, int64_t end, float* sums) {
  for (int64_t c = 0; c < padded; c += kAbreast) {
    Tile row;
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i) row[i][0] = load<Floats>(rows + i * padded + c), row[i][1] = load<Floats>(rows + i * padded + c + 16);
    for (int64_t p = begin; p < end; ++p) {
      float* at = sums + p * padded + c;
      Floats low = load<Floats>(at), high = load<Floats>(at + 16);
#pragma GCC unroll 8
      for (int i = 0; i < kTall; ++i) {
        const Floats one = Floats{} + shares[i * all + p];
        low += one * row[i][0];
        high += one * row[i][1];
      }
      store(at, low);
      store(at + 16, high);
    }
  }
}

void differentiate_head(const DecoctAttentionGradient& g, Head of, float* room) {
  const DecoctAttention& a = g.forward;
  const int64_t size = a.head_size, padded = rounded_up(size, kAbreast), all = rounded_up(a.seen, kAbreast);
  float *keys = room, *values = keys + all * size, *along = values + all * size, *d_keys = along + all * padded;
  float *d_values = d_keys + all * padded, *query = d_values + all * padded, *d_out = query + kTall * padded;
  float *shares = d_out + kTall * padded, *changes = shares + kTall * all, *found = changes + kTall * all;
  pack_across(a.keys, a, of, 0, all, keys);
  pack_across(a.values, a, of, 0, all, values);
  pack_along(a.keys, a, of, 0, all, along);
  memset(d_keys, 0, 2 * all * padded * sizeof(float));
  const int64_t rows = a.tokens * (a.heads / a.kv_heads);
  for (int64_t row = 0; row < rows; row += kTall) {
    const Queries some(a, of, row, rows);
    some.widen(a.queries, a.scale, padded, query);
    some.widen(g.out, 1.0f, padded, d_out);
    some.score(query, padded, keys, shares);
    some.score(d_out, padded, values, changes);
    for (int64_t i = 0; i < kTall; ++i) {
      float *mine = shares + i * all, *change = changes + i * all;
      if (i >= some.count) {
        memset(mine + some.begin, 0, (some.end - some.begin) * sizeof(float));
        memset(change + some.begin, 0, (some.end - some.begin) * sizeof(float));
        continue;
      }
      Floats products = {};
      for (int64_t c = 0; c < size; c += 16) products += load_some(a.out, some.in_rows(i) + c, a.type, size - c) * load<Floats>(d_out + i * padded + c);
      const float mean = sum_lanes(products), level = a.levels[some.level(i)];
      some.hide(i, -INFINITY, mine);
      for (int64_t p = some.begin; p < some.end; p += 16) {
        const Floats s = load<Floats>(mine + p), share = pick(s == Floats{} - INFINITY, Floats{}, exponential(s - level));
        store(mine + p, share);
        store(change + p, share * (load<Floats>(change + p) - mean));
      }
    }
    some.gather(changes, along, found);
    for (int64_t i = 0; i < some.count; ++i)
      for (int64_t c = 0; c < size; c += 16)
        store_some(g.queries, some.in_rows(i) + c, a.type, load<Floats>(found + i * padded + c) * a.scale, size - c);
    scatter(shares, all, d_out, padded, some.begin, some.end, d_values);
    scatter(changes, all, query, padded, some.begin, some.end, d_keys);
  }
  for (int64_t p = 0; p < a.seen; ++p)
    for (int64_t c = 0; c < size; c += 16) {
      const int64_t at = ((of.sequence * a.seen + p) * a.kv_heads + of.head) * size + c;
      store_some(g.keys, at, a.type, load<Floats>(d_keys + p * padded + c), size - c);
      store_some(g.values, at, a.type, load<Floats>(d_values + p * padded + c), size - c);
    }
}

constexpr Prompts prompts = {kTall, pack_head, attend_prompt, differentiate_head};

}  // namespace DECOCT_LEVEL
}  // namespace decoct
