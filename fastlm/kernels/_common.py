"""What the wrappers of the C++, CUDA and Triton kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def unsupported_dtype(x: Tensor, *_: object) -> str | None:
    return None if x.dtype in FLOATS else f"does not take {x.dtype}"


def check_rope_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    N, T, _, D = x.shape
    half = cos.shape[-1]
    if cos.shape not in ((1, T, half), (N, T, half)) or sin.shape != cos.shape or not 2 <= 2 * half <= D:
        raise ValueError(
            f"rope: cos and sin must be (1 or N, T, R/2) for x (N, T, H, D) = {tuple(x.shape)}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is recorded on x's device: what the host does now, a replay will not do again."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def number(x: Tensor | None, default: float) -> float:
    """What a tensor of one floating-point number on the CPU holds."""
    if x is None:
        return default
    if x.numel() != 1 or not x.is_floating_point():
        raise ValueError(f"fastlm: expected one floating-point number, got {x.dtype} {tuple(x.shape)}")
    return x.item()


def as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of `like`, which is dense: itself where they agree, else a copy.

    Called inside kernels, never in a traced formula, from which a compiler may drop it.
    """
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def flat(x: Tensor) -> Tensor:
    """The memory of a dense tensor, (numel,): two of one layout pair their elements in it, however many dimensions."""
    return x if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def matrix(x: Tensor) -> Tensor:
    """x (..., N) as (rows, N) with the elements of a row next to each other: a view or a copy."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return with_rows(x.reshape(rows, x.shape[-1]))


def with_rows(x: Tensor) -> Tensor:
    """x with the elements of a row next to each other, as attention's kernels read them: itself or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
