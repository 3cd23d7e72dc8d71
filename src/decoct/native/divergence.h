// How far a model's predictions are from what is wanted, and which way its logits should move.
#pragma once

#include "matrix.h"

extern "C" {

// Rows of logits lie one after the other.
struct DecoctDivergence {
  int32_t type;                        // of logits
  int64_t rows, entries;
  float student_scale, teacher_scale;  // logits are multiplied with these first
  float forward, reverse;              // what KL(teacher || student) and KL(student || teacher) weigh
  void* student;                       // logits; where there are `weights`, the gradient by them is written over them
  const void* teacher;                 // logits; null: cross-entropy with `labels`; `forward` and `reverse` are not read
  const int64_t* labels;               // [rows]
  const float* weights;                // of rows; null: no gradient is wanted
  double* losses;                      // [rows], without their weights
};
}

namespace decoct {

struct Predictions {
  // Rows [first, last); `room` is for `divergence_room` floats.
  void (*diverge)(const DecoctDivergence& d, int64_t first, int64_t last, float* room);
};

static inline int64_t divergence_room(const DecoctDivergence& d) { return (d.teacher ? 2 : 1) * rounded_up(d.entries, 16); }

}  // namespace decoct
