"""relu and squared relu in Triton: one pass over memory each, in the layout of the tensor that is saved."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._common import as_laid_out, unsupported_dtype
from fastlm.kernels.triton._common import launch, triton_kernel, widen

# Eight elements a thread with four warps: one or two 128-bit accesses for each tensor.
_BLOCK = 1024


@triton.jit
def act(b_x, SQUARED: tl.constexpr):
    b_x = tl.where(b_x <= 0, 0.0, b_x)  # false at NaN, which stays
    if SQUARED:
        b_x = b_x * b_x
    return b_x


@triton.jit
def act_backward(b_dy, b_saved, SQUARED: tl.constexpr):
    """`b_saved` is the output of relu, or the input of squared relu."""
    return tl.where(b_saved <= 0, 0.0, b_dy * (b_saved + b_saved) if SQUARED else b_dy)


@triton.jit
def relu_fwd_kernel(p_x, p_y, n, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    # [BLOCK]
    b_x = widen(tl.load(p_x + o_n, mask=m_n))
    tl.store(p_y + o_n, act(b_x, SQUARED).to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def relu_bwd_kernel(p_dy, p_saved, p_dx, n, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    # [BLOCK]
    b_dy = widen(tl.load(p_dy + o_n, mask=m_n))
    # [BLOCK]
    b_saved = widen(tl.load(p_saved + o_n, mask=m_n))
    b_dx = act_backward(b_dy, b_saved, SQUARED)
    tl.store(p_dx + o_n, b_dx.to(p_dx.dtype.element_ty), mask=m_n)


def _forward(x: Tensor, squared: bool) -> Tensor:
    y = torch.empty_like(x)
    n = x.numel()
    launch(relu_fwd_kernel, triton.cdiv(n, _BLOCK), as_laid_out(x, y), y, n, SQUARED=squared, BLOCK=_BLOCK)
    return y


def _backward(dy: Tensor, saved: Tensor, squared: bool) -> Tensor:
    dx = torch.empty_like(saved)
    dy, saved, n = as_laid_out(dy, dx), as_laid_out(saved, dx), dx.numel()
    launch(relu_bwd_kernel, triton.cdiv(n, _BLOCK), dy, saved, dx, n, SQUARED=squared, BLOCK=_BLOCK)
    return dx


@triton_kernel("relu", unsupported_dtype)
def relu(x: Tensor) -> Tensor:
    return _forward(x, False)


@triton_kernel("relu_squared", unsupported_dtype)
def relu_squared(x: Tensor) -> Tensor:
    return _forward(x, True)


@triton_kernel("relu_backward", unsupported_dtype)
def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    return _backward(dy, y, False)


@triton_kernel("relu_squared_backward", unsupported_dtype)
def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _backward(dy, x, True)
