// The functions that Python calls, and the choice of the instruction level.
#include "exported.h"
#include "pool.h"
#include "product.h"

namespace decoct {

enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2, NEON = 3, AVX512BF16 = 4 };

const Level& level_of(int32_t number) {
#if defined(DECOCT_X86_BF16)
  if (number == AVX512BF16) return avx512bf16_level;
#endif
#if defined(DECOCT_X86)
  if (number == AVX512) return avx512_level;
  if (number == AVX2) return avx2_level;
#endif
#if defined(DECOCT_ARM)
  if (number == NEON) return neon_level;
#endif
  (void)number;
  return portable_level;
}

}  // namespace decoct

using namespace decoct;

// Changes whenever a struct or a function that Python sees does.
DECOCT_EXPORT int32_t decoct_version() { return 10; }

// Bit n is set where this processor runs level n: 0 portable, 1 AVX2, 2 AVX-512, 3 NEON, 4 AVX-512 with bf16.
DECOCT_EXPORT uint32_t decoct_levels() {
  uint32_t levels = 1u << PORTABLE;
#if defined(DECOCT_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    levels |= 1u << AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      levels |= 1u << AVX512;
#if defined(DECOCT_X86_BF16)
    if (levels >> AVX512 & 1 && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni")) levels |= 1u << AVX512BF16;
#endif
  }
#endif
#if defined(DECOCT_ARM)
  levels |= 1u << NEON;
#endif
  return levels;
}

// From now on work is done by threads that `launch` starts, which is null or GNU's OpenMP's GOMP_parallel.
DECOCT_EXPORT void decoct_borrow_threads(Pool::Launch launch) { Pool::shared().borrow(launch); }

// out [count][rows] = x [count][cols] times the transposed matrix, both of one type.
DECOCT_EXPORT void decoct_multiply(
    const DecoctMatrix* matrix, const void* x, int32_t type, int64_t count, void* out, int32_t threads, int32_t number) {
  multiply(*matrix, level_of(number), x, type, count, out, matrix->rows, threads);
}

// Whether there is `decoct_multiply_rounded` for a matrix.
DECOCT_EXPORT int32_t decoct_can_round(const DecoctMatrix* matrix, int32_t number) { return can_round(*matrix, level_of(number)); }

// The same with inputs rounded to 8 bits.
DECOCT_EXPORT void decoct_multiply_rounded(
    const DecoctMatrix* matrix, const void* x, int32_t type, int64_t count, void* out, int32_t threads, int32_t number) {
  multiply_rounded(*matrix, level_of(number), x, type, count, out, matrix->rows, threads);
}

// Rows of blocks [first, last) of 16, in `type`.
DECOCT_EXPORT void decoct_unpack(
    const DecoctMatrix* matrix, int64_t first, int64_t last, int32_t type, void* out, int32_t threads, int32_t number) {
  const DecoctMatrix& m = *matrix;
  const Level& level = level_of(number);
  const int64_t bytes = kRows * m.cols * (type == DECOCT_F32 ? 4 : 2);
  Pool::shared().share(last - first, 1, threads, [&](int64_t from, int64_t to) {
    level.unpack(m, first + from, first + to, type, (char*)out + from * bytes);
  });
}
