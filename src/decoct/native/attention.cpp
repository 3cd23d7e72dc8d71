// Attention of a prompt's tokens on several threads.
#include "attention.h"

#include <memory>

#include "exported.h"
#include "pool.h"
#include "product.h"

using namespace decoct;

DECOCT_EXPORT void decoct_attend(const DecoctAttention* attention, int32_t threads, int32_t number) {
  const DecoctAttention& a = *attention;
  const Prompts& prompts = *level_of(number).prompts;
  const int64_t all = rounded_up(a.seen, kAbreast), rows = a.tokens * (a.heads / a.kv_heads);
  const std::unique_ptr<float[]> packed(new float[all * (a.head_size + rounded_up(a.head_size, kAbreast))]);
  float *keys = packed.get(), *values = keys + all * a.head_size;
  for (int64_t each = 0; each < a.sequences * a.kv_heads; ++each) {
    const Head of{each / a.kv_heads, each % a.kv_heads};
    Pool::shared().share(all / kAbreast, 1, threads, [&](int64_t first, int64_t last) {
      prompts.pack(a, of, first * kAbreast, last * kAbreast, keys, values);
    });
    Pool::shared().share(rows, 4 * prompts.tall, threads, [&](int64_t first, int64_t last) {
      const std::unique_ptr<float[]> room(new float[prompt_room(a, prompts.tall)]);
      prompts.attend(a, of, first, last, keys, values, room.get());
    });
  }
}

DECOCT_EXPORT void decoct_attend_backward(const DecoctAttentionGradient* gradient, int32_t threads, int32_t number) {
  const DecoctAttention& a = gradient->forward;
  const Prompts& prompts = *level_of(number).prompts;
  Pool::shared().share(a.sequences * a.kv_heads, 1, threads, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> room(new float[gradient_room(a, prompts.tall)]);
    for (int64_t each = first; each < last; ++each) prompts.differentiate(*gradient, {each / a.kv_heads, each % a.kv_heads}, room.get());
  });
}
