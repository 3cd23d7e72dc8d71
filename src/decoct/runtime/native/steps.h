// What lies between a network's products, for each instruction level. Numbers are rounded to the network's type wherever torch
// rounds them, so that greedy decoding says what transformers says.
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
  x = x < low ? low : x > high ? high : x;
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
  return p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

DECOCT_INLINE Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

DECOCT_INLINE Floats activated(Floats x, int32_t activation) {
  if (activation == DECOCT_SILU) return x / (exponential(-x) + 1.0f);
  if (activation == DECOCT_GELU_TANH)
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
  for (int i = 0; i < 16; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  return x;
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

template <int TYPE>
DECOCT_INLINE Floats some(const void* from, int64_t at, int64_t count) {
  return count >= 16 ? load_numbers(from, at, TYPE) : load_some(from, at, TYPE, count);
}

// One query among keys [seen][size]; `scores` is room for [seen, rounded up to 16] floats.
template <int TYPE>
void attend_one(const DecoctNetwork& n, const void* query, const void* keys, const void* values, int64_t seen, float* scores, void* out) {
  const int64_t size = n.head_size;
  for (int64_t p = 0; p < seen; ++p) {
    Floats sum = {};
    for (int64_t i = 0; i < size; i += 16) sum += some<TYPE>(query, i, size - i) * some<TYPE>(keys, p * size + i, size - i);
    scores[p] = sum_lanes(sum) * n.scale;
  }
  if (n.score_cap > 0) cap(scores, seen, n.score_cap);
  float most = scores[0];
  for (int64_t p = 1; p < seen; ++p) most = scores[p] > most ? scores[p] : most;
  for (int64_t p = seen; p < rounded_up(seen, 16); ++p) scores[p] = -INFINITY;
  Floats total = {};
  for (int64_t p = 0; p < seen; p += 16) {
    const Floats share = seen - p >= 16 ? exponential(load<Floats>(scores + p) - most) : Floats{};
    if (seen - p >= 16) {
      total += share;
      store(scores + p, share);
    } else {
      for (int64_t q = p; q < seen; ++q) scores[q] = std::exp(scores[q] - most), total[q - p] += scores[q];
    }
  }
  const float sum = sum_lanes(total);
  for (int64_t i = 0; i < size; i += 16) {
    Floats found = {};
    for (int64_t p = 0; p < seen; ++p) found += scores[p] * some<TYPE>(values, p * size + i, size - i);
    store_some(out, i, TYPE, found / sum, size - i);
  }
}

void attend(const DecoctNetwork& n, const void* query, const void* keys, const void* values, int64_t seen, float* scores, void* out) {
  if (n.type == DECOCT_F32) return attend_one<DECOCT_F32>(n, query, keys, values, seen, scores, out);
  if (n.type == DECOCT_F16) return attend_one<DECOCT_F16>(n, query, keys, values, seen, scores, out);
  attend_one<DECOCT_BF16>(n, query, keys, values, seen, scores, out);
}

constexpr Steps steps = {normalise, add, turn, activate, cap, attend};

}  // namespace DECOCT_LEVEL
}  // namespace decoct
