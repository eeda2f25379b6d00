// The CPU kernels, once per instruction set: FASTKD_ISA names the set that a source file is being compiled for, and
// module.cpp takes the table of the best set that the processor has.
#pragma once
#include "bn_act.h"
#include "bn_match.h"
#include "cam.h"
#include "replay.h"
#include "upsample.h"

#define FASTKD_JOIN2(a, b) a##_##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN2(a, b)
#define FASTKD_CPU(name) FASTKD_JOIN(name, FASTKD_ISA)

namespace fastkd {

struct CpuKernels {
  const char* isa;
  void (*bn_fwd)(const BnParams&, int threads);
  void (*bn_bwd)(const BnGradParams&, int threads);
  void (*cam_fwd)(const CamParams&, int threads);
  void (*cam_bwd)(const CamParams&, int threads);
  void (*cam_finish)(const CamFinishParams&, int threads);
  void (*replay_gather)(const GatherParams&, int threads);
  void (*bn_act_fwd)(const BnActParams&, int threads);
  void (*bn_act_bwd_sums)(const BnActGradParams&, int threads);
  void (*bn_act_bwd)(const BnActGradParams&, int threads);
  void (*upsample_act_fwd)(const UpsampleActParams&, int threads);
  void (*upsample_act_bwd)(const UpsampleActGradParams&, int threads);
};

#define FASTKD_DECLARE(isa)                               \
  void bn_fwd_##isa(const BnParams&, int threads);        \
  void bn_bwd_##isa(const BnGradParams&, int threads);    \
  void cam_fwd_##isa(const CamParams&, int threads);      \
  void cam_bwd_##isa(const CamParams&, int threads);      \
  void cam_finish_##isa(const CamFinishParams&, int threads); \
  void replay_gather_##isa(const GatherParams&, int threads); \
  void bn_act_fwd_##isa(const BnActParams&, int threads);     \
  void bn_act_bwd_sums_##isa(const BnActGradParams&, int threads); \
  void bn_act_bwd_##isa(const BnActGradParams&, int threads); \
  void upsample_act_fwd_##isa(const UpsampleActParams&, int threads); \
  void upsample_act_bwd_##isa(const UpsampleActGradParams&, int threads);
#define FASTKD_TABLE(isa)                                                                                          \
  {#isa, bn_fwd_##isa, bn_bwd_##isa, cam_fwd_##isa, cam_bwd_##isa, cam_finish_##isa, replay_gather_##isa,          \
   bn_act_fwd_##isa, bn_act_bwd_sums_##isa, bn_act_bwd_##isa, upsample_act_fwd_##isa, upsample_act_bwd_##isa}

FASTKD_DECLARE(generic)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(avx512)

}  // namespace fastkd
