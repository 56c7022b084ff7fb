"""act(gate) * up in Triton: one pass over memory each way. gate and up may be parts of wider rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._activations import SAVE_OUTPUT
from fastlm.kernels._common import matrix, unsupported_dtype
from fastlm.kernels.triton._common import launch, rows_and_columns, triton_kernel, widen
from fastlm.kernels.triton.activation import act_gradient, act_value

_BT, _BD = 8, 128


@triton.jit
def tile(T, D, BT: tl.constexpr, BD: tl.constexpr):
    """[BT, BD]: the rows and columns of a program's tile, and which of them there are."""
    n_d = tl.cdiv(D, BD)
    o_t = (tl.program_id(0) // n_d).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.program_id(0) % n_d * BD + tl.arange(0, BD)
    return o_t[:, None], o_d[None, :], (o_t < T)[:, None] & (o_d < D)[None, :]


@triton.jit
def glu_fwd_kernel(
    p_gate, p_up, p_y, gate_st, up_st, T, D, ACT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    o_t, o_d, m_td = tile(T, D, BT, BD)
    # [BT, BD] each
    b_gate = widen(tl.load(p_gate + o_t * gate_st + o_d, mask=m_td))
    b_up = widen(tl.load(p_up + o_t * up_st + o_d, mask=m_td))
    tl.store(p_y + o_t * D + o_d, (act_value(b_gate, ACT) * b_up).to(p_y.dtype.element_ty), mask=m_td)


@triton.jit
def glu_bwd_kernel(
    p_dy, p_gate, p_up, p_dgate, p_dup, gate_st, up_st, T, D,
    ACT: tl.constexpr, SAVES_OUTPUT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_t, o_d, m_td = tile(T, D, BT, BD)
    # [BT, BD] each
    b_dy = widen(tl.load(p_dy + o_t * D + o_d, mask=m_td))
    b_gate = widen(tl.load(p_gate + o_t * gate_st + o_d, mask=m_td))
    b_up = widen(tl.load(p_up + o_t * up_st + o_d, mask=m_td))
    b_value = act_value(b_gate, ACT)
    b_dgate = act_gradient(b_dy * b_up, b_value if SAVES_OUTPUT else b_gate, ACT)
    tl.store(p_dgate + o_t * D + o_d, b_dgate.to(p_dgate.dtype.element_ty), mask=m_td)
    tl.store(p_dup + o_t * D + o_d, (b_dy * b_value).to(p_dup.dtype.element_ty), mask=m_td)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton_kernel("glu", unsupported_dtype)
def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    y = _empty_like(gate)
    T, D = rows_and_columns(y)
    gate, up = matrix(gate), matrix(up)
    programs = triton.cdiv(T, _BT) * triton.cdiv(D, _BD)
    launch(glu_fwd_kernel, programs, gate, up, y, gate.stride(0), up.stride(0), T, D, ACT=act, BT=_BT, BD=_BD)
    return y


@triton_kernel("glu_backward", unsupported_dtype)
def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _empty_like(gate), _empty_like(up)
    T, D = rows_and_columns(dgate)
    gate, up = matrix(gate), matrix(up)
    programs = triton.cdiv(T, _BT) * triton.cdiv(D, _BD)
    launch(
        glu_bwd_kernel, programs, dy.contiguous(), gate, up, dgate, dup, gate.stride(0), up.stride(0), T, D,
        ACT=act, SAVES_OUTPUT=act in SAVE_OUTPUT, BT=_BT, BD=_BD,
    )  # fmt: skip
    return dgate, dup
