"""silu(gate) * up and gelu(gate) * up over 4096 rows of 3072."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, LARGE, LARGE_TARGET, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

STOCK = {"silu": F.silu, "gelu": F.gelu}


def build(act: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    gate, up, dy = (leaf(shape, dtype, device, seed) for seed in range(3))
    return eager_compiled_ours(
        lambda gate, up: STOCK[act](gate) * up, partial(fastlm.glu, act=act), [gate, up], dy.detach(), quick
    )


def case_of(act: str, name: str, shape: tuple[int, int], device: str, quick: bool, target: str = "") -> Case:
    # Forward reads gate and up and writes y; backward reads dy, gate and up and writes two gradients.
    size = 8 * shape[0] * shape[1] * DTYPES[name].itemsize
    work = partial(build, act, DTYPES[name], shape, device, quick)
    return Case("glu", f"{act} {shape[0]}x{shape[1]} {name}", work, bytes=size, device=device, target=target)


def goals(device: str, quick: bool, shape: tuple[int, int] = LARGE) -> list[Case]:
    return [case_of("silu", name, shape, device, quick, LARGE_TARGET) for name in DTYPES]


def cases(device: str, quick: bool) -> list[Case]:
    shape = (512, 3072) if quick else (4096, 3072)
    made = goals(device, quick) if device == "cuda" else []
    return made + [case_of(act, name, shape, device, quick) for act in STOCK for name in DTYPES]
