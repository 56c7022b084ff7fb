"""relu(x + bias), forward and backward with the bias's gradient, over 4096 rows of 3072."""

from __future__ import annotations

from functools import partial

import torch

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.cases.relu import STOCK
from fastlm.benchmarks.harness import Built, Case


def build(act: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    inputs = [leaf(shape, dtype, device, seed=0), leaf(shape[1:], dtype, device, seed=1)]
    dy = leaf(shape, dtype, device, seed=2).detach()

    def stock(x, bias):
        return STOCK[act](x + bias)

    return eager_compiled_ours(stock, partial(fastlm.bias_act, act=act), inputs, dy, quick)


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
