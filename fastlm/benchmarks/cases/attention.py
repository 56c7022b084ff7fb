"""Causal attention, forward and backward, in the shapes of small to middling language models."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

SHAPES = {  # (B, H, T, D)
    "cpu": [(16, 6, 256, 64), (8, 8, 512, 64), (4, 12, 1024, 64), (1, 16, 4096, 128)],
    "cuda": [(16, 12, 1024, 64), (8, 16, 2048, 128), (2, 16, 8192, 128)],
}
QUICK = [(2, 4, 256, 64)]


def flops(B: int, H: int, T: int, D: int) -> float:
    """Of forward and backward: 2 and 5 products of (T, T) with D, of which the mask leaves half."""
    return 7 * 2 * B * H * T * T * D / 2


def build(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, quick: bool) -> Built:
    inputs = [leaf(shape, dtype, device, seed) for seed in range(3)]
    dy = leaf(shape, dtype, device, seed=3).detach()
    stock = partial(F.scaled_dot_product_attention, is_causal=True)
    return eager_compiled_ours(stock, partial(fastlm.attention, causal=True), inputs, dy, quick)


def cases(device: str, quick: bool) -> list[Case]:
    made = []
    for shape in QUICK if quick else SHAPES[device]:
        for name, dtype in DTYPES.items():
            B, H, T, D = shape
            made.append(
                Case(
                    "attention",
                    f"({B}, {H}, {T}, {D}) {name}",
                    partial(build, shape, dtype, device, quick),
                    dtype=str(dtype).removeprefix("torch."),
                    flops=flops(*shape),
                    # q, k, v, o once each way, do, and the three gradients
                    bytes=12 * B * H * T * D * dtype.itemsize,
                    device=device,
                )
            )
    return made
