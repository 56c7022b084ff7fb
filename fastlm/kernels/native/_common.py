"""What the wrappers of the compiled kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def unsupported_dtype(x: Tensor, *_: object) -> str | None:
    return None if x.dtype in FLOATS else f"does not take {x.dtype}"


def as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of `like`, which is dense: itself where they agree, else a copy.

    Called inside kernels, never in a traced formula, from which a compiler may drop it.
    """
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def current_stream(x: Tensor) -> int:
    """The stream that torch works on at x's device, as the CUDA kernels take it."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of x's device."""
    return torch.cuda.get_device_capability(x.device)
