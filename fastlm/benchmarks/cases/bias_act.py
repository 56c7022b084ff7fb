"""relu(x + bias), forward and backward with the bias's gradient, over 4096 rows of 3072."""

from __future__ import annotations

from functools import partial

import torch

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, LARGE, LARGE_TARGET, eager_compiled_ours, leaf
from fastlm.benchmarks.cases.relu import STOCK
from fastlm.benchmarks.harness import Built, Case


def build(act: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    inputs = [leaf(shape, dtype, device, seed=0), leaf(shape[1:], dtype, device, seed=1)]
    dy = leaf(shape, dtype, device, seed=2).detach()

    def stock(x, bias):
        return STOCK[act](x + bias)

    return eager_compiled_ours(stock, partial(fastlm.bias_act, act=act), inputs, dy, quick)


def case_of(act: str, name: str, shape: tuple[int, int], device: str, quick: bool, target: str = "") -> Case:
    size = 5 * shape[0] * shape[1] * DTYPES[name].itemsize
    work = partial(build, act, DTYPES[name], shape, device, quick)
    return Case("bias_act", f"{act} {shape[0]}x{shape[1]} {name}", work, bytes=size, device=device, target=target)


def goals(device: str, quick: bool, shape: tuple[int, int] = LARGE) -> list[Case]:
    return [case_of("relu", name, shape, device, quick, LARGE_TARGET) for name in DTYPES]


def cases(device: str, quick: bool) -> list[Case]:
    shape = (512, 3072) if quick else (4096, 3072)
    made = goals(device, quick) if device == "cuda" else []
    return made + [case_of(act, name, shape, device, quick) for act in STOCK for name in DTYPES]
