"""Attention's options and caches as the tests of the CUDA and the Triton kernels give them, and what is right."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops.attention import attention_backward_reference, attention_reference
from fastlm.ops.attention_decode import attention_decode_reference


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


TENSORS = ("mask", "bias", "alibi_slopes", "sinks", "seed", "cu_seqlens_q", "cu_seqlens_k")


def options(causal=0, window=(-1, -1), scale=1.0, softcap=0.0, dropout_p=0.0, deterministic=True, **tensors):
    """The op's arguments after q, k and v."""
    return (*(tensors.get(name) for name in TENSORS), 0, 0, causal, *window, scale, softcap, dropout_p, deterministic)


def scattered(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed) > -0.5


# Sizes: batch 2, 4 query heads, 2 key heads, 70 queries, 90 keys, unless packed.
OPTIONS = {
    "mask": {"mask": scattered(2, 4, 70, 90)},
    "mask of keys": {"mask": scattered(2, 1, 1, 90), "causal": 1},
    "mask that hides rows": {"mask": scattered(70, 1)},
    "bias": {"bias": draw(2, 4, 70, 90)},
    "bias that hides rows": {"bias": torch.where(scattered(70, 1), draw(70, 90), -math.inf)},
    "bias of all": {"bias": draw(4, 1, 90), "causal": 2},
    "bias in fp16": {"bias": draw(1, 1, 70, 1, dtype=torch.float16)},
    "alibi": {"alibi_slopes": draw(4).abs() / 8, "causal": 1},
    "alibi of each sequence": {"alibi_slopes": draw(2, 4).abs() / 8},
    "sinks": {"sinks": draw(4), "causal": 1, "window": (9, 0)},
    "sink alone": {"sinks": draw(4), "mask": scattered(70, 1)},
    "softcap": {"softcap": 1.5, "causal": 1},
    "dropout": {"dropout_p": 0.3, "seed": torch.tensor(77), "causal": 1},
    "dropout of nearly all": {"dropout_p": 0.99999, "seed": torch.tensor(3)},  # 1 / (1 - p) is no float16
    "dropout, odd rows": {"dropout_p": 0.6, "seed": torch.tensor([2**62 + 5]), "sizes": (1, 2, 1, 5, 67)},
    "packed": {"cu_seqlens_q": [0, 20, 20, 61, 70], "cu_seqlens_k": [0, 30, 35, 90, 90], "causal": 1, "batch": 1},
    "packed, window": {"cu_seqlens_q": [0, 1, 69, 70], "cu_seqlens_k": [0, 0, 66, 90], "window": (5, 3), "batch": 1},
    "all": {
        "mask": scattered(2, 1, 70, 90), "bias": draw(4, 70, 90), "alibi_slopes": draw(4).abs() / 8, "sinks": draw(4),
        "softcap": 2.0, "dropout_p": 0.2, "seed": torch.tensor(-3), "causal": 1, "window": (40, 10),
    },
    "all, packed": {
        "mask": scattered(1, 70, 90), "bias": draw(1, 4, 70, 90), "alibi_slopes": draw(4).abs() / 8, "sinks": draw(4),
        "softcap": 2.0, "dropout_p": 0.2, "seed": torch.tensor(5), "cu_seqlens_q": [0, 20, 20, 61, 70],
        "cu_seqlens_k": [0, 30, 35, 90, 90], "causal": 2, "batch": 1,
    },
}  # fmt: skip


class OptionCase(NamedTuple):
    """The op's arguments, and in float64 what it is to give."""

    qkv: list[Tensor]
    do: Tensor
    dlse: Tensor
    options: tuple[Any, ...]
    wanted: list[bool]
    o: Tensor
    lse: Tensor
    gradients: tuple[Tensor, ...]


