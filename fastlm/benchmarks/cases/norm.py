"""layer_norm and rms_norm, forward and backward over 8192 rows of 768, alone and after adding the residual."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case


def stock(kind: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    s = x if residual is None else x + residual
    y = getattr(F, kind)(s, x.shape[-1:], weight, eps=1e-5)
    return y if residual is None else y + s


def ours(kind: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    out = getattr(fastlm, kind)(x, x.shape[-1:], weight, eps=1e-5, residual=residual)
    return out if residual is None else out[0] + out[1]


def build(kind: str, residual: bool, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    inputs = [leaf(shape, dtype, device, seed=0), leaf(shape[1:], dtype, device, seed=1)]
    if residual:
        inputs.append(leaf(shape, dtype, device, seed=2))
    dy = leaf(shape, dtype, device, seed=3).detach()
    return eager_compiled_ours(partial(stock, kind), partial(ours, kind), inputs, dy, quick)


def cases(device: str, quick: bool) -> list[Case]:
    shape = (1024, 768) if quick else (8192, 768)
    made = []
    for kind in ("layer_norm", "rms_norm"):
        for residual in (False, True):
            for name, dtype in DTYPES.items():
                # Forward reads x and writes y; backward reads dy and what was normalised and writes dx. A residual is
                # read and the sum written; its gradient is dx, and that of the sum is read. The sum of both outputs,
                # which gives them one gradient, is read twice and written.
                passes = 11 if residual else 5
                size = passes * shape[0] * shape[1] * dtype.itemsize
                label = f"{kind}{' + residual' if residual else ''} {shape[0]}x{shape[1]} {name}"
                made.append(
                    Case(
                        "norm", label, partial(build, kind, residual, dtype, shape, device, quick),
                        bytes=size, device=device,
                    )
                )  # fmt: skip
    return made
