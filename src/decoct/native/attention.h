// Attention of a prompt's tokens, each to the tokens of its sequence up to itself.
#pragma once

#include "matrix.h"

extern "C" {

// The numbers of a head and token lie one after the other; sequences, heads and tokens as many numbers apart as it says.
struct DecoctHeads {
  const void* numbers;
  int64_t sequence, head, token;
};

struct DecoctAttention {
  int32_t type;  // of all numbers
  int64_t sequences, heads, kv_heads, head_size, tokens, seen;
  int64_t window;  // tokens that one sees, itself among them; 0: all
  float scale, score_cap;
  DecoctHeads queries, keys, values;  // of the tokens; of all seen, the tokens' own last
  void* out;      // [sequences][tokens][heads][head_size]
  float* levels;  // [sequences][heads][tokens]: logarithms of the sums of e**score, for the gradients; null: not needed
};

// What `out` becomes by its gradient; of whole sequences: as many tokens as are seen.
struct DecoctAttentionGradient {
  DecoctAttention forward;
  DecoctHeads out;                // its gradient
  void *queries, *keys, *values;  // gradients: [sequences][tokens][heads, or kv_heads][head_size]
};
}

namespace decoct {

constexpr int64_t kAbreast = 32;  // positions, and channels of values, that lie side by side

struct Head {
  int64_t sequence, head;  // of keys and values
};

// For one head of keys and values. They are packed once, as floats: keys [position / 32][channel][position % 32], values
// [channel / 32][position][channel % 32], both filled up with zeros.
struct Prompts {
  int64_t tall;  // queries that are multiplied together
  void (*pack)(const DecoctAttention& a, Head of, int64_t first, int64_t last, float* keys, float* values);
  // Queries of the head, counted token by token; `room` is for `prompt_room` floats.
  void (*attend)(const DecoctAttention& a, Head of, int64_t first, int64_t last, const float* keys, const float* values, float* room);
  // All gradients of the head; `room` is for `gradient_room` floats.
  void (*differentiate)(const DecoctAttentionGradient& g, Head of, float* room);
};

static inline int64_t prompt_room(const DecoctAttention& a, int64_t tall) {
  return tall * (a.head_size + rounded_up(a.seen, kAbreast) + rounded_up(a.head_size, kAbreast));
}

static inline int64_t gradient_room(const DecoctAttention& a, int64_t tall) {
  const int64_t all = rounded_up(a.seen, kAbreast), padded = rounded_up(a.head_size, kAbreast);
  return all * (2 * a.head_size + 3 * padded) + tall * (2 * all + 3 * padded);
}

}  // namespace decoct
