// What lies between a network's products, for each instruction level. Numbers are rounded to the network's type wherever torch
// rounds them, so that greedy decoding says what transformers says; but for scores of attention, which stay float32.
#pragma once

#include <cmath>

#include "network.h"
#include "vector.h"

namespace decoct {
namespace DECOCT_LEVEL {

DECOCT_INLINE Floats rounded(Floats values, int32_t type) {
  if (type == DECOCT_F32) return values;
  char lanes[64];
  put_numbers(lanes, 0, type, values);
  return numbers_at(lanes, 0, type);
}

// e**x to a few units in the last place.
DECOCT_INLINE Floats exponential(Floats x) {
  const Floats low = Floats{} - 87.33654f, high = Floats{} + 88.02969f;
  x = pick(x < low, low, pick(x > high, high, x));
  const Floats shifter = Floats{} + 12582912.0f;  // adding it rounds to whole numbers
  const Floats n = (x * 1.44269504f + shifter) - shifter;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (Floats)((convert<Ints>(n) + 127) << 23);
}

DECOCT_INLINE Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

DECOCT_INLINE Floats activated(Floats x, int32_t activation) {
  if (activation == DECOCT_SILU) return x / (exponential(-x) + 1.0f);
  if (activation == DECOCT_GELU_TANH)
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
  float lanes[16];
  store(lanes, x);
  for (float& lane : lanes) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.70710678f));
  return load<Floats>(lanes);
}

void normalise(const void* x, int64_t count, const DecoctNorm& norm, int32_t type, void* out) {
  Floats squares = {};
  for (int64_t i = 0; i < count; i += 16) {
    const Floats v = load_some(x, i, type, count - i);
    squares += v * v;
  }
  const float factor = 1.0f / std::sqrt(sum_lanes(squares) / (float)count + norm.eps);
  for (int64_t i = 0; i < count; i += 16) {
    const Floats v = load_some(x, i, type, count - i) * factor, gain = load_some(norm.gain, i, norm.gain_type, count - i);
    store_some(out, i, type, (norm.gain_type == type ? rounded(v, type) : v) * gain, count - i);
  }
}

void add(void* x, const void* y, int64_t count, int32_t type) {
  for (int64_t i = 0; i < count; i += 16)
    store_some(x, i, type, load_some(x, i, type, count - i) + load_some(y, i, type, count - i), count - i);
}

void turn(void* x, int64_t heads, int64_t size, const void* cosines, const void* sines, int32_t type) {
  const int64_t half = size / 2;
  const auto turned = [&](Floats a, Floats b, int64_t at, int64_t count) {
    const Floats cosine = load_some(cosines, at, type, count), sine = load_some(sines, at, type, count);
    return rounded(a * cosine, type) + rounded(b * sine, type);
  };
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < half; i += 16) {
      const int64_t at = head * size + i, count = half - i;
      const Floats a = load_some(x, at, type, count), b = load_some(x, at + half, type, count);
      store_some(x, at, type, turned(a, b, i, count), count);
      store_some(x, at + half, type, turned(b, a, half + i, count), count);
    }
}

void activate(const void* gate_up, int64_t count, int32_t activation, int32_t type, void* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const Floats gate = rounded(activated(load_some(gate_up, i, type, count - i), activation), type);
    store_some(out, i, type, gate * load_some(gate_up, count + i, type, count - i), count - i);
  }
}

void cap(float* x, int64_t count, float most) {
  for (int64_t i = 0; i < count; i += 16)
    store_some(x, i, DECOCT_F32, hyperbolic_tangent(load_some(x, i, DECOCT_F32, count - i) / most) * most, count - i);
}

#if defined(__AVX512F__)
// Lane j of a fold, in the numbering of two vectors side by side: PART lanes of each segment of 2 * PART lanes.
constexpr int folded_lane(int part, int j, bool upper) {
  const int segments = 8 / part, segment = j / part;
  return (segment >= segments ? 16 : 0) + segment % segments * 2 * part + j % part + (upper ? part : 0);
}

// Adds the upper half of each segment to the lower half; what is left of b comes after what is left of a.
template <int PART>
DECOCT_INLINE Floats fold(Floats a, Floats b) {
#define DECOCT_FOLDED(upper)                                                                                          \
  folded_lane(PART, 0, upper), folded_lane(PART, 1, upper), folded_lane(PART, 2, upper), folded_lane(PART, 3, upper), \
      folded_lane(PART, 4, upper), folded_lane(PART, 5, upper), folded_lane(PART, 6, upper),                          \
      folded_lane(PART, 7, upper), folded_lane(PART, 8, upper), folded_lane(PART, 9, upper),                          \
      folded_lane(PART, 10, upper), folded_lane(PART, 11, upper), folded_lane(PART, 12, upper),                       \
      folded_lane(PART, 13, upper), folded_lane(PART, 14, upper), folded_lane(PART, 15, upper)
  return __builtin_shufflevector(a, b, DECOCT_FOLDED(false)) + __builtin_shufflevector(a, b, DECOCT_FOLDED(true));
#undef DECOCT_FOLDED
}

