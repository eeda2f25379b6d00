// Class activation maps: one weighted sum over channels per image, and its adjoint.
#pragma once
#include "common.h"

namespace fastkd {

struct CamParams {
  int64_t batch, channels, hw, classes;
  int dtype, layout;
  const void* features;   // [batch, channels, hw] in layout; in the adjoint: written
  const void* weight;     // [classes, channels], accumulation type
  const int64_t* labels;  // [batch], 0 <= label < classes (checked by Python)
  const void* map;        // [batch, hw], accumulation type; in the forward: written
};

// Relu, scaling to [0, 1] and bilinear resize of the raw maps, while each of them is in L1.
struct CamFinishParams {
  int64_t batch, h, w, height, width;
  int dtype;            // float32 or float64
  int relu, norm;       // norm: CamNorm
  const void* map;      // [batch, h, w]
  void* rows;           // [batch, h, width] workspace: rows after the horizontal pass; [batch, h, w] result where size is unchanged
  void* out;            // [batch, height, width], or null: no resize
};
enum CamNorm : int { kNoNorm = 0, kMinMax = 1, kMax = 2 };

}  // namespace fastkd
