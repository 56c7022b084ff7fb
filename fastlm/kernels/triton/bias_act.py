"""bias + relu and bias + squared relu in Triton.

The gradient of the bias is summed in two stages, without atomics: float32 within a fixed number of rows, float64 across
them. So it depends neither on the machine nor on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._common import unsupported_bias_act_backward_on_gpu, unsupported_bias_act_on_gpu
from fastlm.kernels.triton._common import launch, triton_kernel, widen
from fastlm.kernels.triton.relu import act, act_backward

_BT, _BD = 8, 128
# Rows for one partial sum: few enough to fill a GPU at 512 rows, enough that the sums are 1 % of the traffic.
_ROWS = 64


@triton.jit
def bias_act_fwd_kernel(p_x, p_bias, p_y, T, D, SQUARED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
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
    b_y = act(b_x + b_bias[None, :], SQUARED)
    tl.store(p_y + o_td, b_y.to(p_y.dtype.element_ty), mask=m_td)


@triton.jit
def bias_act_bwd_kernel(
    p_dy, p_saved, p_bias, p_dx, p_sums, T, D,
    SQUARED: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n_d = tl.cdiv(D, BD)
    i_chunk, i_d = (tl.program_id(0) // n_d).to(tl.int64), tl.program_id(0) % n_d
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_bias = widen(tl.load(p_bias + o_d, mask=m_d))
    b_sums = tl.zeros([BT, BD], dtype=p_sums.dtype.element_ty)
    for i_t in range(0, ROWS, BT):
        o_t = i_chunk * ROWS + i_t + tl.arange(0, BT)
        m_td = (o_t < T)[:, None] & m_d[None, :]
        o_td = o_t[:, None] * D + o_d[None, :]
        # [BT, BD], and 0 outside, which adds nothing to the sums
        b_dy = widen(tl.load(p_dy + o_td, mask=m_td, other=0.0))
        # [BT, BD]
        b_saved = widen(tl.load(p_saved + o_td, mask=m_td, other=0.0))
        if SQUARED:
            b_saved += b_bias[None, :]
        b_dx = act_backward(b_dy, b_saved, SQUARED)
        tl.store(p_dx + o_td, b_dx.to(p_dx.dtype.element_ty), mask=m_td)
        b_sums += tl.where(m_td, b_dx, 0.0)
    tl.store(p_sums + i_chunk * D + o_d, tl.sum(b_sums, axis=0), mask=m_d)


def _rows_and_columns(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1]
    return (x.numel() // columns if columns else 0), columns


@triton_kernel("bias_act", unsupported_bias_act_on_gpu)
def bias_act(x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    T, D = _rows_and_columns(x)
    programs = triton.cdiv(T, _BT) * triton.cdiv(D, _BD)
    launch(bias_act_fwd_kernel, programs, x, bias, y, T, D, SQUARED=act == "relu_squared", BT=_BT, BD=_BD)
    return y


@triton_kernel("bias_act_backward", unsupported_bias_act_backward_on_gpu)
def bias_act_backward(dy: Tensor, saved: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor]:
    dy, saved, bias = dy.contiguous(), saved.contiguous(), bias.contiguous()
    dx = torch.empty_like(saved)
    T, D = _rows_and_columns(saved)
    chunks = triton.cdiv(T, _ROWS)
    sums = torch.empty(chunks, D, device=bias.device, dtype=torch.promote_types(bias.dtype, torch.float32))
    programs = chunks * triton.cdiv(D, _BD)
    launch(
        bias_act_bwd_kernel, programs, dy, saved, bias, dx, sums, T, D,
        SQUARED=act == "relu_squared", ROWS=_ROWS, BT=_BT, BD=_BD,
    )  # fmt: skip
    return dx, sums.sum(0, dtype=torch.float64).to(bias.dtype)
