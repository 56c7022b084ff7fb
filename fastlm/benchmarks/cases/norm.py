"""layer_norm and rms_norm, forward and backward over 8192 rows of 768, alone and after adding the residual."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, LARGE, LARGE_TARGET, eager_compiled_ours, leaf
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


def case_of(
    kind: str, residual: bool, name: str, shape: tuple[int, int], device: str, quick: bool, target: str = ""
) -> Case:
    # Forward reads x and writes y; backward reads dy and what was normalised and writes dx. A residual is read and the
    # sum written; its gradient is dx, and that of the sum is read. The sum of both outputs, which gives them one
    # gradient, is read twice and written.
    size = (11 if residual else 5) * shape[0] * shape[1] * DTYPES[name].itemsize
    label = f"{kind}{' + residual' if residual else ''} {shape[0]}x{shape[1]} {name}"
    work = partial(build, kind, residual, DTYPES[name], shape, device, quick)
    return Case("norm", label, work, bytes=size, device=device, target=target)


def goals(device: str, quick: bool, shape: tuple[int, int] = LARGE) -> list[Case]:
    chosen = [("layer_norm", False), ("rms_norm", True)]
    return [case_of(*each, name, shape, device, quick, LARGE_TARGET) for each in chosen for name in DTYPES]


def cases(device: str, quick: bool) -> list[Case]:
    shape = (1024, 768) if quick else (8192, 768)
    made = goals(device, quick) if device == "cuda" else []
    for kind in ("layer_norm", "rms_norm"):
        for residual in (False, True):
            made += [case_of(kind, residual, name, shape, device, quick) for name in DTYPES]
    return made
