"""The sum of squared differences in Triton, and its gradient: one pass over memory each. Summed in float32 by thread,
in float64 across them and across programs, in an order that depends on the size alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._common import as_laid_out, unsupported_dtype
from fastlm.kernels.triton._common import launch, triton_kernel, widen

_BLOCK = 1024
_CHUNK = 16 * _BLOCK  # elements that a program adds up


@triton.jit
def load_difference(p_x, p_target, o_n, n):
    """[BLOCK], 0 past the end."""
    b_x = widen(tl.load(p_x + o_n, mask=o_n < n, other=0.0))
    return b_x - widen(tl.load(p_target + o_n, mask=o_n < n, other=0.0))


@triton.jit
def mse_loss_fwd_kernel(p_x, p_target, p_sums, n, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    i_chunk = tl.program_id(0)
    b_sums = tl.zeros([BLOCK], dtype=tl.float32 if p_x.dtype.element_ty != tl.float64 else tl.float64)
    for i_n in range(0, CHUNK, BLOCK):
        b_off = load_difference(p_x, p_target, i_chunk.to(tl.int64) * CHUNK + i_n + tl.arange(0, BLOCK), n)
        b_sums += b_off * b_off
    tl.store(p_sums + i_chunk, tl.sum(b_sums.to(tl.float64), axis=0))


@triton.jit
def mse_loss_bwd_kernel(p_x, p_target, p_g, p_dx, n, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_dx = 2 * tl.load(p_g) * load_difference(p_x, p_target, o_n, n)
    tl.store(p_dx + o_n, b_dx.to(p_dx.dtype.element_ty), mask=o_n < n)


def _operands(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    return x, as_laid_out(target, x)


@triton_kernel("mse_loss", unsupported_dtype)
def mse_loss(x: Tensor, target: Tensor) -> Tensor:
    x, target = _operands(x, target)
    n = x.numel()
    sums = x.new_empty(triton.cdiv(n, _CHUNK), dtype=torch.float64)
    launch(mse_loss_fwd_kernel, len(sums), x, target, sums, n, CHUNK=_CHUNK, BLOCK=_BLOCK)
    return sums.sum().to(torch.promote_types(x.dtype, torch.float32))


def _unsupported_backward(g: Tensor, x: Tensor, target: Tensor) -> str | None:
    return unsupported_dtype(x)


@triton_kernel("mse_loss_backward", _unsupported_backward)
def mse_loss_backward(g: Tensor, x: Tensor, target: Tensor) -> Tensor:
    x, target = _operands(x, target)
    dx, n = torch.empty_like(x), x.numel()
    launch(mse_loss_bwd_kernel, triton.cdiv(n, _BLOCK), x, target, g, dx, n, BLOCK=_BLOCK)
    return dx
