"""Prioritised sampling and the gather, compiled for real architectures."""

import triton.language as tl
from _job import job

from fastkd.ops.replay import triton as gather
from fastkd.ops.replay_tree import triton as tree

widths = dict(PIECES=16, WIDTH=64)
long = dict.fromkeys(("key_ptr", "index_ptr", "refused_ptr", "dy_ptr", "dx_ptr", "y_ptr", "x_ptr"), "*i64")
for architecture, leaf, store, wide, out in ((80, "*fp32", "*u8", "fp32", "*bf16"), (90, "*fp64", "*fp16", "fp64", "*fp64")):
    leaves = dict.fromkeys(("leaves_ptr", "value_ptr", "probability_ptr", "least_ptr"), leaf)
    types = {**long, **leaves, "sums_ptr": "*fp64", "u_ptr": "*fp64"}
    job(tree._uniform_kernel, None, architecture, {**types, "out_ptr": "*fp64"}, BLOCK_N=1024)
    job(tree._ends_kernel, None, architecture, types, PIECES=16, BLOCK_N=1024)
    for flag in (True, False):
        job(tree._block_kernel, None, architecture, types, HAS_INDEX=flag, **widths)
        job(tree._sample_kernel, None, architecture, types, HAS_U=flag, DRAWS=4, **widths)
    for how in range(3):
        job(tree._settle_kernel, None, architecture, types, HOW=how, ROWS=16, BLOCK_N=128)
    for resized, blended in ((False, False), (True, False), (True, True)):
        floats = dict.fromkeys(("mean_ptr", "std_ptr", "wy_ptr", "wx_ptr"), "*" + wide)
        types = {**long, **floats, "images_ptr": store, "flip_ptr": "*u8", "out_ptr": out}
        # a size of 1 is a constant for Triton
        one = {"out_height": 1} if blended else {}
        flags = dict.fromkeys(("HAS_DY", "HAS_DX", "HAS_FLIP", "RESIZED", "DIVIDED"), resized)
        flags |= dict.fromkeys(("HAS_MEAN", "HAS_STD", "LONG", "BLENDED", "LAST"), blended)
        job(gather._gather_kernel, None, architecture, types, **flags, **one, BYTES=store == "*u8",
              WIDE=getattr(tl, "float" + wide[2:]), BLOCK=1024)
print("compiled")
