// The CPU kernels, once per instruction set: FASTKD_ISA names the set that a source file is being compiled for, and
// module.cpp takes the table of the best set that the processor has.
#pragma once
#include "bn_act.h"
#include "bn_loss.h"
#include "bn_match.h"
#include "cam.h"
#include "replay.h"
#include "replay_tree.h"
#include "upsample.h"

#define FASTKD_JOIN2(a, b) a##_##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN2(a, b)
#define FASTKD_CPU(name) FASTKD_JOIN(name, FASTKD_ISA)

// The list: X(kernel, its parameters, isa). A new kernel is one line here.
#define FASTKD_KERNELS(X, isa)            \
  X(bn_fwd, BnParams, isa)                \
  X(bn_bwd, BnGradParams, isa)            \
  X(bn_act_fwd, BnActParams, isa)         \
  X(bn_act_bwd_sums, BnActGradParams, isa) \
  X(bn_act_bwd, BnActGradParams, isa)     \
  X(bn_loss_fwd, BnLossParams, isa)       \
  X(bn_loss_bwd, BnLossParams, isa)       \
  X(cam_fwd, CamParams, isa)              \
  X(cam_bwd, CamGradParams, isa)          \
  X(replay_gather, GatherParams, isa)     \
  X(philox_uniform, UniformParams, isa)   \
  X(replay_sums, TreeParams, isa)         \
  X(replay_sample, TreeSampleParams, isa) \
  X(replay_update, TreeUpdateParams, isa) \
  X(upsample_act_fwd, UpsampleActParams, isa) \
  X(upsample_act_bwd, UpsampleActGradParams, isa)

#define FASTKD_POINTER(kernel, Params, isa) void (*kernel)(const Params&, int threads);
#define FASTKD_FUNCTION(kernel, Params, isa) void kernel##_##isa(const Params&, int threads);
#define FASTKD_ENTRY(kernel, Params, isa) kernel##_##isa,
#define FASTKD_TABLE(isa) {#isa, FASTKD_KERNELS(FASTKD_ENTRY, isa)}

namespace fastkd {

struct CpuKernels {
  const char* isa;
  FASTKD_KERNELS(FASTKD_POINTER, )
};

FASTKD_KERNELS(FASTKD_FUNCTION, generic)
FASTKD_KERNELS(FASTKD_FUNCTION, avx2)
FASTKD_KERNELS(FASTKD_FUNCTION, avx512)

}  // namespace fastkd
