"""act(x + bias) in Triton; dropout is a second pass, by dropout.py.

The gradient of the bias is summed in two stages, without atomics: float32 within a fixed number of rows, float64 across
them. So it depends neither on the machine nor on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._activations import SAVE_OUTPUT
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.triton._common import launch, rows_and_columns, triton_kernel, unsupported_in_float32, widen
from fastlm.kernels.triton.activation import act_gradient, act_value
from fastlm.kernels.triton.dropout import drop

_BT, _BD = 8, 128
# Rows for one partial sum: few enough to fill a GPU at 512 rows, enough that the sums are 1 % of the traffic.
_ROWS = 64


@triton.jit
def bias_act_fwd_kernel(p_x, p_bias, p_y, T, D, ACT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    n_d = tl.cdiv(D, BD)
    i_t, i_d = tl.program_id(0) // n_d, tl.program_id(0) % n_d
    o_t, o_d = i_t.to(tl.int64) * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_td = (o_t < T)[:, None] & m_d[None, :]
    o_td = o_t[:, None] * D + o_d[None, :]
    # [BD]
    b_bias = widen(tl.load(p_bias + o_d, mask=m_d))
    # [BT, BD]
    b_x = widen(tl.load(p_x + o_td, mask=m_td))
    b_y = act_value(b_x + b_bias[None, :], ACT)
    tl.store(p_y + o_td, b_y.to(p_y.dtype.element_ty), mask=m_td)


@triton.jit
def bias_act_bwd_kernel(
    p_dy, p_saved, p_bias, p_dx, p_sums, T, D,
    ACT: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """p_bias: None where the output is saved, with which it is in already."""
    n_d = tl.cdiv(D, BD)
    i_chunk, i_d = (tl.program_id(0) // n_d).to(tl.int64), tl.program_id(0) % n_d
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_sums = tl.zeros([BT, BD], dtype=p_sums.dtype.element_ty)
    for i_t in range(0, ROWS, BT):
        o_t = i_chunk * ROWS + i_t + tl.arange(0, BT)
        m_td = (o_t < T)[:, None] & m_d[None, :]
        o_td = o_t[:, None] * D + o_d[None, :]
        # [BT, BD], and 0 outside, which adds nothing to the sums
        b_dy = widen(tl.load(p_dy + o_td, mask=m_td, other=0.0))
        # [BT, BD]
        b_saved = widen(tl.load(p_saved + o_td, mask=m_td, other=0.0))
        if p_bias is not None:
            # [BD]
            b_saved += widen(tl.load(p_bias + o_d, mask=m_d, other=0.0))[None, :]
        b_dx = act_gradient(b_dy, b_saved, ACT)
        tl.store(p_dx + o_td, b_dx.to(p_dx.dtype.element_ty), mask=m_td)
        b_sums += tl.where(m_td, b_dx, 0.0)
    tl.store(p_sums + i_chunk * D + o_d, tl.sum(b_sums, axis=0), mask=m_d)


def _unsupported(x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None) -> str | None:
    return unsupported_in_float32(x) if dropout_p > 0 else unsupported_dtype(x)


@triton_kernel("bias_act", _unsupported)
def bias_act(x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    T, D = rows_and_columns(x)
    programs = triton.cdiv(T, _BT) * triton.cdiv(D, _BD)
    launch(bias_act_fwd_kernel, programs, x, bias, y, T, D, ACT=act, BT=_BT, BD=_BD)
    if dropout_p > 0:
        drop(y, y, dropout_p, seed)
    return y


@triton_kernel("bias_act_backward", unsupported_dtype)
def bias_act_backward(dy: Tensor, saved: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor]:
    dy, saved = dy.contiguous(), saved.contiguous()
    dx = torch.empty_like(saved)
    T, D = rows_and_columns(saved)
    chunks = triton.cdiv(T, _ROWS)
    sums = torch.empty(chunks, D, device=bias.device, dtype=torch.promote_types(bias.dtype, torch.float32))
    programs = chunks * triton.cdiv(D, _BD)
    launch(
        bias_act_bwd_kernel, programs, dy, saved, None if act in SAVE_OUTPUT else bias.contiguous(), dx, sums, T, D,
        ACT=act, ROWS=_ROWS, BT=_BT, BD=_BD,
    )  # fmt: skip
    return dx, sums.sum(0, dtype=torch.float64).to(bias.dtype)
