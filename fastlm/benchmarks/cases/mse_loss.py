"""mse_loss, forward and backward."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

SIZES = [(1024, 1024), (4096, 3072)]


def build(size: tuple[int, int], dtype: torch.dtype, device: str, quick: bool) -> Built:
    x, target = leaf(size, dtype, device, seed=0), leaf(size, dtype, device, seed=1).detach()
    stock, ours = partial(F.mse_loss, target=target), partial(fastlm.mse_loss, target=target)
    return eager_compiled_ours(stock, ours, [x], torch.ones((), dtype=dtype, device=device), quick)


def cases(device: str, quick: bool) -> list[Case]:
    made = []
    for name, dtype in DTYPES.items():
        for size in SIZES[:1] if quick else SIZES:
            moved = 5 * size[0] * size[1] * dtype.itemsize  # both are read twice, dx is written
            work = partial(build, size, dtype, device, quick)
            made.append(Case("mse_loss", f"{size[0]}x{size[1]} {name}", work, bytes=moved, device=device))
    return made
