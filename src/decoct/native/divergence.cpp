// Losses on predictions on several threads.
#include "divergence.h"

#include <vector>

#include "exported.h"
#include "pool.h"
#include "product.h"

using namespace decoct;

DECOCT_EXPORT void decoct_diverge(const DecoctDivergence* divergence, int32_t threads, int32_t number) {
  const DecoctDivergence& d = *divergence;
  const Predictions& predictions = *level_of(number).predictions;
  Pool::shared().share(d.rows, 4, threads, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> room;
    room.resize(divergence_room(d));
    predictions.diverge(d, first, last, room.data());
  });
}
