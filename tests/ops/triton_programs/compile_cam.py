"""The class activation map kernels, compiled for real architectures."""

from _job import job

from fastkd.ops.cam import triton as t

tile = dict(CHANNELS=64, CELLS=64)
for architecture, element in ((80, "fp32"), (90, "bf16")):
    for norm, resize, renorm in ((0, False, False), (1, True, True), (2, True, False)):
        flags = dict(RELU=bool(norm), NORM=norm, RESIZE=resize, RENORM=renorm, LAST=resize, PIXELS=1024)
        job(t._cam_fwd_kernel, element, architecture, **flags, **tile)
    job(t._cam_adjoint_kernel, element, architecture, ROWS=16, COLS=64)
    for last in (False, True):
        job(t._cam_outer_kernel, element, architecture, LAST=last, **tile)
flags = dict(RELU=True, NORM=2, RESIZE=True, RENORM=True, LAST=True, PIXELS=1024, CHANNELS=1024, CELLS=1)
job(t._cam_fwd_kernel, "fp16", 80, cells=1, h=1, w=1, **flags)  # arguments that are 1 become constants
job(t._cam_adjoint_kernel, "fp16", 80, cells=1, h=1, w=1, ROWS=16, COLS=64)
job(t._cam_outer_kernel, "fp16", 80, cells=1, LAST=True, CHANNELS=1024, CELLS=1)
print("compiled")
