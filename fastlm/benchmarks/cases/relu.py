"""relu and relu_squared, forward and backward over 4096 rows of 3072: a memory-bound pass each way."""

from __future__ import annotations

from functools import partial

import torch

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

STOCK = {"relu": torch.relu, "relu_squared": lambda x: torch.relu(x).square()}
OURS = {"relu": fastlm.relu, "relu_squared": fastlm.relu_squared}


def build(op: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    x = leaf(shape, dtype, device, seed=0)
    dy = leaf(shape, dtype, device, seed=1).detach()
    return eager_compiled_ours(STOCK[op], OURS[op], [x], dy, quick)


def cases(device: str, quick: bool) -> list[Case]:
    shape = (512, 3072) if quick else (4096, 3072)
    made = []
    for op in ("relu", "relu_squared"):
        for name, dtype in DTYPES.items():
            # Forward reads x and writes y; backward reads dy and what was saved and writes dx.
            size = 5 * shape[0] * shape[1] * dtype.itemsize
            label = f"{op} {shape[0]}x{shape[1]} {name}"
            made.append(Case("relu", label, partial(build, op, dtype, shape, device, quick), bytes=size, device=device))
    return made
