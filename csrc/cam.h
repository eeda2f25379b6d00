// Class activation maps: a weighted sum over channels per image, relu, scaling, bilinear resize and scaling again; and the adjoint.
#pragma once
#include "common.h"

namespace fastkd {

enum CamNorm : int { kNoNorm = 0, kMinMax = 1, kMax = 2 };
constexpr double kCamEps = 1e-8;

struct CamSizes {
  int64_t batch, channels, h, w, classes;
  int64_t height, width;  // of the finished map; h and w where nothing is resized
  int dtype, weight_dtype, layout;
};

// A is the accumulation type: double for float64, else float.
struct CamParams {
  CamSizes s;
  const void* features;   // [batch, channels, h, w] in layout
  const void* weight;     // [classes, channels], weight_dtype
  const int64_t* labels;  // [batch]; checked by Python on the CPU, clamped on a GPU
  void* out;              // [batch, height, width], A
  void* slope;            // [batch, h, w], A: d raw map / d small map, minimum and maximum constant
  bool relu;
  int norm;
  bool resize, renorm;
};

struct CamGradParams {
  CamSizes s;
  const void* grad;       // [batch, height, width], A
  const void* weight;
  const int64_t* labels;
  const void* slope;      // [batch, h, w], A
  void* dfeatures;        // [batch, channels, h, w] in layout, or null
  void* draw;             // [batch, h, w], A: gradient of the raw map
  bool resize;
};

// On the device, from kernels of their own.
void cam_fwd_cuda(const CamParams& p, void* stream);
void cam_bwd_cuda(const CamGradParams& p, void* stream);

}  // namespace fastkd
