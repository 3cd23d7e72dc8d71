// What Python hands over of a llama-like network, for steps that give each sequence one more token.
#pragma once

#include "matrix.h"

extern "C" {

// One of the matrices whose products lie side by side. Those that no kernel multiplies are called back for.
struct DecoctPart {
  const DecoctMatrix* matrix;  // null: `call`
  const DecoctMatrix* inner;   // multiplied first, in float32 from there on; null: none
  int64_t rows;
  int32_t (*call)(int64_t handle, const void* x, int64_t count, void* out);  // 0: it failed
  int64_t handle;
};

struct DecoctLinear {
  const DecoctPart* parts;
  int64_t num_parts, rows, cols;
  const void* bias;  // [rows], in the network's type; null: none
};

// Root-mean-square norm. A gain in the network's type multiplies what was rounded to it, a float32 one before that.
struct DecoctNorm {
  const void* gain;  // null: no norm here
  int32_t gain_type;
  float eps;
};

struct DecoctBlock {
  DecoctNorm before_attention, before_mlp, after_attention, after_mlp, queries, keys;
  DecoctLinear qkv, out, gate_up, down;
  const void *cosines, *sines;  // [context][head_size], in the network's type; sines of the first half have a minus
  int64_t window;               // positions that a token sees, itself among them; 0: all
};

enum DecoctActivation : int32_t { DECOCT_SILU = 0, DECOCT_GELU = 1, DECOCT_GELU_TANH = 2 };

struct DecoctNetwork {
  int32_t type, level, threads, activation;  // type: of hidden states, keys, values
  int64_t num_blocks, heads, kv_heads, head_size, width, context, seats;
  float scale, score_cap, logit_cap;         // caps of 0: none
  const DecoctBlock* blocks;
  DecoctNorm final_norm;
  DecoctLinear head;
  void *keys, *values;  // [blocks][seats][kv_heads][context][head_size]
};
}

namespace decoct {

// What lies between products. Numbers are of the network's type where nothing else is said.
struct Steps {
  void (*normalise)(const void* x, int64_t count, const DecoctNorm& norm, int32_t type, void* out);
  void (*add)(void* x, const void* y, int64_t count, int32_t type);  // y to x
  void (*turn)(void* x, int64_t heads, int64_t size, const void* cosines, const void* sines, int32_t type);
  void (*activate)(const void* gate_up, int64_t count, int32_t activation, int32_t type, void* out);  // [2 * count] to [count]
  void (*cap)(float* x, int64_t count, float most);
  // The queries that share a head of keys and values [seen][head_size]; `room` is for `attention_room` floats, all of them finite.
  void (*attend)(const DecoctNetwork& n, const void* queries, const void* keys, const void* values, int64_t seen, float* room, void* out);
};

static inline int64_t attention_room(const DecoctNetwork& n, int64_t seen) {
  return n.heads / n.kv_heads * (rounded_up(seen, 16) + 2 * rounded_up(n.head_size, 16)) + 16 * rounded_up(n.head_size, 16);
}

}  // namespace decoct
