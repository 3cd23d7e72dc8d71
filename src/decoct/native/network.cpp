// One more token for each of some sequences, from hidden states to logits, without a detour through Python.
#include "network.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "exported.h"
#include "pool.h"
#include "product.h"

namespace {

using namespace decoct;

constexpr int64_t kWorthAThread = 1 << 14;  // keys and values, in numbers, whose attention takes longer than waking a helper

// A step's numbers in the network's type, a row for each sequence.
struct Rows {
  std::vector<char> bytes;
  int64_t width = 0, size = 0;
  void shape(int64_t count, int64_t columns, int64_t number) {
    width = columns, size = number;
    bytes.resize(count * columns * number);
  }
  char* row(int64_t i, int64_t column = 0) { return bytes.data() + (i * width + column) * size; }
};

struct Room {
  Rows read, mixed, found, gate_up, inner, given, logits;
  std::vector<std::vector<float>> attention;
  std::vector<float> wide;
};

class Step {
 public:
  Step(const DecoctNetwork& network, const int64_t* seats, const int64_t* positions, int64_t count, Room& room)
      : n_(network), level_(level_of(network.level)), s_(*level_.steps), seats_(seats), positions_(positions), count_(count),
        size_(size_of(network.type)), room_(room) {}

  // False where a product that was called back for failed.
  bool run(char* hidden, float* logits) {
    for (int64_t b = 0; b < n_.num_blocks && whole_; ++b) {
      const DecoctBlock& block = n_.blocks[b];
      halve(hidden, block.before_attention, block.after_attention, [&] { attention(b, block); });
      halve(hidden, block.before_mlp, block.after_mlp, [&] { mlp(block); });
    }
    normalise(hidden, n_.final_norm);
    linear(n_.head, room_.read, room_.logits);
    if (!whole_) return false;
    for (int64_t i = 0; i < count_; ++i) {
      float* row = logits + i * n_.head.rows;
      level_.widen(room_.logits.row(i), n_.type, n_.head.rows, row);
      if (n_.logit_cap > 0) s_.cap(row, n_.head.rows, n_.logit_cap);
    }
    return true;
  }

 private:
  // One half of a block: what it finds is added to the hidden states.
  template <class F>
  void halve(char* hidden, const DecoctNorm& before, const DecoctNorm& after, const F& work) {
    normalise(hidden, before);
    work();
    for (int64_t i = 0; i < count_; ++i) {
      char* found = room_.found.row(i);
      if (after.gain) s_.normalise(found, n_.width, after, n_.type, found);
      s_.add(hidden + i * n_.width * size_, found, n_.width, n_.type);
    }
  }

  void normalise(const char* hidden, const DecoctNorm& norm) {
    room_.read.shape(count_, n_.width, size_);
    for (int64_t i = 0; i < count_; ++i) s_.normalise(hidden + i * n_.width * size_, n_.width, norm, n_.type, room_.read.row(i));
  }