// The sums of 16 vectors' lanes, one a lane.
DECOCT_INLINE Floats sums_of(const Floats (&v)[16]) {
  Floats eight[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) eight[i] = fold<8>(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) four[i] = fold<4>(eight[2 * i], eight[2 * i + 1]);
  return fold<1>(fold<2>(four[0], four[1]), fold<2>(four[2], four[3]));
}
#else
DECOCT_INLINE Floats sums_of(const Floats (&v)[16]) {
  float lanes[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) lanes[i] = sum_lanes(v[i]);
  return load<Floats>(lanes);
}
#endif

// Rows of `size` numbers as floats, `padded` apart, zeros behind each.
template <int TYPE>
DECOCT_INLINE void widen_rows(const void* from, int64_t first, int64_t count, int64_t size, int64_t padded, float* to) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < size; i += 16)
      store(to + r * padded + i, size - i >= 16 ? load_numbers(from, (first + r) * size + i, TYPE)
                                                : load_some(from, (first + r) * size + i, TYPE, size - i));
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

struct Raised {
  float largest, sum;
};

// e**(score - the largest of them), rounded to the type. As torch's fused attention: what they are multiplied with sees
// rounded numbers, their sum does not.
DECOCT_INLINE Raised raise(float* scores, int64_t count, int32_t type) {
  Floats most = Floats{} - INFINITY, total = {};
  for (int64_t p = 0; p < count; p += 16) {
    const Floats s = load<Floats>(scores + p);
    most = pick(s > most, s, most);
  }
  const float largest = largest_lane(most);
  for (int64_t p = 0; p < count; p += 16) {
    const Floats s = load<Floats>(scores + p), share = pick(s == Floats{} - INFINITY, Floats{}, exponential(s - largest));  // a NaN stays one
    total += share;
    store(scores + p, rounded_share(share, type));
  }
  return {largest, sum_lanes(total)};
}

// Shares of positions in what a query finds, from its scores; what lies behind them becomes zero.
DECOCT_INLINE void soften(float* scores, int64_t seen) {
  for (int64_t p = seen; p < rounded_up(seen, 16); ++p) scores[p] = -INFINITY;
  const float factor = 1.0f / raise(scores, rounded_up(seen, 16), DECOCT_F32).sum;
  for (int64_t p = 0; p < seen; p += 16) store(scores + p, load<Floats>(scores + p) * factor);
}

template <int TYPE>
void attend_typed(const DecoctNetwork& n, const void* queries, const void* keys, const void* values, int64_t seen, float* room, void* out) {
  const int64_t size = n.head_size, padded = rounded_up(size, 16), group = n.heads / n.kv_heads, all = rounded_up(seen, 16);
  float *scores = room, *query = scores + group * all, *found = query + group * padded, *tile = found + group * padded;
  widen_rows<TYPE>(queries, 0, group, size, padded, query);
  memset(found, 0, group * padded * sizeof(float));
  for (int64_t p = 0; p < seen; p += 16) {
    const int64_t here = seen - p < 16 ? seen - p : 16;
    widen_rows<TYPE>(keys, p, here, size, padded, tile);
    for (int64_t q = 0; q < group; ++q) {
      Floats sums[16] = {};
      for (int64_t i = 0; i < padded; i += 16) {
        const Floats some = load<Floats>(query + q * padded + i);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) sums[r] += some * load<Floats>(tile + r * padded + i);
      }
      store(scores + q * all + p, sums_of(sums) * n.scale);
    }
  }
  for (int64_t q = 0; q < group; ++q) {
    if (n.score_cap > 0) cap(scores + q * all, seen, n.score_cap);
    soften(scores + q * all, seen);
  }
  for (int64_t p = 0; p < seen; p += 16) {
    const int64_t here = seen - p < 16 ? seen - p : 16;
    widen_rows<TYPE>(values, p, here, size, padded, tile);
    for (int64_t q = 0; q < group; ++q)
      for (int64_t i = 0; i < padded; i += 64) {
        const int64_t parts = padded - i < 64 ? (padded - i) / 16 : 4;
        Floats sums[4] = {};
        for (int64_t r = 0; r < here; ++r) {
          const float share = scores[q * all + p + r];
          const float* row = tile + r * padded + i;
#pragma GCC unroll 4
          for (int part = 0; part < 4; ++part)
            if (part < parts) sums[part] += share * load<Floats>(row + 16 * part);
        }
        float* to = found + q * padded + i;
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part)
          if (part < parts) store(to + 16 * part, load<Floats>(to + 16 * part) + sums[part]);
      }
  }
  for (int64_t q = 0; q < group; ++q)
    for (int64_t i = 0; i < size; i += 16) store_some(out, q * size + i, TYPE, load<Floats>(found + q * padded + i), size - i);
}

void attend(const DecoctNetwork& n, const void* queries, const void* keys, const void* values, int64_t seen, float* room, void* out) {
  if (n.type == DECOCT_F32) return attend_typed<DECOCT_F32>(n, queries, keys, values, seen, room, out);
  if (n.type == DECOCT_F16) return attend_typed<DECOCT_F16>(n, queries, keys, values, seen, room, out);
  attend_typed<DECOCT_BF16>(n, queries, keys, values, seen, room, out);
}

constexpr Steps steps = {normalise, add, turn, activate, cap, attend};

}  // namespace DECOCT_LEVEL
}  // namespace decoct
