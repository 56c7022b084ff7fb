"""The embedding of a batch of tokens, forward and backward; the gradient is as large as the weight. On a GPU also what
it is to reach there.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

SIZES = [(65, 384), (8192, 512), (50304, 768)]  # (V, N)
TOKENS = 4096
GOAL = (16384, 131072, 4096)  # tokens, V, N


def build(tokens: int, V: int, N: int, dtype: torch.dtype, device: str, quick: bool) -> Built:
    # As words are distributed: the few most frequent make up a large part.
    ranks = torch.rand(tokens, generator=torch.Generator().manual_seed(0)).pow(3) * V
    index = ranks.long().to(device)
    weight, dy = leaf((V, N), dtype, device, seed=1), leaf((tokens, N), dtype, device, seed=2).detach()
    stock, ours = partial(F.embedding, index), partial(fastlm.embedding, index)
    return eager_compiled_ours(stock, ours, [weight], dy, quick)


def case_of(tokens: int, V: int, N: int, name: str, device: str, quick: bool, target: str = "") -> Case:
    size = (3 * tokens + V) * N * DTYPES[name].itemsize  # rows to y, dy to dweight
    work = partial(build, tokens, V, N, DTYPES[name], device, quick)
    return Case("embedding", f"{tokens} of {V}x{N} {name}", work, bytes=size, device=device, target=target)


def goals(device: str, quick: bool, sizes: tuple[int, int, int] = GOAL) -> list[Case]:
    return [case_of(*sizes, "bf16", device, quick, "80 % of the limit")]


def cases(device: str, quick: bool) -> list[Case]:
    made = goals(device, quick) if device == "cuda" else []
    sizes = SIZES[:1] if quick else SIZES
    return made + [case_of(TOKENS, V, N, name, device, quick) for name in DTYPES for V, N in sizes]
