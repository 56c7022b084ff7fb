"""Rotary positions in Triton (Su et al. 2021, arXiv:2104.09864): both members of a pair in one pass. x is read as it
lies, with any strides but those of the elements of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._common import check_rope_tables, unsupported_dtype, with_rows
from fastlm.kernels.triton._common import launch, triton_kernel, widen

_PAIRS = 1024  # of a program, with four warps: one or two 128-bit accesses for each half
_MOST_COLUMNS = 128


@triton.jit
def turned(b_a, b_b, b_cos, b_sin):
    """Tables of any dtype; computed in that of the pairs."""
    b_cos, b_sin = b_cos.to(b_a.dtype), b_sin.to(b_a.dtype)
    return b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin


@triton.jit
def rope_kernel(
    p_x, p_cos, p_sin, p_y, x_sn, x_st, x_sh, rows, T, H, D, half, table_rows,
    INTERLEAVED: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A row is a head at a position; programs take BR of them, and BD of their pairs or of what is not turned."""
    n_pairs = tl.cdiv(half, BD)
    n_d = n_pairs + tl.cdiv(D - 2 * half, BD)
    i_row, i_d = (tl.program_id(0) // n_d).to(tl.int64) * BR, tl.program_id(0) % n_d
    # From the position of the program's first row on in 32 bits, whose divisions are cheap.
    i_position = i_row // H
    o_h = (i_row - i_position * H).to(tl.int32) + tl.arange(0, BR)
    o_t = (i_position % T).to(tl.int32) + o_h // H
    o_n = i_position // T + o_t // T
    o_x = o_n * x_sn + (o_t % T).to(tl.int64) * x_st + (o_h % H).to(tl.int64) * x_sh
    p_x += o_x[:, None]
    p_y += (i_row + tl.arange(0, BR))[:, None] * D
    m_r = (i_row + tl.arange(0, BR) < rows)[:, None]
    if i_d < n_pairs:
        o_d = i_d * BD + tl.arange(0, BD)[None, :]
        m_rd = m_r & (o_d < half)
        o_place = ((i_position % table_rows).to(tl.int32) + o_h // H) % table_rows
        o_table = o_place.to(tl.int64)[:, None] * half + o_d
        # [BR, BD] each
        b_cos = tl.load(p_cos + o_table, mask=m_rd)
        b_sin = tl.load(p_sin + o_table, mask=m_rd)
        if INTERLEAVED:
            o_e = 2 * i_d * BD + tl.arange(0, 2 * BD)[None, :]
            m_re = m_r & (o_e < 2 * half)
            # [BR, 2 BD]
            b_x = widen(tl.load(p_x + o_e, mask=m_re))
            b_a, b_b = tl.split(tl.reshape(b_x, [BR, BD, 2]))
            b_a, b_b = turned(b_a, b_b, b_cos, b_sin)
            b_y = tl.reshape(tl.join(b_a, b_b), [BR, 2 * BD])
            tl.store(p_y + o_e, b_y.to(p_y.dtype.element_ty), mask=m_re)
        else:
            # [BR, BD] each
            b_a = widen(tl.load(p_x + o_d, mask=m_rd))
            b_b = widen(tl.load(p_x + half + o_d, mask=m_rd))
            b_a, b_b = turned(b_a, b_b, b_cos, b_sin)
            tl.store(p_y + o_d, b_a.to(p_y.dtype.element_ty), mask=m_rd)
            tl.store(p_y + half + o_d, b_b.to(p_y.dtype.element_ty), mask=m_rd)
    else:
        o_d = 2 * half + (i_d - n_pairs) * BD + tl.arange(0, BD)[None, :]
        # [BR, BD]
        b_rest = tl.load(p_x + o_d, mask=m_r & (o_d < D))
        tl.store(p_y + o_d, b_rest, mask=m_r & (o_d < D))


@triton_kernel("rope", unsupported_dtype)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    check_rope_tables(x, cos, sin)
    N, T, H, D = x.shape
    half = cos.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    x, cos, sin = with_rows(x), cos.contiguous(), sin.contiguous()
    BD = min(_MOST_COLUMNS, triton.next_power_of_2(half))
    BR = _PAIRS // BD
    rows = N * T * H
    tiles = triton.cdiv(half, BD) + triton.cdiv(D - 2 * half, BD)
    launch(
        rope_kernel, triton.cdiv(rows, BR) * tiles, x, cos, sin, y, *x.stride()[:3], rows, T, H, D,
        half, cos.shape[0] * T, INTERLEAVED=interleaved, BR=BR, BD=BD,
    )  # fmt: skip
    return y
