"""Causal attention, forward and backward and forward alone, in the shapes of small to middling language models."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, forward_alone, leaf
from fastlm.benchmarks.harness import Built, Case

SHAPES = {  # (B, H, T, D)
    "cpu": [(16, 6, 256, 64), (8, 8, 512, 64), (4, 12, 1024, 64), (1, 16, 4096, 128)],
    "cuda": [(16, 12, 1024, 64), (8, 16, 2048, 128), (2, 16, 8192, 128)],
}
QUICK = [(2, 4, 256, 64)]


def flops(B: int, H: int, T: int, D: int, products: int = 7) -> float:
    """Of forward and backward: 2 and 5 products of (T, T) with D, of which the mask leaves half."""
    return products * 2 * B * H * T * T * D / 2


def build(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, quick: bool, forward: bool = False
) -> Built:
    inputs = [leaf(shape, dtype, device, seed) for seed in range(3)]
    dy = leaf(shape, dtype, device, seed=3).detach()
    stock, ours = partial(F.scaled_dot_product_attention, is_causal=True), partial(fastlm.attention, causal=True)
    if forward:  # what torch.compile makes of it is the same call
        return forward_alone(stock, ours, inputs, dy)
    return eager_compiled_ours(stock, ours, inputs, dy, quick)


def cases(device: str, quick: bool) -> list[Case]:
    made = []
    for forward in (False, True):
        for shape in QUICK if quick else SHAPES[device]:
            for name, dtype in DTYPES.items():
                made.append(
                    Case(
                        "attention",
                        f"{shape} {name}" + (" forward" if forward else ""),
                        partial(build, shape, dtype, device, quick, forward),
                        dtype=str(dtype).removeprefix("torch."),
                        flops=flops(*shape, products=2 if forward else 7),
                        # q, k, v, o; backward these once more, do, and the three gradients
                        bytes=(4 if forward else 12) * math.prod(shape) * dtype.itemsize,
                        device=device,
                    )
                )
    return made
