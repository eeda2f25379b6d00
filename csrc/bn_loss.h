// Distance of batch statistics from running ones, all layers of a teacher in one launch. A is float, or double for double.
#pragma once
#include "common.h"

namespace fastkd {

enum BnDistance : int { kL2 = 0, kGaussKL = 1 };

struct BnLossParams {
  int64_t c, layers;
  int dtype, kind;
  double momentum, first;  // first: weight of layer 0
  const void* stats;       // [2, c]
  const void* target;      // [2, c]
  const void* average;     // [2, c], or null: no blend
  const int64_t* calls;    // [], the blend holds where it is above 0; null: always
  const int64_t* offsets;  // [layers + 1]
  const void* grad;        // [], of the loss; null in the forward pass
  double* terms;           // [layers], workspace of the forward pass
  void* out;               // forward: [], backward: [2, c]
};

}  // namespace fastkd