def option_case(name: str, dtype: torch.dtype, width: int, width_v: int, device: torch.device | str) -> OptionCase:
    given = dict(OPTIONS[name])
    batch, heads, heads_k, q_len, k_len = given.pop("sizes", (given.pop("batch", 2), 4, 2, 70, 90))
    for ends in ("cu_seqlens_q", "cu_seqlens_k"):
        if ends in given:
            given[ends] = torch.tensor(given[ends], dtype=torch.int32)
    q, k, v = (
        draw(batch, h, t, d, dtype=dtype, seed=i)
        for i, (h, t, d) in enumerate([(heads, q_len, width), (heads_k, k_len, width), (heads_k, k_len, width_v)])
    )
    do, dlse = draw(batch, heads, q_len, width_v, dtype=dtype, seed=3), draw(batch, heads, q_len, seed=4)
    extras = ("bias", "alibi_slopes", "sinks")
    wanted = [True] * 3 + [name in given for name in extras]
    exact = options(scale=width**-0.5, **{n: t.double() if n in extras else t for n, t in given.items()})
    wide = [t.double() for t in (q, k, v)]
    o, lse = attention_reference(*wide, *exact)
    dlse = torch.where(lse == -math.inf, 0, dlse)
    gradients = attention_backward_reference(do.double(), dlse, *wide, o, lse, *exact, wanted)
    moved = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in given.items()}
    q, k, v, do, dlse = (t.to(device) for t in (q, k, v, do, dlse))
    return OptionCase([q, k, v], do, dlse, options(scale=width**-0.5, **moved), wanted, o, lse, gradients)


# query heads, key heads, queries, capacity, head dim, value dim, page size or 0, filled keys, options
DECODE = [
    (4, 2, 1, 600, 64, 64, 0, [600, 1, 257], {}),
    (4, 1, 1, 520, 128, 128, 40, [300, 520, 39], {}),
    (2, 2, 3, 90, 40, 24, 0, [90, 3, 60], {"window_left": 30}),
    (8, 1, 5, 96, 96, 96, 16, [96, 33, 5], {"window_right": -1}),  # not causal; three tiles of queries
    (3, 3, 1, 70, 100, 50, 7, [0, 70, 8], {"softcap": 1.5}),
    (4, 2, 2, 300, 192, 256, 0, [300, 299, 2], {"alibi_slopes": True, "sinks": True}),
    (4, 2, 2, 320, 256, 192, 64, [0, 320, 65], {"sinks": True, "softcap": 2.0, "window_left": 100}),
    (2, 1, 1, 64, 16, 16, 64, [64, 2, 1], {"alibi_slopes": True}),
]


def decode_case(case: tuple, dtype: torch.dtype, device: torch.device | str) -> tuple[list[Any], Tensor, Tensor]:
    """The op's arguments, and o and lse in float64."""
    heads, heads_k, queries, capacity, width, width_v, page, filled, given = case
    given, batch = {"window_left": -1, "window_right": 0, "softcap": 0.0, **given}, len(filled)
    q = draw(batch, heads, queries, width, dtype=dtype)
    k, v = (draw(batch, heads_k, capacity, d, dtype=dtype, seed=i) for i, d in ((1, width), (2, width_v)))
    for b, n in enumerate(filled):  # what is not filled must not count
        k[b, :, n:], v[b, :, n:] = math.nan, math.inf
    table = None
    if page:
        pages = capacity // page
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(1))
        k, v = (t.unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)[order] for t in (k, v))
        table = order.argsort().view(batch, pages)
        for b, n in enumerate(filled):
            table[b, -(-n // page) :] = 10**12  # of no key: not looked at
    slopes, sinks = (
        (draw(heads, seed=s) / 4) if given.get(n) else None for s, n in ((7, "alibi_slopes"), (8, "sinks"))
    )
    last = (given["window_left"], given["window_right"], width**-0.5, given["softcap"])
    lens = torch.tensor(filled)
    wide = [None if t is None else t.double() for t in (q, k, v, slopes, sinks)]
    o, lse = attention_decode_reference(*wide[:3], lens, table, *wide[3:], *last)
    tensors = (q, k, v, lens, table, slopes, sinks)
    return [*(None if t is None else t.to(device) for t in tensors), *last], o, lse
