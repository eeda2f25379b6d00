// BatchNorm with batch statistics and the activation behind it. Its sums are those of bn_match.h (bn_fwd without y); between the
// sums and these functions they may be added over ranks. T is the element type; A, the accumulation type, is float (double for
// double). All vectors of C hold A. With m the mean and r = 1 / sqrt(variance + eps):
//
//   bn_act_fwd       y  = act(scale (x - m) + bias)                          scale = weight r
//   bn_act_bwd_sums  t1 = sum g, t2 = sum g r (x - m)                        g = gy act'(scale (x - m) + bias)
//   bn_act_bwd       dx = scale (g - t1 / count - r (x - m) t2 / count)
#pragma once
#include "common.h"

namespace fastkd {

enum BnStat : int { kMean = 0, kUnbiased = 1, kRstd = 2, kScale = 3, kStats = 4 };  // rows of `stats`

struct BnActParams {
  Sizes s;
  const void* x;       // [n, c, hw] in s.layout
  const void* sums;    // [2, c] of the whole batch, about shift
  const void* shift;   // [c]
  const void* weight;  // [c], or null: ones
  const void* bias;    // [c], or null: zeros
  void* y;             // like x
  void* stats;         // [4, c]: mean, unbiased variance, r, scale; written
  int64_t count;       // elements of a channel in the whole batch
  double eps;
  int act;
  double slope;
};

struct BnActGradParams {
  Sizes s;
  const void* gy;     // like x
  const void* x;
  const void* stats;  // [4, c] of the forward
  const void* bias;   // or null
  void* partial;      // [groups, 2, c] double, workspace; null in bn_act_bwd
  void* gsums;        // [2, c]: t1, t2; written by bn_act_bwd_sums, read by bn_act_bwd (there of the whole batch)
  void* dx;           // like x; null in bn_act_bwd_sums
  int64_t count;
  int act;
  double slope;
};

#ifdef FASTKD_WITH_CUDA
void bn_act_fwd_cuda(const BnActParams& p, void* stream);
void bn_act_bwd_sums_cuda(const BnActGradParams& p, void* stream);
void bn_act_bwd_cuda(const BnActGradParams& p, void* stream);
#endif

}  // namespace fastkd
