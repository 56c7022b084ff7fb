"""Activations in Triton: their formulas, those of csrc/cuda/activation.cu, for every kernel that applies one, and gelu,
silu, sigmoid and tanh in one pass over memory each, in the layout of the tensor that is saved. NaN stays NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._common import as_laid_out, unsupported_dtype
from fastlm.kernels.triton._common import launch, tanh, triton_kernel, widen

# Eight elements a thread with four warps: one or two 128-bit accesses for each tensor.
_BLOCK = 1024
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by `approximate`


# --- formulas ---------------------------------------------------------------------------------------------------------
@triton.jit
def sigmoid_and_rest(b_x):
    """s = sigmoid(x), and 1 - s: from exp(-|x|), so that neither loses digits where it is small."""
    b_t = tl.exp(-tl.abs(b_x))
    b_more = 1 / (1 + b_t)
    b_less = b_t * b_more
    return tl.where(b_x < 0, b_less, b_more), tl.where(b_x < 0, b_more, b_less)


@triton.jit
def gelu_tanh_gate(b_x):
    """0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): that sigmoid, and 1 less it."""
    return sigmoid_and_rest(b_x * (1.5957691216057308 + 0.07135481627260025 * (b_x * b_x)))


@triton.jit
def normal(b_x):
    """The normal distribution's probability below x."""
    return 0.5 * (1 + tl.math.erf(b_x * 0.7071067811865476))


@triton.jit
def act_value(b_x, ACT: tl.constexpr):
    b_y = b_x
    if ACT == "relu":
        b_y = tl.where(b_x <= 0, 0.0, b_x)  # false at NaN, which stays
    elif ACT == "relu_squared":
        b_y = tl.where(b_x <= 0, 0.0, b_x * b_x)
    elif ACT == "gelu":
        b_y = b_x * normal(b_x)
    elif ACT == "gelu_tanh":
        b_y = b_x * gelu_tanh_gate(b_x)[0]
    elif ACT == "silu":
        b_y = b_x * sigmoid_and_rest(b_x)[0]
    elif ACT == "sigmoid":
        b_y = sigmoid_and_rest(b_x)[0]
    elif ACT == "tanh":
        b_y = tanh(b_x)
    else:
        tl.static_assert(ACT == "none")
    return b_y


@triton.jit
def act_gradient(b_dy, b_saved, ACT: tl.constexpr):
    """`b_saved` is the output of those in fastlm._activations.SAVE_OUTPUT, the input of the others."""
    b_dx = b_dy
    if ACT == "relu":
        b_dx = tl.where(b_saved <= 0, 0.0, b_dy)
    elif ACT == "relu_squared":
        b_dx = tl.where(b_saved <= 0, 0.0, b_dy * (b_saved + b_saved))
    elif ACT == "gelu":
        b_density = 0.3989422804014327 * tl.exp(-0.5 * b_saved * b_saved)
        b_dx = b_dy * (normal(b_saved) + b_saved * b_density)
    elif ACT == "gelu_tanh":
        b_s, b_rest = gelu_tanh_gate(b_saved)
        # In this order: where s (1 - s) is 0, x^3 may be infinite.
        b_slope = b_s * b_rest * b_saved * (1.5957691216057308 + 0.21406444881780076 * (b_saved * b_saved))
        b_dx = b_dy * (b_s + b_slope)
    elif ACT == "silu":
        b_s, b_rest = sigmoid_and_rest(b_saved)
        b_dx = b_dy * b_s * (1 + b_saved * b_rest)
    elif ACT == "sigmoid":
        b_dx = b_dy * (1 - b_saved) * b_saved
    elif ACT == "tanh":
        b_dx = b_dy * (1 - b_saved * b_saved)
    else:
        tl.static_assert(ACT == "none")
    return b_dx


# --- kernels ----------------------------------------------------------------------------------------------------------
@triton.jit
def act_fwd_kernel(p_x, p_y, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    # [BLOCK]
    b_x = widen(tl.load(p_x + o_n, mask=m_n))
    tl.store(p_y + o_n, act_value(b_x, ACT).to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def act_bwd_kernel(p_dy, p_saved, p_dx, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    # [BLOCK]
    b_dy = widen(tl.load(p_dy + o_n, mask=m_n))
    # [BLOCK]
    b_saved = widen(tl.load(p_saved + o_n, mask=m_n))
    tl.store(p_dx + o_n, act_gradient(b_dy, b_saved, ACT).to(p_dx.dtype.element_ty), mask=m_n)


# --- launch -----------------------------------------------------------------------------------------------------------
def value(x: Tensor, act: str) -> Tensor:
    y = torch.empty_like(x)
    n = x.numel()
    launch(act_fwd_kernel, triton.cdiv(n, _BLOCK), as_laid_out(x, y), y, n, ACT=act, BLOCK=_BLOCK)
    return y


def gradient(dy: Tensor, saved: Tensor, act: str) -> Tensor:
    dx = torch.empty_like(saved)
    dy, saved, n = as_laid_out(dy, dx), as_laid_out(saved, dx), dx.numel()
    launch(act_bwd_kernel, triton.cdiv(n, _BLOCK), dy, saved, dx, n, ACT=act, BLOCK=_BLOCK)
    return dx


@triton_kernel("gelu", unsupported_dtype)
def gelu(x: Tensor, approximate: str) -> Tensor:
    return value(x, _GELU[approximate])


@triton_kernel("gelu_backward", unsupported_dtype)
def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return gradient(dy, x, _GELU[approximate])


@triton_kernel("silu", unsupported_dtype)
def silu(x: Tensor) -> Tensor:
    return value(x, "silu")


@triton_kernel("silu_backward", unsupported_dtype)
def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return gradient(dy, x, "silu")


@triton_kernel("sigmoid", unsupported_dtype)
def sigmoid(x: Tensor) -> Tensor:
    return value(x, "sigmoid")


@triton_kernel("sigmoid_backward", unsupported_dtype)
def sigmoid_backward(dy: Tensor, y: Tensor) -> Tensor:
    return gradient(dy, y, "sigmoid")


@triton_kernel("tanh", unsupported_dtype)
def tanh_(x: Tensor) -> Tensor:  # `tanh` is the formula
    return value(x, "tanh")


@triton_kernel("tanh_backward", unsupported_dtype)
def tanh_backward(dy: Tensor, y: Tensor) -> Tensor:
    return gradient(dy, y, "tanh")
