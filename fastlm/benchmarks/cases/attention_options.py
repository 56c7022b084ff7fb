"""Attention with a mask, a bias or dropout, forward and backward, and one query row against a cache of keys.

Without torch.compile, which calls the same functions of torch.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import (
    DTYPES,
    eager_compiled_ours,
    forward_alone,
    forward_backward,
    in_float64,
    leaf,
    outputs_of,
)
from fastlm.benchmarks.cases.attention import flops
from fastlm.benchmarks.harness import Built, Case, Variant

SHAPE, QUICK = (4, 12, 1024, 64), (2, 4, 256, 64)  # (B, H, T, D)
CACHE, QUICK_CACHE = (8, 12, 2048, 64), (2, 4, 256, 64)  # of the keys and values
KINDS = {"lower-triangular mask": 0.5, "random mask": 1.0, "bias with gradient": 1.0, "causal dropout 0.1": 0.5}
"""The share of the scores that is needed: no tile of a random mask can be left out."""


def lower_triangular(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def random_mask(T: int) -> Tensor:
    """Every second key, and always the query's own."""
    return (torch.rand(T, T, generator=torch.Generator().manual_seed(8)) < 0.5).fill_diagonal_(True)


def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return fastlm.attention(q, k, v, bias=bias)


def build(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Built:
    stock, ours = F.scaled_dot_product_attention, fastlm.attention
    inputs = [leaf(shape, dtype, device, seed) for seed in range(3)]
    dy = leaf(shape, dtype, device, seed=3).detach()
    T = shape[2]
    if kind == "causal dropout 0.1":
        # The two drop other weights: only ours is compared, with the reference in float64.
        stock = partial(stock, is_causal=True, dropout_p=0.1)
        ours = partial(ours, causal=True, dropout_p=0.1, seed=torch.tensor(5, device=device))

        def exact() -> dict[str, Tensor]:
            with fastlm.use_backend("reference"):
                return in_float64(ours, inputs, dy)()

        timed = Variant(forward_backward(ours, inputs, dy), outputs_of(ours, inputs, dy))
        return Built({"torch": Variant(forward_backward(stock, inputs, dy)), "fastlm": timed}, exact)
    if kind == "bias with gradient":
        inputs.append(leaf((shape[1], T, T), dtype, device, seed=4))
        ours = with_bias
    else:
        mask = (lower_triangular if kind == "lower-triangular mask" else random_mask)(T).to(device)
        stock, ours = partial(stock, attn_mask=mask), partial(ours, mask=mask)
    return eager_compiled_ours(stock, ours, inputs, dy, quick=True)


def build_decode(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Built:
    B, H, _, D = shape
    q, k, v = leaf((B, H, 1, D), dtype, device, 0), leaf(shape, dtype, device, 1), leaf(shape, dtype, device, 2)
    dy = leaf((B, H, 1, D), dtype, device, 3).detach()
    return forward_alone(F.scaled_dot_product_attention, fastlm.attention, [q, k, v], dy)


def cases(device: str, quick: bool) -> list[Case]:
    shape, cache = (QUICK, QUICK_CACHE) if quick else (SHAPE, CACHE)
    made = []
    for name, dtype in DTYPES.items():
        kind_of = str(dtype).removeprefix("torch.")
        for kind, share in KINDS.items():
            work = partial(build, kind, shape, dtype, device)
            needed = flops(*shape) * 2 * share
            made.append(
                Case("attention_options", f"{kind} {shape} {name}", work, dtype=kind_of, flops=needed, device=device)
            )
        made.append(
            Case(
                "attention_options",
                f"one query, {cache[2]} keys {cache} {name}",
                partial(build_decode, cache, dtype, device),
                dtype=kind_of,
                bytes=2 * math.prod(cache) * dtype.itemsize,
                device=device,
            )
        )
    return made
