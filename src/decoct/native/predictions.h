// Losses on predictions and their gradients, for each instruction level: a row at a time, widened to floats, which the cache holds.
#pragma once

#include <cmath>

#include "divergence.h"
#include "steps.h"

namespace decoct {
namespace DECOCT_LEVEL {

constexpr float kLeast = -1e4f;      // log-probabilities are cut off here: a token that is ruled out gives zeros, not NaN
constexpr int64_t kTogether = 1024;  // entries that are added up in single precision

DECOCT_INLINE Floats cut_off(Floats log_prob) {
  const Floats least = Floats{} + kLeast;
  return pick(log_prob < least, least, log_prob);
}

// Log-probabilities of a row of logits; what fills it up to whole vectors is ruled out.
template <int TYPE>
void log_probs(const void* logits, int64_t first, int64_t entries, float scale, float* to) {
  const int64_t all = rounded_up(entries, 16);
  Floats most = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + 16 <= entries; i += 16) {
    const Floats v = load_numbers(logits, first + i, TYPE) * scale;
    store(to + i, v);
    most = pick(v > most, v, most);
  }
  if (i < entries) store(to + i, load_some(logits, first + i, TYPE, entries - i) * scale);
  for (i = entries; i < all; ++i) to[i] = -INFINITY;
  const Floats end = load<Floats>(to + all - 16);
  const float largest = largest_lane(pick(end > most, end, most));
  double sum = 0;
  for (int64_t from = 0; from < all; from += kTogether) {
    Floats some = {};
    for (i = from; i < all && i < from + kTogether; i += 16) some += exponential(load<Floats>(to + i) - largest);
    sum += sum_lanes(some);
  }
  const float level = (float)std::log(sum);
  for (i = 0; i < all; i += 16) store(to + i, cut_off((load<Floats>(to + i) - largest) - level));
}

// Through the softmax: each entry's derivative by its log-probability, less its probability times the sum of derivatives.
template <int TYPE, class Slope>
DECOCT_INLINE void write_gradient(const DecoctDivergence& d, int64_t row, const float* student, float total, const Slope& slope) {
  const float factor = d.weights[row] * d.student_scale;
  for (int64_t i = 0; i < d.entries; i += 16) {
    const Floats q = exponential(load<Floats>(student + i)), found = (slope(i, q) - q * total) * factor;
    if (d.entries - i >= 16) store_numbers(d.student, row * d.entries + i, TYPE, found);
    else store_some(d.student, row * d.entries + i, TYPE, found, d.entries - i);
  }
}

template <int TYPE>
void learn_label(const DecoctDivergence& d, int64_t row, const float* student) {
  const int64_t label = d.labels[row];
  d.losses[row] = -student[label];
  if (!d.weights) return;
  write_gradient<TYPE>(d, row, student, -1.0f, [](int64_t, Floats) { return Floats{}; });
  const float here = (std::exp(student[label]) - 1.0f) * d.weights[row] * d.student_scale;
  store_some(d.student, row * d.entries + label, TYPE, Floats{} + here, 1);
}

struct Share {
  Floats term, slope;  // of an entry in the loss; its derivative by the student's log-probability
};

DECOCT_INLINE Share share_of(const DecoctDivergence& d, Floats student, Floats teacher, Floats q) {
  const Floats own = q * d.reverse, apart = student - teacher, both = own - exponential(teacher) * d.forward;
  return {both * apart, own * apart + both};
}

template <int TYPE>
void learn_teacher(const DecoctDivergence& d, int64_t row, const float* student, const float* teacher) {
  const auto share = [&](int64_t i, Floats q) { return share_of(d, load<Floats>(student + i), load<Floats>(teacher + i), q); };
  double loss = 0, slopes = 0;
  for (int64_t first = 0; first < d.entries; first += kTogether) {
    Floats terms = {}, some = {};
    for (int64_t i = first; i < d.entries && i < first + kTogether; i += 16) {
      const Share here = share(i, exponential(load<Floats>(student + i)));
      terms += here.term;
      some += here.slope;
    }
    loss += sum_lanes(terms);
    slopes += sum_lanes(some);
  }
  d.losses[row] = loss;
  if (d.weights) write_gradient<TYPE>(d, row, student, (float)slopes, [&](int64_t i, Floats q) { return share(i, q).slope; });
}

template <int TYPE>
void diverge_typed(const DecoctDivergence& d, int64_t first, int64_t last, float* room) {
  float *student = room, *teacher = room + rounded_up(d.entries, 16);
  for (int64_t row = first; row < last; ++row) {
    log_probs<TYPE>(d.student, row * d.entries, d.entries, d.student_scale, student);
    if (d.teacher) {
      log_probs<TYPE>(d.teacher, row * d.entries, d.entries, d.teacher_scale, teacher);
      learn_teacher<TYPE>(d, row, student, teacher);
    } else {
      learn_label<TYPE>(d, row, student);
    }
  }
}

void diverge(const DecoctDivergence& d, int64_t first, int64_t last, float* room) {
  if (d.type == DECOCT_F32) return diverge_typed<DECOCT_F32>(d, first, last, room);
  if (d.type == DECOCT_F16) return diverge_typed<DECOCT_F16>(d, first, last, room);
  diverge_typed<DECOCT_BF16>(d, first, last, room);
}

constexpr Predictions predictions = {diverge};

}  // namespace DECOCT_LEVEL
}  // namespace decoct
