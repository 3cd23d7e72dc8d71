// Products of typed inputs with a packed matrix, on several threads.
#pragma once

#include "matrix.h"

namespace decoct {

const Level& level_of(int32_t number);

// Rows of `out` begin `stride` numbers apart.
void multiply(
    const DecoctMatrix& m, const Level& level, const void* x, int32_t type, int64_t count, void* out, int64_t stride, int threads);

// Whether the level has a product with rounded inputs for the layout.
bool can_round(const DecoctMatrix& m, const Level& level);

// The same with inputs rounded to 8 bits, for many of them.
void multiply_rounded(const DecoctMatrix& m, const Level& level, const void* x, int32_t type, int64_t count, void* out, int64_t stride, int threads);

static inline int64_t size_of(int32_t type) { return type == DECOCT_F32 ? 4 : 2; }

}  // namespace decoct
