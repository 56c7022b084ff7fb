"""silu(gate) * up and gelu(gate) * up over 4096 rows of 3072."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

STOCK = {"silu": F.silu, "gelu": F.gelu}


def build(act: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    gate, up, dy = (leaf(shape, dtype, device, seed) for seed in range(3))
    return eager_compiled_ours(
        lambda gate, up: STOCK[act](gate) * up, partial(fastlm.glu, act=act), [gate, up], dy.detach(), quick
    )


def cases(device: str, quick: bool) -> list[Case]:
    shape = (512, 3072) if quick else (4096, 3072)
    made = []
    for act in STOCK:
        for name, dtype in DTYPES.items():
            # Forward reads gate and up and writes y; backward reads dy, gate and up and writes two gradients.
            size = 8 * shape[0] * shape[1] * dtype.itemsize
            label = f"{act} {shape[0]}x{shape[1]} {name}"
            made.append(Case("glu", label, partial(build, act, dtype, shape, device, quick), bytes=size, device=device))
    return made
