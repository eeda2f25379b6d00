"""Compiles one Triton kernel for a real architecture, without a device."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

ELEMENTS = ("x_ptr", "r_ptr", "y_ptr", "gy_ptr", "dx_ptr", "dr_ptr")
INTEGERS = ("offsets_ptr", "calls_ptr", "label_ptr")
FLOATS = ("slope", "count", "eps", "momentum", "first", "down", "across")


def job(kernel, element, architecture, types=None, **constants):
    """`element` is the type behind pointers to image-like tensors; other pointers are fp32, other arguments i32, unless `types` says."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in (types or {}):
            signature[name] = types[name]
        elif name in ELEMENTS:
            signature[name] = "*" + element
        elif name in INTEGERS:
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    assert compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
