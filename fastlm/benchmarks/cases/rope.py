"""Rotary positions of the queries and keys of a batch, forward and backward: a memory-bound pass each way."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, LARGE_TARGET, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case
from fastlm.benchmarks.stock import rotated

LARGE = (8, 4096, 64, 64)  # (B, T, H, D), 256 MiB in bf16


def stock(cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
    return rotated(x, cos[:, None], sin[:, None]).to(x.dtype)


def build(dtype: torch.dtype, shape: tuple[int, int, int, int], device: str, quick: bool) -> Built:
    _, T, _, D = shape
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(D // 2) * 2 / D)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    x, dy = leaf(shape, dtype, device, seed=0), leaf(shape, dtype, device, seed=1).detach()
    return eager_compiled_ours(partial(stock, cos, sin), lambda x: fastlm.rope(x, cos, sin), [x], dy, quick)


def case_of(name: str, shape: tuple[int, int, int, int], device: str, quick: bool, target: str = "") -> Case:
    size = 4 * math.prod(shape) * DTYPES[name].itemsize  # x to y, dy to dx
    work = partial(build, DTYPES[name], shape, device, quick)
    return Case("rope", f"{shape} {name}", work, bytes=size, device=device, target=target)


def goals(device: str, quick: bool, shape: tuple[int, int, int, int] = LARGE) -> list[Case]:
    return [case_of(name, shape, device, quick, LARGE_TARGET) for name in DTYPES]


def cases(device: str, quick: bool) -> list[Case]:
    shape = (2, 128, 4, 64) if quick else (8, 1024, 24, 64)
    made = goals(device, quick) if device == "cuda" else []
    return made + [case_of(name, shape, device, quick) for name in DTYPES]
