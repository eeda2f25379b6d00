// Nearest doubling of act(scale x + bias): every value is computed once, in low resolution, and written four times.
#pragma once
#include "common.h"

namespace fastkd {

enum Squash : int { kTanh = 0, kSigmoid = 1 };

struct UpsampleActParams {
  int64_t n, c, h, w;  // of the small image
  int dtype, layout, act;
  const void* x;      // [n, c, h, w]
  const void* scale;  // [c], accumulation type, or null: ones
  const void* bias;   // likewise, or null: zeros
  void* y;            // [n, c, 2h, 2w]
};

struct UpsampleActGradParams {
  int64_t n, c, h, w;
  int dtype, layout, act;
  const void* gy;     // [n, c, 2h, 2w]
  const void* y;      // likewise: the forward's result; a quarter of it is read
  const void* scale;  // [c], or null
  void* dx;           // [n, c, h, w]
};

}  // namespace fastkd