  void attention(int64_t number, const DecoctBlock& block) {
    const int64_t size = n_.head_size, group = n_.heads / n_.kv_heads;
    Rows &mixed = room_.mixed, &found = room_.inner;
    linear(block.qkv, room_.read, mixed);
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t head = 0; head < n_.heads + n_.kv_heads; ++head) {
        const DecoctNorm& norm = head < n_.heads ? block.queries : block.keys;
        if (norm.gain) s_.normalise(mixed.row(i, head * size), size, norm, n_.type, mixed.row(i, head * size));
      }
      const int64_t angle = positions_[i] * size * size_;
      s_.turn(mixed.row(i), n_.heads + n_.kv_heads, size, (const char*)block.cosines + angle, (const char*)block.sines + angle, n_.type);
      for (int64_t head = 0; head < n_.kv_heads; ++head) {
        const int64_t at = (kept(number, i, head) + positions_[i] * size) * size_;
        memcpy((char*)n_.keys + at, mixed.row(i, (n_.heads + head) * size), size * size_);
        memcpy((char*)n_.values + at, mixed.row(i, (n_.heads + n_.kv_heads + head) * size), size * size_);
      }
    }
    found.shape(count_, n_.heads * size, size_);
    int64_t numbers = 0;
    for (int64_t i = 0; i < count_; ++i) numbers += seen(block, i) * n_.kv_heads * size;
    const int threads = (int)std::min<int64_t>(n_.threads, 1 + numbers / kWorthAThread);
    const int64_t tasks = count_ * n_.kv_heads;
    room_.attention.resize(std::max<size_t>(room_.attention.size(), tasks));
    Pool::shared().share(tasks, 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t i = task / n_.kv_heads, head = task % n_.kv_heads, count = seen(block, i);
        const int64_t at = (kept(number, i, head) + (positions_[i] + 1 - count) * size) * size_;
        std::vector<float>& room = room_.attention[task];
        room.assign(attention_room(n_, count), 0.0f);
        const int64_t column = head * group * size;
        s_.attend(n_, mixed.row(i, column), (char*)n_.keys + at, (char*)n_.values + at, count, room.data(), found.row(i, column));
      }
    });
    linear(block.out, found, room_.found);
  }

  void mlp(const DecoctBlock& block) {
    linear(block.gate_up, room_.read, room_.gate_up);
    const int64_t inner = block.gate_up.rows / 2;
    room_.inner.shape(count_, inner, size_);
    for (int64_t i = 0; i < count_; ++i) s_.activate(room_.gate_up.row(i), inner, n_.activation, n_.type, room_.inner.row(i));
    linear(block.down, room_.inner, room_.found);
  }

  void linear(const DecoctLinear& layer, Rows& x, Rows& out) {
    out.shape(count_, layer.rows, size_);
    int64_t column = 0;
    for (int64_t p = 0; p < layer.num_parts; column += layer.parts[p++].rows) {
      const DecoctPart& part = layer.parts[p];
      if (part.inner) {
        thin(part, x, out, column);
        continue;
      }
      if (part.matrix) {
        multiply(*part.matrix, level_, x.row(0), n_.type, count_, out.row(0, column), layer.rows, n_.threads);
        continue;
      }
      room_.given.shape(count_, part.rows, size_);
      whole_ = whole_ && part.call(part.handle, x.row(0), count_, room_.given.row(0)) == 1;
      for (int64_t i = 0; i < count_; ++i) memcpy(out.row(i, column), room_.given.row(i), part.rows * size_);
    }
    if (layer.bias)
      for (int64_t i = 0; i < count_; ++i) s_.add(out.row(i), layer.bias, layer.rows, n_.type);
  }

  // A product of two thin matrices.
  void thin(const DecoctPart& part, Rows& x, Rows& out, int64_t column) {
    const DecoctMatrix &right = *part.inner, &left = *part.matrix;
    room_.wide.resize(count_ * (right.cols + right.rows + left.rows));
    float *given = room_.wide.data(), *between = given + count_ * right.cols, *found = between + count_ * right.rows;
    level_.widen(x.row(0), n_.type, count_ * right.cols, given);
    multiply(right, level_, given, DECOCT_F32, count_, between, right.rows, n_.threads);
    multiply(left, level_, between, DECOCT_F32, count_, found, left.rows, n_.threads);
    for (int64_t i = 0; i < count_; ++i) level_.narrow(found + i * left.rows, left.rows, n_.type, out.row(i, column));
  }

  // Where the keys of a sequence's head begin, in numbers.
  int64_t kept(int64_t block, int64_t i, int64_t head) const {
    return ((block * n_.seats + seats_[i]) * n_.kv_heads + head) * n_.context * n_.head_size;
  }

  // Positions that a token sees.
  int64_t seen(const DecoctBlock& block, int64_t i) const {
    const int64_t all = positions_[i] + 1;
    return block.window ? std::min(block.window, all) : all;
  }

  const DecoctNetwork& n_;
  const Level& level_;
  const Steps& s_;
  const int64_t *seats_, *positions_;
  const int64_t count_, size_;
  Room& room_;
  bool whole_ = true;
};

}  // namespace

// hidden [count][width] are embeddings, and are overwritten; logits [count][vocabulary] are float32. 0: a product failed.
DECOCT_EXPORT int32_t decoct_step(
    const DecoctNetwork* network, void* hidden, const int64_t* seats, const int64_t* positions, int64_t count, float* logits) {
  static thread_local Room room;
  return Step(*network, seats, positions, count, room).run((char*)hidden, logits);
}
