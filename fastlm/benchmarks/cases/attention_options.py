"""Attention with its options, forward and backward, and one query row against a cache of keys, contiguous or in pages.

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
    copies_beyond_the_cache,
    eager_compiled_ours,
    forward_alone,
    forward_backward,
    forward_in_turn,
    in_float64,
    leaf,
    outputs_of,
)
from fastlm.benchmarks.cases.attention import flops
from fastlm.benchmarks.harness import Built, Case, Variant

SHAPE, QUICK = (4, 12, 1024, 64), (2, 4, 256, 64)  # (B, H, T, D)
CACHE, QUICK_CACHE = (8, 12, 2048, 64), (2, 4, 256, 64)  # of the keys and values
GOAL = (32, 32, 8, 8192, 128)  # of a GPU: B, Hq, Hk, keys, D
PAGE = 64  # keys
SEQUENCES = 8  # packed into each row of SHAPE
KINDS = {
    "lower-triangular mask": 0.5, "random mask": 1.0, "bias with gradient": 1.0, "causal dropout 0.1": 0.5,
    "causal ALiBi": 0.5, "causal softcap": 0.5, "causal, packed": 0.5 / SEQUENCES,
}  # fmt: skip
"""The share of the scores that is needed: no tile of a random mask can be left out."""


def lower_triangular(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def random_mask(T: int) -> Tensor:
    """Every second key, and always the query's own."""
    return (torch.rand(T, T, generator=torch.Generator().manual_seed(8)) < 0.5).fill_diagonal_(True)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with a softcap of 50 in plain torch, which has no other."""
    s = 50 * torch.tanh(q @ k.mT * (q.shape[-1] ** -0.5 / 50))
    return s.masked_fill(~lower_triangular(q.shape[2]).to(q.device), -math.inf).softmax(-1) @ v


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
    if kind == "causal ALiBi":
        slopes, seen = torch.rand(shape[1], device=device) / 8, lower_triangular(T).to(device)
        distance = (torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)).abs()
        bias = (-slopes[:, None, None] * distance).masked_fill(~seen, -math.inf)
        stock, ours = partial(stock, attn_mask=bias), partial(ours, causal=True, alibi_slopes=slopes)
    elif kind == "causal softcap":
        stock, ours = capped, partial(ours, causal=True, softcap=50.0)
    elif kind == "causal, packed":  # as one row, so that torch gets a mask of the same size
        inputs = [x.detach()[:1].clone().requires_grad_() for x in inputs]
        dy, of = dy[:1], torch.arange(T, device=device) // (T // SEQUENCES)
        ends = torch.arange(0, T + 1, T // SEQUENCES, device=device)
        stock = partial(stock, attn_mask=(of[:, None] == of) & lower_triangular(T).to(device))
        ours = partial(ours, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
    elif kind == "bias with gradient":
        inputs.append(leaf((shape[1], T, T), dtype, device, seed=4))
        ours = with_bias
    else:
        mask = (lower_triangular if kind == "lower-triangular mask" else random_mask)(T).to(device)
        stock, ours = partial(stock, attn_mask=mask), partial(ours, mask=mask)
    return eager_compiled_ours(stock, ours, inputs, dy, quick=True)


def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastlm.attention_decode(q, k, v, cache_seqlens=torch.full(k.shape[:1], k.shape[2], device=q.device))


def decode_in_pages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """k and v, (B, S, H, D) in memory, cut into pages as they lie."""
    B, _, S, _ = k.shape
    table = torch.arange(B * S // PAGE, device=q.device).view(B, -1)
    k, v = (t.transpose(1, 2).unflatten(1, (S // PAGE, PAGE)).flatten(0, 1).transpose(1, 2) for t in (k, v))
    return fastlm.attention_decode(q, k, v, cache_seqlens=torch.full((B,), S, device=q.device), page_table=table)


def build_decode(shape: tuple[int, int, int, int], paged: bool, dtype: torch.dtype, device: str) -> Built:
    B, H, S, D = shape
    q, k, v = leaf((B, H, 1, D), dtype, device, 0), leaf(shape, dtype, device, 1), leaf(shape, dtype, device, 2)
    if paged:
        k, v = (leaf((B, S, H, D), dtype, device, seed).detach().transpose(1, 2).requires_grad_() for seed in (1, 2))
    dy = leaf((B, H, 1, D), dtype, device, 3).detach()
    return forward_alone(F.scaled_dot_product_attention, decode_in_pages if paged else decode, [q, k, v], dy)


def build_goal(B: int, Hq: int, Hk: int, S: int, D: int, device: str) -> Built:
    """bf16, several query heads on each key head."""
    generator, sizes = torch.Generator(device).manual_seed(0), [(Hq, 1), (Hk, S), (Hk, S)]
    inputs = [torch.randn(B, h, t, D, generator=generator, device=device).bfloat16() for h, t in sizes]
    lens = torch.full((B,), S, device=device)
    stock = partial(F.scaled_dot_product_attention, enable_gqa=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastlm.attention_decode(q, k, v, cache_seqlens=lens)

    def exact() -> dict[str, Tensor]:  # row by row: the whole cache is large
        return {"output": torch.cat([stock(*(x[b : b + 1].double() for x in inputs)) for b in range(B)])}

    copies = copies_beyond_the_cache(inputs)
    return Built({"torch": forward_in_turn(stock, copies), "fastlm": forward_in_turn(ours, copies)}, exact)


def goals(device: str) -> list[Case]:
    B, Hq, Hk, S, D = GOAL
    name = f"one query, {S} keys, {Hq} heads on {Hk} {(B, Hq, S, D)} bf16"
    work, size = partial(build_goal, *GOAL, device), 2 * 2 * B * (Hk * S + Hq) * D  # k, v, q, o
    target = "80 % of the bandwidth"
    return [Case("attention_options", name, work, dtype="bfloat16", bytes=size, device=device, target=target)]


def cases(device: str, quick: bool) -> list[Case]:
    shape, cache = (QUICK, QUICK_CACHE) if quick else (SHAPE, CACHE)
    made = goals(device) if device == "cuda" else []
    for name, dtype in DTYPES.items():
        kind_of = str(dtype).removeprefix("torch.")
        for kind, share in KINDS.items():
            work = partial(build, kind, shape, dtype, device)
            needed = flops(*shape) * 2 * share
            made.append(
                Case("attention_options", f"{kind} {shape} {name}", work, dtype=kind_of, flops=needed, device=device)
            )
        for paged in (False, True):
            what = f"one query, {cache[2]} keys{' in pages' if paged else ''} {cache} {name}"
            size = 2 * math.prod(cache) * dtype.itemsize
            work = partial(build_decode, cache, paged, dtype, device)
            made.append(Case("attention_options", what, work, dtype=kind_of, bytes=size, device=device))
    return made
