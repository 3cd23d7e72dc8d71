#include "product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace decoct {
namespace {

constexpr int64_t kWorthAThread = 1 << 15;  // bytes of a matrix that take longer than waking a helper
constexpr int64_t kPanels = 4;              // that are unpacked to bytes together: inputs are read once for all of them
constexpr int64_t kShared = 64;             // columns of rounded inputs that share a scale: a group's, or so many
constexpr int64_t kMostShared = 128;        // columns of a group whose inputs share one
constexpr int kShares = 8;                  // pieces for each thread: one that is disturbed takes fewer

int64_t bytes_of_block(const DecoctMatrix& m) {
  if (m.layout == DECOCT_DENSE) return m.cols * kRows * 2;
  return std::max<int64_t>(m.cols * kRows * std::max(m.bits, 1) / 8, 1);
}

// Sums of one input over each group, which zero points are multiplied with.
void add_groups(const DecoctMatrix& m, const float* x, float* sums) {
  for (int64_t group = 0; group < m.groups; ++group) {
    const int64_t first = group * m.group_size, last = m.groups == 1 ? m.cols : first + m.group_size;
    float parts[8] = {};
    int64_t i = first;
    for (; i + 8 <= last; i += 8)
      for (int k = 0; k < 8; ++k) parts[k] += x[i + k];
    for (; i < last; ++i) parts[0] += x[i];
    sums[group] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
  }
}

// Columns of rounded inputs that share a scale.
int64_t shared_columns(const DecoctMatrix& m) { return m.groups > 1 && m.group_size <= kMostShared ? m.group_size : kShared; }

struct Scratch {
  std::vector<float> x, sums, out;
  std::vector<uint32_t> pairs;
};

// Inputs side by side, as products of two codes at a time read them; empty where the matrix is not multiplied so.
void pair(const DecoctMatrix& m, const Level& level, const void* x, int32_t type, int64_t count, int64_t width, std::vector<uint32_t>& pairs) {
  pairs.clear();
  if (type != DECOCT_BF16 || !level.multiply_pairs || !level.pairs_fit(m)) return;
  static thread_local std::vector<uint16_t> row;
  row.assign(width, 0);
  pairs.resize((count == 1 ? 1 : rounded_up(count, kMostInputs)) * width / 2);
  for (int64_t i = 0; i < count; ++i) {
    memcpy(row.data(), (const uint16_t*)x + i * m.cols, m.cols * 2);
    level.pair_inputs(m, row.data(), width, pairs.data() + i * width / 2);
  }
}

}  // namespace

void multiply(
    const DecoctMatrix& m, const Level& level, const void* x, int32_t type, int64_t count, void* out, int64_t stride, int threads) {
  const int64_t padded = count == 1 ? 1 : rounded_up(count, kMostInputs);
  const int64_t width = rounded_up(m.cols, kUnit), height = rounded_up(m.rows, kRows);
  static thread_local Scratch scratch;
  scratch.x.assign(padded * width, 0.0f);
  scratch.sums.assign(padded * m.groups, 0.0f);
  scratch.out.resize(padded * height);
  float *inputs = scratch.x.data(), *sums = scratch.sums.data(), *products = scratch.out.data();
  for (int64_t i = 0; i < count; ++i) {
    level.widen((const char*)x + i * m.cols * size_of(type), type, m.cols, inputs + i * width);
    if (m.layout == DECOCT_INTS) add_groups(m, inputs + i * width, sums + i * m.groups);
  }
  pair(m, level, x, type, count, width, scratch.pairs);
  const uint32_t* pairs = scratch.pairs.empty() ? nullptr : scratch.pairs.data();
  const auto blockwise = pairs ? level.multiply_pairs : level.multiply;
  const int64_t blocks = height / kRows, block = bytes_of_block(m);
  threads = (int)std::min<int64_t>(threads, 1 + blocks * block / kWorthAThread);
  // A trellis is read column by column: the fewer pieces, the longer those of a column that lie together.
  const bool columns = m.layout == DECOCT_TRELLIS;
  const int64_t shares = (int64_t)std::max(threads, 1) * (columns ? 1 : kShares);
  const int64_t grain = std::max<int64_t>(1, columns ? (blocks + shares - 1) / shares : blocks / shares);
  Pool::shared().share(blocks, grain, threads, [&](int64_t first, int64_t last) {
    const int64_t at_once = columns ? last - first : 1;  // a block of codes stays in the cache for all inputs
    for (int64_t b = first; b < last; b += at_once)
      for (int64_t i = 0; i < padded; i += kMostInputs) {
        const Inputs in{inputs + i * width, sums + i * m.groups, width, m.groups, pairs ? pairs + i * width / 2 : nullptr};
        blockwise(m, in, padded == 1 ? 1 : kMostInputs, b, b + at_once, products + i * height);
      }
  });
  for (int64_t i = 0; i < count; ++i)
    level.narrow(products + i * height, m.rows, type, (char*)out + i * stride * size_of(type));
}

bool can_round(const DecoctMatrix& m, const Level& level) {
  return level.rounded && m.layout == DECOCT_INTS && (m.groups == 1 || m.group_size % shared_columns(m) == 0);
}

void multiply_rounded(
    const DecoctMatrix& m, const Level& level, const void* x, int32_t type, int64_t count, void* out, int64_t stride, int threads) {
  const int64_t width = rounded_up(m.cols, kUnit), tiles = rounded_up(count, kTile) / kTile, blocks = rounded_up(m.rows, kRows) / kRows;
  const int64_t size = shared_columns(m), shared = rounded_up(m.cols, size) / size;
  static thread_local std::vector<int8_t> codes;
  static thread_local std::vector<float> scale, sums;
  codes.assign(tiles * kTile * width, 0), scale.assign(tiles * shared * kTile, 0.0f), sums.assign(tiles * shared * kTile, 0.0f);
  const RoundedInputs in{codes.data(), scale.data(), sums.data(), count, width, size, shared};
  Pool::shared().share(count, kTile, threads, [&](int64_t first, int64_t last) {
    level.rounded->round_inputs(m, x, type, first, last, in);
  });
  Pool::shared().share(blocks, kPanels, threads, [&](int64_t first, int64_t last) {
    static thread_local std::vector<uint32_t> room;
    room.resize(kPanels * width / 4 * kRows);
    for (int64_t b = first; b < last; b += kPanels)
      level.rounded->multiply(m, in, b, std::min(b + kPanels, last), type, (char*)out, stride, room.data());
  });
}

}  // namespace decoct
