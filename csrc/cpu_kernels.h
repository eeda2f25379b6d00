// The CPU kernels, once per instruction set: FASTKD_ISA names the set that a source file is being compiled for, and
// module.cpp takes the table of the best set that the processor has.
#pragma once
#include "bn_match.h"
#include "cam.h"
#include "replay.h"

#define FASTKD_JOIN2(a, b) a##_##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN2(a, b)
#define FASTKD_CPU(name) FASTKD_JOIN(name, FASTKD_ISA)

namespace fastkd {

struct CpuKernels {
  const char* isa;
  void (*bn_fwd)(const BnParams&, int threads);
  void (*bn_bwd)(const BnGradParams&, int threads);
  void (*cam_fwd)(const CamParams&, int threads);
  void (*cam_bwd)(const CamGradParams&, int threads);
  void (*replay_gather)(const GatherParams&, int threads);
};

#define FASTKD_DECLARE(isa)                               \
  void bn_fwd_##isa(const BnParams&, int threads);        \
  void bn_bwd_##isa(const BnGradParams&, int threads);    \
  void cam_fwd_##isa(const CamParams&, int threads);      \
  void cam_bwd_##isa(const CamGradParams&, int threads);  \
  void replay_gather_##isa(const GatherParams&, int threads);
#define FASTKD_TABLE(isa) {#isa, bn_fwd_##isa, bn_bwd_##isa, cam_fwd_##isa, cam_bwd_##isa, replay_gather_##isa}

FASTKD_DECLARE(generic)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(avx512)

}  // namespace fastkd
