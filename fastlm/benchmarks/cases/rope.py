"""Rotary positions of the queries and keys of a batch, forward and backward: a memory-bound pass each way."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case
from fastlm.benchmarks.stock import rotated


def stock(cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
    return rotated(x, cos[:, None], sin[:, None]).to(x.dtype)


def build(dtype: torch.dtype, shape: tuple[int, int, int, int], device: str, quick: bool) -> Built:
    _, T, _, D = shape
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(D // 2) * 2 / D)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    x, dy = leaf(shape, dtype, device, seed=0), leaf(shape, dtype, device, seed=1).detach()
    return eager_compiled_ours(partial(stock, cos, sin), lambda x: fastlm.rope(x, cos, sin), [x], dy, quick)


def cases(device: str, quick: bool) -> list[Case]:
    shape = (2, 128, 4, 64) if quick else (8, 1024, 24, 64)  # (B, T, H, D)
    made = []
    for name, dtype in DTYPES.items():
        size = 4 * math.prod(shape) * dtype.itemsize  # x to y, dy to dx
        made.append(
            Case("rope", f"{shape} {name}", partial(build, dtype, shape, device, quick), bytes=size, device=device)
        )
    return made
