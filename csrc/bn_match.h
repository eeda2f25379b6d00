// BN-statistic ops: shifted sums of a BN input, and the frozen BN + residual + activation that yields them on the way.
// T is the element type; A, the accumulation type, is float (double for double). All vectors of C hold A.
#pragma once
#include "common.h"

namespace fastkd {

struct BnParams {
  Sizes s;
  const void* x;         // [n, c, hw] in s.layout
  const void* residual;  // like x, or null
  const void* scale;     // [c]; null in bn_sums
  const void* bias;      // [c]; null in bn_sums
  const void* shift;     // [c]
  void* y;               // like x; null in bn_sums
  void* partial;         // [groups, 2, c] double, workspace
  void* sums;            // [2, c]
  int act;
  double slope;
};

struct BnGradParams {
  Sizes s;
  const void* gy;        // like x, or null: no gradient reaches y
  const void* gsums;     // [2, c], or null: no gradient reaches the sums
  const void* x;
  const void* residual;  // or null
  const void* scale;     // null in bn_sums
  const void* bias;
  const void* shift;
  void* dx;
  void* dresidual;       // like x, or null: not wanted
  int act;
  double slope;
};

#ifdef FASTKD_WITH_CUDA
void bn_fwd_cuda(const BnParams& p, void* stream);
void bn_bwd_cuda(const BnGradParams& p, void* stream);
#endif

}  // namespace fastkd
