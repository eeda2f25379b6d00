"""The BN-statistic kernels and the loss, compiled for real architectures."""

from _job import job

from fastkd.ops.bn_match import triton as t

for architecture, element in ((80, "fp32"), (90, "bf16")):
    for act in (0, 2):
        flags = dict(ACT=act, HAS_Y=True, HAS_R=bool(act))
        job(t._bn_fwd_nchw_kernel, element, architecture, ROWS=2, COLS=1024, **flags)
        job(t._bn_fwd_nhwc_kernel, element, architecture, ROWS=32, COLS=64, **flags)
        residual = dict(HAS_R=bool(act), HAS_DR=bool(act), LAST=bool(act))
        job(t._bn_bwd_kernel, element, architecture, ACT=act, HAS_G=True, HAS_S=True, ROWS=32, COLS=64, **residual)
        blend = dict(KL=bool(act), BLEND=bool(act), CALLS=bool(act))
        job(t._bn_loss_fwd_kernel, element, architecture, ROWS=32, COLS=128, **blend)
        job(t._bn_loss_bwd_kernel, element, architecture, BLOCK=256, **blend)
    job(t._bn_fwd_nchw_kernel, element, architecture, ACT=0, HAS_Y=False, HAS_R=False, ROWS=2, COLS=1024, per=1)
    job(t._bn_finish_kernel, element, architecture, ROWS=32, COLS=32)
    job(t._bn_bwd_kernel, element, architecture, ACT=0, HAS_G=False, HAS_S=True, HAS_R=False, HAS_DR=False, LAST=True, ROWS=32, COLS=64)
print("compiled")
