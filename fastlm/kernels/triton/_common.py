"""What the Triton kernels share: registration, launch.

Naming code: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask, `b_` block of values; sizes
B H T S D (batch, heads, queries, keys, head dim), blocks BT BS BD; a comment gives the shape of each load.

Rules that Triton does not enforce: values are widened to float32 before any arithmetic (the interpreter keeps bfloat16
as bare bits); offsets into tensors are int64; NaN must survive, so selections are comparisons, never tl.maximum.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype

# Triton reads the variable when a kernel is decorated, so it holds for the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def triton_kernel(op: str, supports: Callable[..., str | None]) -> Callable[[Callable], Callable]:
    """Register the decorated function for CUDA, and for the CPU where TRITON_INTERPRET=1."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for device in _DEVICES:
            kernel(op, backend="triton", device=device, supports=supports)(run)
        return run

    return register


def unsupported_in_float32(x: Tensor, *_: object) -> str | None:
    """Of a kernel with a number among its arguments, which Triton hands over in float32."""
    return "does not take torch.float64" if x.dtype == torch.float64 else unsupported_dtype(x)


def rows_and_columns(x: Tensor) -> tuple[int, int]:
    """Of x (..., N), (rows, N); no rows where N is 0."""
    columns = x.shape[-1]
    return (x.numel() // columns if columns else 0), columns


def launch(jit_kernel: Any, programs: int, first: Tensor, *args: Any, **constants: Any) -> None:
    """Run `programs` instances on the device of `first`: Triton itself takes the current device, whatever it is given.

    The grid has one dimension, the only one that may pass 65,535.
    """
    if programs == 0:
        return
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            jit_kernel[(programs,)](first, *args, **constants)
    else:
        jit_kernel[(programs,)](first, *args, **constants)


@triton.jit
def widen(b_x):
    """float64 as it is, everything else as float32."""
    if b_x.dtype != tl.float64:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def tanh_and_slope(b_x):
    """tanh(x), by its series near 0, where the quotient would cancel; and 1 - tanh(x)^2, which cancels far from 0."""
    b_square = b_x * b_x
    b_series = 1 + b_square * (-1 / 3 + b_square * (2 / 15 + b_square * (-17 / 315 + b_square * (62 / 2835))))
    b_e = tl.exp2(-2.8853900817779268 * tl.abs(b_x))  # exp(-2 |x|)
    b_inverse = 1 / (1 + b_e)
    b_quotient = (1 - b_e) * b_inverse
    near = 1e-4 if b_x.dtype == tl.float64 else 0.0625  # the first term left out, 0.009 x^10, is below rounding
    b_tanh = tl.where(b_square < near, b_x * b_series, tl.where(b_x < 0, -b_quotient, b_quotient))
    return b_tanh, 4 * b_e * (b_inverse * b_inverse)


@triton.jit
def tanh(b_x):
    return tanh_and_slope(b_x)[0]


if INTERPRETED:

    def loop_bound(i_x):
        """A scalar as an int: NumPy 2.4 no longer makes one of the interpreter's (triton-lang/triton#9171)."""
        return i_x.handle.data.item() if isinstance(i_x, tl.tensor) else i_x

else:

    @triton.jit
    def loop_bound(i_x):
        return i_x


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that configurations are chosen for; (0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def processors(device: torch.device) -> int:
    """How many multiprocessors a device has; 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
