"""cross_entropy over rows of logits, and with the linear layer before it, forward and backward."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case


def classes_of(shape: tuple[int, int], device: str) -> Tensor:
    return torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(9)).to(device)


def build(dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    target = classes_of(shape, device)
    x, dy = leaf(shape, dtype, device, 0), torch.ones((), dtype=dtype, device=device)
    return eager_compiled_ours(
        lambda x: F.cross_entropy(x, target), lambda x: fastlm.cross_entropy(x, target), [x], dy, quick
    )


def build_linear(dtype: torch.dtype, R: int, D: int, C: int, device: str, quick: bool) -> Built:
    target = classes_of((R, C), device)
    weight = (leaf((C, D), dtype, device, 1).detach() / D**0.5).requires_grad_()
    return eager_compiled_ours(
        lambda x, w: F.cross_entropy(F.linear(x, w), target),
        lambda x, w: fastlm.linear_cross_entropy(x, w, target),
        [leaf((R, D), dtype, device, 0), weight],
        torch.ones((), dtype=dtype, device=device),
        quick,
    )


def cases(device: str, quick: bool) -> list[Case]:
    made = []
    R, D, C = (64, 64, 512) if quick else (2048, 768, 32768)
    for name, dtype in DTYPES.items():
        for shape in ((64, 512),) if quick else ((1024, 50304), (2048, 2048), (4096, 65)):
            # Forward reads the logits, backward reads them again and writes their gradient.
            size, label = 3 * shape[0] * shape[1] * dtype.itemsize, f"{shape[0]}x{shape[1]} {name}"
            work = partial(build, dtype, shape, device, quick)
            made.append(Case("cross_entropy", label, work, bytes=size, device=device))
        work = partial(build_linear, dtype, R, D, C, device, quick)
        kind = str(dtype).removeprefix("torch.")
        label, flops = f"linear {R}x{D} to {C} {name}", 6.0 * R * D * C
        made.append(Case("cross_entropy", label, work, dtype=kind, flops=flops, device=device))
    return made
