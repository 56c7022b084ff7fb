"""The embedding of a batch of tokens, forward and backward; the gradient is as large as the weight."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

SIZES = [(65, 384), (8192, 512), (50304, 768)]  # (V, N)
TOKENS = 4096


def build(V: int, N: int, dtype: torch.dtype, device: str, quick: bool) -> Built:
    # As words are distributed: the few most frequent make up a large part.
    ranks = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)).pow(3) * V
    tokens = ranks.long().to(device)
    weight, dy = leaf((V, N), dtype, device, seed=1), leaf((TOKENS, N), dtype, device, seed=2).detach()
    stock, ours = partial(F.embedding, tokens), partial(fastlm.embedding, tokens)
    return eager_compiled_ours(stock, ours, [weight], dy, quick)


def cases(device: str, quick: bool) -> list[Case]:
    made = []
    for name, dtype in DTYPES.items():
        for V, N in SIZES[:1] if quick else SIZES:
            size = (3 * TOKENS + V) * N * dtype.itemsize  # rows to y, dy to dweight
            work = partial(build, V, N, dtype, device, quick)
            made.append(Case("embedding", f"{TOKENS} of {V}x{N} {name}", work, bytes=size, device=device))
    return made
