"""gelu, silu, sigmoid and tanh, forward and backward over 4096 rows of 3072: a memory-bound pass each way."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

PAIRS = {
    "gelu": (F.gelu, fastlm.gelu),
    "gelu tanh": (partial(F.gelu, approximate="tanh"), partial(fastlm.gelu, approximate="tanh")),
    "silu": (F.silu, fastlm.silu),
    "sigmoid": (torch.sigmoid, fastlm.sigmoid),
    "tanh": (torch.tanh, fastlm.tanh),
}


def build(op: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    x, dy = leaf(shape, dtype, device, seed=0), leaf(shape, dtype, device, seed=1).detach()
    return eager_compiled_ours(*PAIRS[op], [x], dy, quick)


def cases(device: str, quick: bool) -> list[Case]:
    shape = (512, 3072) if quick else (4096, 3072)
    made = []
    for op in PAIRS:
        for name, dtype in DTYPES.items():
            # Forward reads x and writes y; backward reads dy and what was saved and writes dx.
            size = 5 * shape[0] * shape[1] * dtype.itemsize
            label = f"{op} {shape[0]}x{shape[1]} {name}"
            made.append(
                Case("activation", label, partial(build, op, dtype, shape, device, quick), bytes=size, device=device)
            )
    return made
