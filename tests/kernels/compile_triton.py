"""Compile Triton kernels to machine code on a machine without a GPU: `python compile_triton.py 80 90 < code.py`.

The code calls the wrappers in fastlm.kernels.triton on CPU tensors. Each launch is compiled with the types, constants
and configuration that the wrapper gave it, instead of being run. The first of each kind prints a line of JSON: kernel,
dtype (of its first tensor), architecture, constants, ptx, registers, spilled (bytes a thread), shared (bytes a block).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastlm.kernels.triton import _common, attention

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
          torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(cubin):
    """Registers and spilled bytes of a thread, from the machine code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", printed)[1]) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def describe(index, parameter, value):
    """The type of one argument, its value if it is a constant, and whether Triton may count on a multiple of 16."""
    if parameter.is_constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}", None, True
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", 1, False
    return "i32" if abs(value) < 2**31 else "i64", None, value % 16 == 0 and not parameter.do_not_specialize


def compile_only(architecture):
    seen = set()

    def run(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.params):
            value = values[parameter.name]
            signature[parameter.name], constant, aligned = describe(i, parameter, value)
            if signature[parameter.name] == "constexpr":
                constants[(i,)] = constant
            elif aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        key = repr((self.__name__, signature, constants, attributes, options))
        if key in seen:
            return
        seen.add(key)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(ASTSource(self, signature, constants, attributes), target=target, options=options)
        registers, spilled = resources(compiled.asm["cubin"])
        found = {
            "kernel": self.__name__,
            "dtype": _TYPES[args[0].dtype],
            "architecture": architecture,
            "constants": {p.name: values[p.name] for p in self.params if p.is_constexpr} | options,
            "ptx": compiled.asm["ptx"],
            "registers": registers,
            "spilled": spilled,
            "shared": compiled.metadata.shared,
        }
        print(json.dumps(found, default=str))

    return run


if __name__ == "__main__":
    code = compile(sys.stdin.read(), "<code>", "exec")
    for number in map(int, sys.argv[1:]):
        JITFunction.run = compile_only(number)
        _common.capability = attention.capability = lambda device, number=number: divmod(number, 10)
        exec(code, {"torch": torch})
