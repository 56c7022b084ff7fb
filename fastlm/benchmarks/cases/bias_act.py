"""relu(x + bias), forward and backward with the bias's gradient, over 4096 rows of 3072."""

from __future__ import annotations

from functools import partial

import torch

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, forward_backward, in_float64, leaf, no_compiler, outputs_of
from fastlm.benchmarks.cases.relu import STOCK
from fastlm.benchmarks.harness import Built, Case, Variant


def build(act: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    inputs = [leaf(shape, dtype, device, seed=0), leaf(shape[1:], dtype, device, seed=1)]
    dy = leaf(shape, dtype, device, seed=2).detach()

    def stock(x, bias):
        return STOCK[act](x + bias)

    functions = {"torch": stock, "fastlm": partial(fastlm.bias_act, act=act)}
    missing = {}
    if (reason := no_compiler(quick)) is None:
        functions["torch.compile"] = torch.compile(stock)
    else:
        missing["torch.compile"] = reason
    variants = {
        name: Variant(forward_backward(function, inputs, dy), outputs_of(function, inputs, dy))
        for name, function in functions.items()
    }
    return Built(variants, in_float64(stock, inputs, dy), missing)


def cases(device: str, quick: bool) -> list[Case]:
    shape = (512, 3072) if quick else (4096, 3072)
    made = []
    for act in ("relu", "relu_squared"):
        for name, dtype in DTYPES.items():
            size = 5 * shape[0] * shape[1] * dtype.itemsize
            label = f"{act} {shape[0]}x{shape[1]} {name}"
            made.append(
                Case("bias_act", label, partial(build, act, dtype, shape, device, quick), bytes=size, device=device)
            )
    return made
