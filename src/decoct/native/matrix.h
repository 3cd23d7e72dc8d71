// What Python hands over: one packed matrix, and the functions that each instruction level has for it.
#pragma once

#include <cstdint>

extern "C" {

// Of numbers in memory.
enum DecoctType : int32_t { DECOCT_F32 = 0, DECOCT_F16 = 1, DECOCT_BF16 = 2, DECOCT_U8 = 3, DECOCT_U16 = 4, DECOCT_I32 = 5 };

// Ways of storing a matrix.
enum DecoctLayout : int32_t {
  DECOCT_INTS = 0,        // value = (code - zero) * scale
  DECOCT_TABLE = 1,       // value = table[code] * scale, up to 4 bits
  DECOCT_MINIFLOAT = 2,   // value = small floating-point number * scale
  DECOCT_DENSE = 3,       // the values themselves, row by row
  DECOCT_ROW_TABLES = 4,  // value = table of the row[code], up to 4 bits, row by row
  DECOCT_VECTORS = 5,     // codes of d neighbouring entries, row by row, summed over several codebooks; times a scale
  DECOCT_BITMAP = 6,      // a bitmap, and the values where it is set
  DECOCT_INDEXED = 7,     // values and their columns
  DECOCT_TRELLIS = 8,     // value = table[window of a stream of digits] * scale, stripes of columns one after the other
};

// The first three layouts are "panels": 16 rows side by side. Word i of the panel's rows, 32 bits each, lie next to each
// other, and so do the scales of one group. Rows and columns are filled up with zeros.
struct DecoctMatrix {
  int32_t layout;
  int32_t bits;                // of a code
  int32_t exponent, mantissa;  // bits of a MINIFLOAT
  int32_t d, books;            // VECTORS: entries of a code, codebooks; TRELLIS: columns of a stripe, digits before the newest
  int32_t scale_type, zero_type, value_type, index_type;
  int64_t rows, cols;
  int64_t groups, group_size;  // of columns that share a scale; a single group may be longer than the row
  int64_t stride;              // bytes of a row of codes; TRELLIS: of a sequence
  int64_t rows_per_table;      // ROW_TABLES, VECTORS; TRELLIS: digits of a sequence, a multiple of 8
  int64_t count;               // of `values`: BITMAP; bytes of `codes`: ROW_TABLES, VECTORS; TRELLIS: sequences of a stripe
  const void* codes;           // panels [rows / 16][cols / 32 * bits][16] of uint32; or rows [rows][stride] of bytes; TRELLIS: 4 more bytes
  const void* scale;           // panels [rows / 16][groups][16]; VECTORS: [rows]; TRELLIS: [padded rows]; null: 1
  const void* zero;            // panels [rows / 16][groups][16]; null: the middle, 2**(bits - 1)
  const void* values;          // DENSE: [rows][cols]; BITMAP, INDEXED: of all rows, one after the other
  const void* index;           // INDEXED: columns of the values
  const int64_t* starts;       // BITMAP, INDEXED: the first value of each row, and the end [rows + 1]
  const float* table;          // TABLE: [16]; ROW_TABLES: [tables][16]; VECTORS: [tables][books][2**bits][d]; TRELLIS: [2**(bits * (books + 1))]
};
}

namespace decoct {

constexpr int kRows = 16;       // of a panel
constexpr int kUnit = 32;       // codes that fill whole words, whatever their bits
constexpr int kAhead = 160;     // lines of the cache, 64 bytes each, between what is read and what is asked for
constexpr int kMostInputs = 4;  // rows of inputs that one pass over a block of rows serves

static inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Inputs as the levels read them: float rows, padded with zeros to whole units, and their sums over each group.
struct Inputs {
  const float* x;     // [count][width]
  const float* sums;  // [count][groups]
  int64_t width, groups;
  const uint32_t* pairs;  // [count][width / 2], two bf16 each, in the order of `pair_inputs`; for `multiply_pairs` alone
};

struct Steps;        // network.h
struct Prompts;      // attention.h
struct Predictions;  // divergence.h

constexpr int kTile = 12;  // inputs that are multiplied together in registers, where there are many

// Many inputs as bytes; see rounded.h. `size` columns share a scale.
struct RoundedInputs {
  int8_t* codes;       // [tiles][width / 4][kTile][4]
  float *scale, *sums;  // [tiles][blocks][kTile]; of the codes in units of the scale
  int64_t count, width, size, blocks;
};

struct RoundedProduct {
  // Inputs [first, last).
  void (*round_inputs)(const DecoctMatrix&, const void* x, int32_t type, int64_t first, int64_t last, const RoundedInputs& to);
  // Blocks [first, last) of 16 rows for all inputs; `room` is for 4 * width words a block.
  void (*multiply)(
      const DecoctMatrix&, const RoundedInputs&, int64_t first, int64_t last, int32_t type, char* out, int64_t stride, uint32_t* room);
};

struct Level {
  // out[i * padded rows + r] for inputs i in [0, count), count 1 or kMostInputs, and rows r of blocks [first, last) of 16.
  void (*multiply)(const DecoctMatrix&, const Inputs&, int count, int64_t first, int64_t last, float* out);
  // Rows of blocks [first, last) of 16, in `type`, to out [rows][cols] whose first row is row 16 * first.
  void (*unpack)(const DecoctMatrix&, int64_t first, int64_t last, int32_t type, void* out);
  // Numbers of any type as floats, and back, rounded to the nearest.
  void (*widen)(const void* from, int32_t type, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, int32_t type, void* to);
  // As `multiply`, for inputs that are bf16; null where the level has no such instructions. See pairs.h.
  void (*multiply_pairs)(const DecoctMatrix&, const Inputs&, int count, int64_t first, int64_t last, float* out);
  bool (*pairs_fit)(const DecoctMatrix&);
  void (*pair_inputs)(const DecoctMatrix&, const uint16_t* x, int64_t width, uint32_t* pairs);
  const Steps* steps;
  const Prompts* prompts;
  const Predictions* predictions;
  const RoundedProduct* rounded;  // null where the level has no such instructions
};

extern const Level portable_level, avx2_level, avx512_level, neon_level, avx512bf16_level;

}  // namespace decoct
