"""BatchNorm with activation and the doubled images, compiled for real architectures."""

from _job import job

from fastkd.ops.bn_act import triton as b
from fastkd.ops.upsample import triton as u

for architecture, element in ((80, "fp32"), (90, "bf16")):
    for act in (0, 3):
        flags = dict(ACT=act, HAS_B=bool(act))
        job(b._stats_kernel, element, architecture, HAS_W=bool(act), BLOCK=128)
        job(b._fwd_kernel, element, architecture, LAST=bool(act), BLOCK=1024, **flags)
        job(b._bwd_kernel, element, architecture, LAST=bool(act), BLOCK=1024, **flags)
        job(b._bwd_sums_nchw_kernel, element, architecture, BLOCK=1024, **flags)
        job(b._bwd_sums_nhwc_kernel, element, architecture, ROWS=64, COLS=64, **flags)
        flags = dict(TANH=bool(act), HAS_S=bool(act), C=1 if act else 3, H=112, W=112, BLOCK=1024, TIMES=2, WIDE=not act)
        job(u._fwd_kernel, element, architecture, HAS_B=not act, **flags)
        job(u._bwd_kernel, element, architecture, **flags)
print("compiled")
