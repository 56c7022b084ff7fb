"""Attention of few queries to a cache in Triton: as in csrc/cuda/attention_decode.cu, a tile is queries of all query
heads of a group, which read the keys of their head once, by several programs where the device would be idle else. A
second kernel adds up what they found, in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._attention import empty_in_order_of
from fastlm.kernels._common import with_rows
from fastlm.kernels.triton._common import launch, loop_bound, processors, triton_kernel
from fastlm.kernels.triton.attention import all_finite, capped, dot, unsupported

_LOG2E = math.log2(math.e)
_FAR = 2**30
_BR = 16  # queries of a tile: the least that tensor cores take


# --- device code ------------------------------------------------------------------------------------------------------
@triton.jit
def key_offsets(o_s, end, i_b, i_hk, x_sb, x_sh, x_ss, p_pages, pages_row, page_count, page_size):
    """Where keys o_s of a sequence begin. A page that does not exist is never read."""
    o_x = o_s.to(tl.int64) * x_ss + i_b * x_sb
    if p_pages is not None:
        i_page = tl.load(p_pages + i_b * pages_row + o_s // page_size, mask=o_s < end, other=0)
        i_page = tl.minimum(tl.maximum(i_page, 0), page_count - 1)
        o_x = (o_s % page_size).to(tl.int64) * x_ss + i_page * x_sb
    return o_x + i_hk * x_sh


@triton.jit
def seen_by(o_t, o_s, length, last, lo, hi, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr):
    m_rs = (o_s < length) & (o_t >= 0)  # always true, of the shape of both
    if HAS_LO:
        m_rs &= o_s - o_t >= last + lo
    if HAS_HI:
        m_rs &= o_s - o_t <= last + hi
    return m_rs


@triton.jit(do_not_specialize=["T", "capacity", "lo", "hi", "page_count", "pages_row", "splits"])
def attention_decode_kernel(
    p_q, p_k, p_v, p_partial, p_lens, p_pages, p_slopes,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, pages_row, page_count, page_size,
    B, H, G, T, capacity, lo, hi, scale, cap, splits,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    n_r = tl.cdiv(G * T, BR)
    i_split = tl.program_id(0) % splits
    i_r = tl.program_id(0) // splits % n_r
    i_bk = (tl.program_id(0) // splits // n_r).to(tl.int64)
    i_b, i_hk = i_bk // (H // G), i_bk % (H // G)
    length = tl.minimum(tl.maximum(tl.load(p_lens + i_b), 0), capacity).to(tl.int32)
    last = length - T  # the last query sits on the last key

    o_r, o_d, o_dv = i_r * BR + tl.arange(0, BR), tl.arange(0, BD), tl.arange(0, BDV)
    o_t, o_h = o_r % T, i_hk * G + o_r // T
    m_r = o_r < G * T
    # [BR, BD]
    b_q = tl.load(
        p_q + (i_b * q_sb + o_h * q_sh + o_t.to(tl.int64) * q_st)[:, None] + o_d[None, :],
        mask=m_r[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
    b_slope = tl.zeros([BR], dtype=tl.float32)
    if p_slopes is not None:
        # [BR]
        b_slope = tl.load(p_slopes + i_b * H + o_h, mask=m_r, other=0.0) * 1.4426950408889634
    begin, end = length * 0, length
    if HAS_LO:
        begin = tl.maximum(last + lo, 0) // BS * BS
    if HAS_HI:
        end = tl.minimum(tl.maximum(T + last + hi, 0), length)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BS), splits) * BS
    first = begin + i_split * share
    end = tl.minimum(first + share, end)

    b_max = tl.full([BR], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BR], dtype=tl.float32)
    b_o = tl.zeros([BR, BDV], dtype=tl.float32)
    for i_s in range(loop_bound(first), loop_bound(end), BS):
        o_s = i_s + tl.arange(0, BS)
        o_k = key_offsets(o_s, end, i_b, i_hk, k_sb, k_sh, k_ss, p_pages, pages_row, page_count, page_size)
        # [BS, BD]
        b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=(o_s < end)[:, None] & (o_d < D)[None, :], other=0.0)
        b_s = capped(dot(b_q, tl.trans(b_k), tl.zeros([BR, BS], dtype=tl.float32)), scale, cap, SOFTCAP)
        if p_slopes is not None:
            b_s -= b_slope[:, None] * tl.abs(o_s[None, :] - o_t[:, None] - last).to(tl.float32)
        m_rs = seen_by(o_t[:, None], o_s[None, :], end, last, lo, hi, HAS_LO, HAS_HI)
        b_s = tl.where(m_rs, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen so far: all weights are 0
        b_p = tl.exp2(b_s - b_finite[:, None])
        b_decay = tl.exp2(b_max - b_finite)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_o *= b_decay[:, None]
        b_max = b_new
        o_v = key_offsets(o_s, end, i_b, i_hk, v_sb, v_sh, v_ss, p_pages, pages_row, page_count, page_size)
        # [BS, BDV]
        b_v = tl.load(p_v + o_v[:, None] + o_dv[None, :], mask=(o_s < end)[:, None] & (o_dv < DV)[None, :], other=0.0)
        b_o = dot(b_p.to(b_v.dtype), b_v, b_o)

    if not all_finite(b_o):  # position by position, so that none counts for a query that does not see it
        b_finite = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_o = tl.zeros([BR, BDV], dtype=tl.float32)
        for i_s in range(loop_bound(first), loop_bound(end)):
            o_1 = i_s + tl.arange(0, 1)
            o_k1 = key_offsets(o_1, end, i_b, i_hk, k_sb, k_sh, k_ss, p_pages, pages_row, page_count, page_size)
            o_v1 = key_offsets(o_1, end, i_b, i_hk, v_sb, v_sh, v_ss, p_pages, pages_row, page_count, page_size)
            # [1, BD]
            b_k1 = tl.load(p_k + o_k1[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0).to(tl.float32)
            # [1, BDV]
            b_v1 = tl.load(p_v + o_v1[:, None] + o_dv[None, :], mask=(o_dv < DV)[None, :], other=0.0).to(tl.float32)
            b_s1 = capped(tl.sum(b_q.to(tl.float32) * b_k1, axis=1), scale, cap, SOFTCAP)
            if p_slopes is not None:
                b_s1 -= b_slope * tl.abs(i_s - o_t - last).to(tl.float32)
            m_r1 = seen_by(o_t, i_s, end, last, lo, hi, HAS_LO, HAS_HI)
            b_o = tl.where(m_r1[:, None], b_o + tl.exp2(b_s1 - b_finite)[:, None] * b_v1, b_o)

    # {sums over keys, maximum, sum of the weights} of each query
    o_n = i_split * (B * H * T) + (i_b * H + o_h) * T + o_t
    p_partial += o_n * (DV + 2)
    tl.store(p_partial[:, None] + o_dv[None, :], b_o, mask=m_r[:, None] & (o_dv < DV)[None, :])
    tl.store(p_partial + DV, b_max, mask=m_r)
    tl.store(p_partial + DV + 1, b_sum, mask=m_r)


@triton.jit(do_not_specialize=["T", "splits"])
def attention_decode_merge_kernel(
    p_partial, p_o, p_lse, p_sinks, o_sb, o_sh, o_st, B, H, T, splits, DV: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """One program adds up what the splits found of one query, and the sink."""
    i_n = tl.program_id(0).to(tl.int64)
    i_b, i_h, i_t = i_n // T // H, i_n // T % H, i_n % T
    total = (B * H * T).to(tl.int64)
    o_dv = tl.arange(0, BDV)
    top = tl.full([1], float("-inf"), dtype=tl.float32)
    if p_sinks is not None:
        top = tl.load(p_sinks + i_b * H + i_h + tl.arange(0, 1)) * 1.4426950408889634
    sink = top
    for i_split in range(loop_bound(splits)):
        of_split = tl.load(p_partial + (i_split * total + i_n) * (DV + 2) + DV + tl.arange(0, 1))
        top = tl.where(of_split > top, of_split, top)
    finite = tl.where(top == float("-inf"), 0.0, top)
    endless = sink == float("inf")  # a sink that takes all of the weight
    weights = tl.where(endless, 1.0, tl.exp2(sink - finite))
    b_o = tl.zeros([BDV], dtype=tl.float32)
    for i_split in range(loop_bound(splits)):
        p_split = p_partial + (i_split * total + i_n) * (DV + 2)
        share = tl.where(endless, 0.0, tl.exp2(tl.load(p_split + DV + tl.arange(0, 1)) - finite))
        weights += share * tl.load(p_split + DV + 1 + tl.arange(0, 1))
        # [BDV]
        b_o += share * tl.load(p_split + o_dv, mask=o_dv < DV, other=0.0)
    none = top == float("-inf")
    b_o = tl.where(none, 0.0, b_o / tl.where(none, 1.0, weights))
    p_o += i_b * o_sb + i_h * o_sh + i_t * o_st
    tl.store(p_o + o_dv, b_o.to(p_o.dtype.element_ty), mask=o_dv < DV)
    lse = tl.where(none, float("-inf"), (top + tl.log2(tl.where(none, 1.0, weights))) * 0.6931471805599453)
    tl.store(p_lse + i_n + tl.arange(0, 1), lse)


# --- launch -----------------------------------------------------------------------------------------------------------
@triton_kernel("attention_decode", unsupported)
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, window_left: int, window_right: int, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, T, D = q.shape
    (_, Hk, S, _), DV = k_cache.shape, v_cache.shape[3]
    out = empty_in_order_of(q, DV)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    q, k, v, o = with_rows(q), with_rows(k_cache), with_rows(v_cache), with_rows(out)
    pages = None if page_table is None else page_table.contiguous()
    capacity = S if pages is None else S * pages.shape[1]
    BD, BDV = (max(16, triton.next_power_of_2(d)) for d in (D, DV))
    # By what the compiler reports: no register spills, and all fits into 99 KB of shared memory. Not by _tuning.py: the
    # first call sees the fewest keys, whose number the host does not know, and would choose for all that follow.
    wide = max(BD, BDV) > 128
    BS, warps = (16, 8) if q.dtype == torch.float32 else (32, 8) if wide else (64, 4)
    G = H // Hk
    blocks = B * Hk * triton.cdiv(G * T, _BR)
    # Four programs for each multiprocessor, but not for less than 256 keys each.
    splits = max(1, min(triton.cdiv(4 * processors(q.device), blocks), triton.cdiv(capacity, 256), 128))
    partial = lse.new_empty(splits, B * H * T, DV + 2)

    def per_head(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().expand(B, H).contiguous()

    launch(
        attention_decode_kernel, blocks * splits, q, k, v, partial, cache_seqlens.contiguous(), pages,
        per_head(alibi_slopes), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        0 if pages is None else pages.shape[1], k.shape[0], max(S, 1), B, H, G, T, capacity, -min(_FAR, window_left),
        min(_FAR, window_right), scale / softcap if softcap > 0 else scale * _LOG2E, softcap * _LOG2E, splits,
        D=D, DV=DV, BD=BD, BDV=BDV, BR=_BR, BS=BS, HAS_LO=window_left >= 0, HAS_HI=window_right >= 0,
        SOFTCAP=softcap > 0, num_warps=warps, num_stages=2,
    )  # fmt: skip
    launch(
        attention_decode_merge_kernel, B * H * T, partial, o, lse, per_head(sinks), *o.stride()[:3], B, H, T, splits,
        DV=DV, BDV=BDV, num_warps=1,
    )  # fmt: skip
    return (out if o is out else out.copy_(o)), lse
