"""Attention in Triton: tiles of scores live on the chip only, with an online softmax (FlashAttention-2,
https://arxiv.org/abs/2307.08691).

Key j is visible to query i where lo <= j - i <= hi: every causal alignment and window is a choice of two diagonals. A
tile of scores is skipped, full, or cut by a diagonal or by the end of a sequence; only cut tiles pay for masks. Scores
are kept in units of log 2. The backward has one kernel for dk and dv, by tiles of keys, and one for dq, by tiles of
queries: each sum has one owner and, with tiles of one size, one order, so gradients are the same in every run. Another
size is another order: see _tuning.py for when it may change.

Packed sequences: tiles have numbers that need no lengths from the host, and a program finds its sequence by bisection
(csrc/cuda/attention_index.h). Terms of a score that are not given are no arguments of the compiled kernel.

Masked positions must not contribute, yet in a product of tiles a weight of 0 turns a NaN or an infinity into NaN. So
each program looks at its sums once, at the end; where they are not all finite it adds them up again, one position after
the other under the mask: slow, rare, and free for everyone else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._attention import empty_in_order_of, lse_of_no_key, sinks_gradient
from fastlm.kernels._common import with_rows
from fastlm.kernels.triton._common import capability, launch, loop_bound, tanh, triton_kernel
from fastlm.kernels.triton._tuning import Configuration, bucket, pick

_LOG2E = math.log2(math.e)
# Bound for the diagonals, so that differences of positions and diagonals stay in 32 bits.
_FAR = 2**30
_MAX_HEAD_DIM = 256


# --- device code ------------------------------------------------------------------------------------------------------
@triton.jit
def load_rows(p_x, stride, o_t, o_d, T, D):
    """[BT, BD]: rows o_t of a (T, D) matrix, 0 outside."""
    m_td = (o_t < T)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_t.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_td, other=0.0)


@triton.jit
def store_rows(p_x, stride, o_t, o_d, T, D, b_x):
    m_td = (o_t < T)[:, None] & (o_d < D)[None, :]
    p_x += o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=m_td)


@triton.jit
def dot(b_a, b_b, b_acc):
    """b_acc + b_a @ b_b; float32 in float32, never TF32."""
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def tile_ranges(i_first, i_last, N, lo, hi, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, BN: tl.constexpr):
    """What rows i_first..i_last see of N columns, row i seeing i + lo to i + hi.

    Tiles of BN columns begin at multiples of BN. Those in [begin, end) are seen by some row; those in
    [full_begin, full_end) wholly by every row.
    """
    begin, full_begin, full_end, end = 0, 0, N, N
    if HAS_LO:
        begin = tl.maximum(i_first + lo, 0) // BN * BN
        full_begin = tl.cdiv(tl.maximum(i_last + lo, 0), BN) * BN
    if HAS_HI:
        full_end = tl.minimum(tl.maximum(i_first + hi + 1, 0), N)
        end = tl.minimum(tl.maximum(i_last + hi + 1, 0), N)
    return begin, full_begin, full_end // BN * BN, end


@triton.jit
def place(number, p_own, p_other, own, other, n_sequences, BLOCK: tl.constexpr):
    """What tile `number` works on: the tile within its sequence, then the sequence's first row and length, those of the
    tile's own kind and the others. Rows past the end where no tile has the number."""
    tile, own_begin, other_begin = number, number * 0, number * 0
    if p_own is not None:
        low, high = number * 0, number * 0 + n_sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(p_own + middle) // BLOCK + middle <= number:
                low = middle
            else:
                high = middle - 1
        tile = (number - tl.load(p_own + low) // BLOCK - low).to(tl.int32)
        # What the ends say wrongly leads outside of no tensor.
        own_begin = tl.minimum(tl.maximum(tl.load(p_own + low), 0), own).to(tl.int32)
        own = tl.minimum(tl.maximum(tl.load(p_own + low + 1), own_begin), own).to(tl.int32) - own_begin
        other_begin = tl.minimum(tl.maximum(tl.load(p_other + low), 0), other).to(tl.int32)
        other = tl.minimum(tl.maximum(tl.load(p_other + low + 1), other_begin), other).to(tl.int32) - other_begin
    return tile, own_begin, own, other_begin, other


@triton.jit
def of_scores(
    i_b, i_h, i_bh, i_q0, i_k0, T, S, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh, bias_st, bias_ss, p_slopes
):  # fmt: skip
    """Where a sequence's mask and bias begin, the number of its first score, and its slope in units of log 2."""
    o_mask = i_b * mask_sb + i_h * mask_sh + i_q0.to(tl.int64) * mask_st + i_k0.to(tl.int64) * mask_ss
    o_bias = i_b * bias_sb + i_h * bias_sh + i_q0.to(tl.int64) * bias_st + i_k0.to(tl.int64) * bias_ss
    slope = 0.0
    if p_slopes is not None:
        slope = tl.load(p_slopes + i_bh) * 1.4426950408889634
    return o_mask, o_bias, (i_bh * T + i_q0) * S + i_k0, slope


@triton.jit
def diagonals(lo, hi, hi_start, T, S, HAS_HI: tl.constexpr, HAS_HI_START: tl.constexpr):
    """From those that count from the last key for the last query, and from the first key for the first query."""
    top = hi_start
    if HAS_HI:
        top = S - T + hi
        if HAS_HI_START:
            top = tl.minimum(top, hi_start)
    return S - T + lo, top


@triton.jit
def visible(
    o_t, o_s, T, S, lo, hi, p_mask, o_mask, mask_st, mask_ss, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr
):  # fmt: skip
    """Which keys o_s are visible to which queries o_t; the two broadcast."""
    m_ts = (o_t < T) & (o_s < S)
    if HAS_LO:
        m_ts &= o_s - o_t >= lo
    if HAS_HI:
        m_ts &= o_s - o_t <= hi
    if p_mask is not None:
        p_mask += o_mask + (o_t + o_s * 0).to(tl.int64) * mask_st + (o_s + o_t * 0).to(tl.int64) * mask_ss
        m_ts &= tl.load(p_mask, mask=m_ts, other=0) != 0
    return m_ts


@triton.jit
def capped(b_s, scale, cap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2 from the products of queries and keys."""
    b_s *= scale
    if SOFTCAP:
        b_s = tanh(b_s) * cap
    return b_s


@triton.jit
def with_terms(b_s, o_t, o_s, T, S, p_bias, o_bias, bias_st, bias_ss, p_slopes, slope):
    """Scores with bias and ALiBi; the slope in units of log 2."""
    if p_bias is not None:
        p_bias += o_bias + (o_t + o_s * 0).to(tl.int64) * bias_st + (o_s + o_t * 0).to(tl.int64) * bias_ss
        b_s += tl.load(p_bias, mask=(o_t < T) & (o_s < S), other=0.0).to(tl.float32) * 1.4426950408889634
    if p_slopes is not None:
        b_s -= slope * tl.abs(o_s - o_t - (S - T)).to(tl.float32)
    return b_s


@triton.jit
def keep_factor(o_t, o_s, element0, row, p_seed, drop_below, keep_scale):
    """By which dropout multiplies weights, 0 for those that it drops: see fastlm/_dropout.py."""
    o_ts = element0 + (o_t + o_s * 0).to(tl.int64) * row + o_s
    counter = o_ts // 4
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), low, high, low * 0, low * 0)
    i_word = o_ts % 4
    word = tl.where(i_word < 2, tl.where(i_word == 0, w0, w1), tl.where(i_word == 2, w2, w3))
    return tl.where(word.to(tl.int64) >= drop_below, keep_scale, 0.0)


@triton.jit
def kept(b_x, b_keep):
    """Chosen, not multiplied: what is dropped may be NaN."""
    return tl.where(b_keep == 0.0, 0.0, b_x * b_keep)


@triton.jit
def all_finite(b_x):
    return tl.max(tl.max(tl.where(tl.abs(b_x) < float("inf"), 0, 1), axis=1), axis=0) == 0


# Triton would compile anew for 1 and for multiples of 16, and gain nothing.
_SIZES = ["T", "S", "lo", "hi", "hi_start", "n_sequences", "drop_below"]


@triton.jit(do_not_specialize=_SIZES)
def attention_fwd_kernel(
    p_q, p_k, p_v, p_o, p_lse,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, o_sb, o_sh, o_st,
    H, G, T, S, lo, hi, hi_start, scale, cap,
    p_mask, p_bias, p_slopes, p_sinks, p_seed, p_ends_q, p_ends_k, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh,
    bias_st, bias_ss, n_t, n_sequences, drop_below, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, HAS_HI_START: tl.constexpr, EVEN_S: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    i_bh = (tl.program_id(0) // n_t).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    row, total = S, T
    i_t, i_q0, T, i_k0, S = place(tl.program_id(0) % n_t, p_ends_q, p_ends_k, T, S, n_sequences, BT)
    i_t = tl.cdiv(T, BT) - 1 - i_t
    if i_t < 0:
        return
    # The last queries see most under a causal mask: they go first, so that no long program starts late.
    lo, hi = diagonals(lo, hi, hi_start, T, S, HAS_HI, HAS_HI_START)
    p_q += i_b * q_sb + i_h * q_sh + i_q0.to(tl.int64) * q_st
    p_k += i_b * k_sb + i_h // G * k_sh + i_k0.to(tl.int64) * k_ss
    p_v += i_b * v_sb + i_h // G * v_sh + i_k0.to(tl.int64) * v_ss
    p_o += i_b * o_sb + i_h * o_sh + i_q0.to(tl.int64) * o_st
    p_lse += i_bh * total + i_q0
    o_mask, o_bias, element0, slope = of_scores(
        i_b, i_h, i_bh, i_q0, i_k0, total, row, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh, bias_st,
        bias_ss, p_slopes,
    )  # fmt: skip

    o_t, o_d, o_dv = i_t * BT + tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BDV)
    # [BT, BD]
    b_q = load_rows(p_q, q_st, o_t, o_d, T, D)
    b_max = tl.full([BT], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BT], dtype=tl.float32)
    b_o = tl.zeros([BT, BDV], dtype=tl.float32)
    i_last = tl.minimum(i_t * BT + BT, T) - 1
    begin, full_begin, full_end, end = tile_ranges(i_t * BT, i_last, S, lo, hi, HAS_LO, HAS_HI or HAS_HI_START, BS)
    for PART in tl.static_range(3):  # cut tiles, full ones, cut ones
        if (PART == 1) or ((PART == 0 and HAS_LO) or (PART == 2 and (HAS_HI or HAS_HI_START or not EVEN_S))):
            first = begin if PART == 0 else (full_begin if PART == 1 else tl.maximum(full_begin, full_end))
            last = tl.minimum(full_begin, end) if PART == 0 else (full_end if PART == 1 else end)
            for i_s in range(loop_bound(first), loop_bound(last), BS):
                o_s = i_s + tl.arange(0, BS)
                # [BS, BD]
                b_k = load_rows(p_k, k_ss, o_s, o_d, S, D)
                b_s = capped(dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], dtype=tl.float32)), scale, cap, SOFTCAP)
                b_s = with_terms(
                    b_s, o_t[:, None], o_s[None, :], T, S, p_bias, o_bias, bias_st, bias_ss, p_slopes, slope
                )
                if (PART != 1) or (p_mask is not None):
                    m_ts = visible(
                        o_t[:, None],
                        o_s[None, :],
                        T,
                        S,
                        lo,
                        hi,
                        p_mask,
                        o_mask,
                        mask_st,
                        mask_ss,
                        HAS_LO,
                        HAS_HI or HAS_HI_START,
                    )
                    b_s = tl.where(m_ts, b_s, float("-inf"))
                # A NaN score is dropped here, but not by exp2: its row becomes NaN.
                b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
                b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen so far: all weights are 0
                b_p = tl.exp2(b_s - b_finite[:, None])
                b_decay = tl.exp2(b_max - b_finite)
                b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
                b_o *= b_decay[:, None]
                b_max = b_new
                if p_seed is not None:
                    # Times keep_scale at the end: in float16 it may be more than a weight can hold.
                    b_p = kept(b_p, keep_factor(o_t[:, None], o_s[None, :], element0, row, p_seed, drop_below, 1.0))
                # [BS, BDV]
                b_v = load_rows(p_v, v_ss, o_s, o_dv, S, DV)
                b_o = dot(b_p.to(b_v.dtype), b_v, b_o)

    if p_sinks is not None:  # one more key, which has no value
        sink = tl.load(p_sinks + i_bh) * 1.4426950408889634
        b_new = tl.maximum(b_max, sink)
        b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
        endless = sink == float("inf")  # it takes all of the weight
        b_decay = tl.where(endless, 0.0, tl.exp2(b_max - b_finite))
        b_sum = tl.where(endless, 1.0, b_sum * b_decay + tl.exp2(sink - b_finite))
        b_o *= b_decay[:, None]
        b_max = b_new
    m_seen = (b_max > float("-inf")) | (b_sum != 0)  # a NaN is seen
    b_finite = tl.where(b_max == float("-inf"), 0.0, b_max)
    if p_seed is not None:
        b_o *= keep_scale
    b_lse = tl.where(m_seen, (b_max + tl.log2(b_sum)) * 0.6931471805599453, float("-inf"))
    tl.store(p_lse + o_t, b_lse, mask=o_t < T)
    if all_finite(b_o):
        store_rows(p_o, o_st, o_t, o_dv, T, DV, tl.where(m_seen[:, None], b_o / b_sum[:, None], 0.0))
    else:
        b_sums = tl.zeros([BT, BDV], dtype=tl.float32)
        for i_s in range(loop_bound(begin), loop_bound(end)):
            # [1, BD]
            b_k1 = load_rows(p_k, k_ss, i_s + tl.arange(0, 1), o_d, S, D).to(tl.float32)
            # [1, BDV]
            b_v1 = load_rows(p_v, v_ss, i_s + tl.arange(0, 1), o_dv, S, DV).to(tl.float32)
            b_s1 = capped(tl.sum(b_q.to(tl.float32) * b_k1, axis=1), scale, cap, SOFTCAP)
            b_s1 = with_terms(b_s1, o_t, i_s, T, S, p_bias, o_bias, bias_st, bias_ss, p_slopes, slope)
            b_p1 = tl.exp2(b_s1 - b_finite)
            if p_seed is not None:
                b_p1 = kept(b_p1, keep_factor(o_t, i_s, element0, row, p_seed, drop_below, keep_scale))
            m_t = visible(o_t, i_s, T, S, lo, hi, p_mask, o_mask, mask_st, mask_ss, HAS_LO, HAS_HI or HAS_HI_START)
            b_sums = tl.where(m_t[:, None], b_sums + b_p1[:, None] * b_v1, b_sums)
        store_rows(p_o, o_st, o_t, o_dv, T, DV, tl.where(m_seen[:, None], b_sums / b_sum[:, None], 0.0))


@triton.jit(do_not_specialize=["T"])
def attention_delta_kernel(
    p_do, p_o, p_dlse, p_delta, do_sb, do_sh, do_st, o_sb, o_sh, o_st, H, T,
    DV: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The term of the softmax's gradient that a whole row shares: the sum of do * o over the row, minus dlse."""
    n_t = tl.cdiv(T, BT)
    i_bh = (tl.program_id(0) // n_t).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_t, o_dv = tl.program_id(0) % n_t * BT + tl.arange(0, BT), tl.arange(0, BDV)
    # [BT, BDV]
    b_do = load_rows(p_do + i_b * do_sb + i_h * do_sh, do_st, o_t, o_dv, T, DV).to(tl.float32)
    # [BT, BDV]
    b_o = load_rows(p_o + i_b * o_sb + i_h * o_sh, o_st, o_t, o_dv, T, DV).to(tl.float32)
    b_delta = tl.sum(b_do * b_o, axis=1)
    if p_dlse is not None:
        # [BT]
        b_delta -= tl.load(p_dlse + i_bh * T + o_t, mask=o_t < T, other=0.0)
    tl.store(p_delta + i_bh * T + o_t, b_delta, mask=o_t < T)


@triton.jit
def weightless(b_lse):
    """In units of log 2; infinite where nothing was seen, which makes all weights 0."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)


@triton.jit
def through_cap(b_ds, b_capped, cap, SOFTCAP: tl.constexpr):
    """The gradient of the product from that of the capped score."""
    if SOFTCAP:
        b_tanh = b_capped / cap
        b_ds = tl.where(b_ds == 0.0, 0.0, b_ds * (1 - b_tanh * b_tanh))
    return b_ds


@triton.jit(do_not_specialize=_SIZES)
def attention_bwd_dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, do_sb, do_sh, do_st,
    dk_sb, dk_sh, dk_ss, dv_sb, dv_sh, dv_ss,
    dk_scale, H, G, T, S, lo, hi, hi_start, scale, cap,
    p_mask, p_bias, p_slopes, p_seed, p_ends_q, p_ends_k, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh,
    bias_st, bias_ss, n_s, n_sequences, drop_below, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, HAS_HI_START: tl.constexpr, EVEN_T: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of keys of one key head, and goes over the queries of all G query heads that read it.

    Scores are computed transposed, [BS, BT], as both products over queries want them.
    """
    i_bk = (tl.program_id(0) // n_s).to(tl.int64)
    i_b, i_hk = i_bk // (H // G), i_bk % (H // G)
    row, total = S, T
    i_s, i_k0, S, i_q0, T = place(tl.program_id(0) % n_s, p_ends_k, p_ends_q, S, T, n_sequences, BS)
    if (i_s < 0) | (i_s * BS >= S):
        return
    lo, hi = diagonals(lo, hi, hi_start, T, S, HAS_HI, HAS_HI_START)
    p_k += i_b * k_sb + i_hk * k_sh + i_k0.to(tl.int64) * k_ss
    p_v += i_b * v_sb + i_hk * v_sh + i_k0.to(tl.int64) * v_ss

    o_s, o_d, o_dv = i_s * BS + tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BDV)
    # [BS, BD]
    b_k = load_rows(p_k, k_ss, o_s, o_d, S, D)
    # [BS, BDV]
    b_v = load_rows(p_v, v_ss, o_s, o_dv, S, DV)
    b_dk = tl.zeros([BS, BD], dtype=tl.float32)
    b_dv = tl.zeros([BS, BDV], dtype=tl.float32)
    j_last = tl.minimum(i_s * BS + BS, S) - 1
    begin, full_begin, full_end, end = tile_ranges(i_s * BS, j_last, T, -hi, -lo, HAS_HI or HAS_HI_START, HAS_LO, BT)
    for i_g in range(loop_bound(G)):
        i_h = i_hk * G + i_g
        i_bh = i_b * H + i_h
        p_qh = p_q + i_b * q_sb + i_h * q_sh + i_q0.to(tl.int64) * q_st
        p_doh = p_do + i_b * do_sb + i_h * do_sh + i_q0.to(tl.int64) * do_st
        p_lseh = p_lse + i_bh * total + i_q0
        p_deltah = p_delta + i_bh * total + i_q0
        o_mask, o_bias, element0, slope = of_scores(
            i_b, i_h, i_bh, i_q0, i_k0, total, row, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh, bias_st,
            bias_ss, p_slopes,
        )  # fmt: skip
        for PART in tl.static_range(3):  # cut tiles, full ones, cut ones
            if (PART == 1) or ((PART == 0 and (HAS_HI or HAS_HI_START)) or (PART == 2 and (HAS_LO or not EVEN_T))):
                first = begin if PART == 0 else (full_begin if PART == 1 else tl.maximum(full_begin, full_end))
                last = tl.minimum(full_begin, end) if PART == 0 else (full_end if PART == 1 else end)
                for i_t in range(loop_bound(first), loop_bound(last), BT):
                    o_t = i_t + tl.arange(0, BT)
                    # [BT, BD]
                    b_q = load_rows(p_qh, q_st, o_t, o_d, T, D)
                    # [BT]
                    b_lse = weightless(tl.load(p_lseh + o_t, mask=o_t < T, other=0.0))
                    b_c = dot(b_k, tl.trans(b_q), tl.zeros([BS, BT], dtype=tl.float32))
                    b_c = capped(b_c, scale, cap, SOFTCAP)
                    b_s = with_terms(
                        b_c, o_t[None, :], o_s[:, None], T, S, p_bias, o_bias, bias_st, bias_ss, p_slopes, slope
                    )
                    b_p = tl.exp2(b_s - b_lse[None, :])
                    if (PART != 1) or (p_mask is not None):
                        m_st = visible(
                            o_t[None, :],
                            o_s[:, None],
                            T,
                            S,
                            lo,
                            hi,
                            p_mask,
                            o_mask,
                            mask_st,
                            mask_ss,
                            HAS_LO,
                            HAS_HI or HAS_HI_START,
                        )
                        b_p = tl.where(m_st, b_p, 0.0)
                    # [BT, BDV]
                    b_do = load_rows(p_doh, do_st, o_t, o_dv, T, DV)
                    b_dp = dot(b_v, tl.trans(b_do), tl.zeros([BS, BT], dtype=tl.float32))
                    b_kept = b_p
                    if p_seed is not None:
                        b_keep = keep_factor(o_t[None, :], o_s[:, None], element0, row, p_seed, drop_below, keep_scale)
                        b_dp, b_kept = kept(b_dp, b_keep), tl.where(b_keep == 0.0, 0.0, b_p)
                    b_dv = dot(b_kept.to(b_do.dtype), b_do, b_dv)
                    # [BT]
                    b_delta = tl.load(p_deltah + o_t, mask=o_t < T, other=0.0)
                    b_ds = through_cap(b_p * (b_dp - b_delta[None, :]), b_c, cap, SOFTCAP)
                    if (PART != 1) or (p_mask is not None):
                        b_ds = tl.where(m_st, b_ds, 0.0)
                    b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    if p_seed is not None:
        b_dv *= keep_scale
    p_dk += i_b * dk_sb + i_hk * dk_sh + i_k0.to(tl.int64) * dk_ss
    p_dv += i_b * dv_sb + i_hk * dv_sh + i_k0.to(tl.int64) * dv_ss
    if all_finite(b_dk) and all_finite(b_dv):
        store_rows(p_dk, dk_ss, o_s, o_d, S, D, b_dk * dk_scale)
        store_rows(p_dv, dv_ss, o_s, o_dv, S, DV, b_dv)
    else:
        b_dk_sums = tl.zeros([BS, BD], dtype=tl.float32)
        b_dv_sums = tl.zeros([BS, BDV], dtype=tl.float32)
        for i_g in range(loop_bound(G)):
            i_h = i_hk * G + i_g
            i_bh = i_b * H + i_h
            p_qh = p_q + i_b * q_sb + i_h * q_sh + i_q0.to(tl.int64) * q_st
            p_doh = p_do + i_b * do_sb + i_h * do_sh + i_q0.to(tl.int64) * do_st
            o_mask, o_bias, element0, slope = of_scores(
                i_b, i_h, i_bh, i_q0, i_k0, total, row, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh, bias_st,
                bias_ss, p_slopes,
            )  # fmt: skip
            for i_t in range(loop_bound(begin), loop_bound(end)):
                o_1 = i_t + tl.arange(0, 1)
                # [1, BD]
                b_q1 = load_rows(p_qh, q_st, o_1, o_d, T, D).to(tl.float32)
                # [1, BDV]
                b_do1 = load_rows(p_doh, do_st, o_1, o_dv, T, DV).to(tl.float32)
                b_lse1 = weightless(tl.load(p_lse + i_bh * total + i_q0 + i_t))
                b_delta1 = tl.load(p_delta + i_bh * total + i_q0 + i_t)
                b_c1 = capped(tl.sum(b_k.to(tl.float32) * b_q1, axis=1), scale, cap, SOFTCAP)
                b_s1 = with_terms(b_c1, i_t, o_s, T, S, p_bias, o_bias, bias_st, bias_ss, p_slopes, slope)
                b_p1 = tl.exp2(b_s1 - b_lse1)
                b_dp1 = tl.sum(b_v.to(tl.float32) * b_do1, axis=1)
                b_kept1 = b_p1
                if p_seed is not None:
                    b_keep = keep_factor(i_t, o_s, element0, row, p_seed, drop_below, keep_scale)
                    b_dp1, b_kept1 = kept(b_dp1, b_keep), kept(b_p1, b_keep)
                b_ds1 = through_cap(b_p1 * (b_dp1 - b_delta1), b_c1, cap, SOFTCAP)
                m_s = visible(i_t, o_s, T, S, lo, hi, p_mask, o_mask, mask_st, mask_ss, HAS_LO, HAS_HI or HAS_HI_START)
                b_dv_sums = tl.where(m_s[:, None], b_dv_sums + b_kept1[:, None] * b_do1, b_dv_sums)
                b_dk_sums = tl.where(m_s[:, None], b_dk_sums + b_ds1[:, None] * b_q1, b_dk_sums)
        store_rows(p_dk, dk_ss, o_s, o_d, S, D, b_dk_sums * dk_scale)
        store_rows(p_dv, dv_ss, o_s, o_dv, S, DV, b_dv_sums)


@triton.jit(do_not_specialize=_SIZES)
def attention_bwd_dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, p_dbias, p_dslopes,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, do_sb, do_sh, do_st, dq_sb, dq_sh, dq_st,
    dq_scale, H, G, T, S, lo, hi, hi_start, scale, cap,
    p_mask, p_bias, p_slopes, p_seed, p_ends_q, p_ends_k, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh,
    bias_st, bias_ss, n_t, n_sequences, drop_below, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, HAS_HI_START: tl.constexpr, EVEN_S: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dq; and of the same scores the gradients of bias, (B, H, T, S) and zero before, and of the slopes, (B, H, T)."""
    i_bh = (tl.program_id(0) // n_t).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    row, total = S, T
    i_t, i_q0, T, i_k0, S = place(tl.program_id(0) % n_t, p_ends_q, p_ends_k, T, S, n_sequences, BT)
    i_t = tl.cdiv(T, BT) - 1 - i_t
    if i_t < 0:
        return
    lo, hi = diagonals(lo, hi, hi_start, T, S, HAS_HI, HAS_HI_START)
    p_q += i_b * q_sb + i_h * q_sh + i_q0.to(tl.int64) * q_st
    p_do += i_b * do_sb + i_h * do_sh + i_q0.to(tl.int64) * do_st
    p_k += i_b * k_sb + i_h // G * k_sh + i_k0.to(tl.int64) * k_ss
    p_v += i_b * v_sb + i_h // G * v_sh + i_k0.to(tl.int64) * v_ss
    o_mask, o_bias, element0, slope = of_scores(
        i_b, i_h, i_bh, i_q0, i_k0, total, row, mask_sb, mask_sh, mask_st, mask_ss, bias_sb, bias_sh, bias_st,
        bias_ss, p_slopes,
    )  # fmt: skip

    o_t, o_d, o_dv = i_t * BT + tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BDV)
    # [BT, BD]
    b_q = load_rows(p_q, q_st, o_t, o_d, T, D)
    # [BT, BDV]
    b_do = load_rows(p_do, do_st, o_t, o_dv, T, DV)
    # [BT]
    b_lse = weightless(tl.load(p_lse + i_bh * total + i_q0 + o_t, mask=o_t < T, other=0.0))
    # [BT]
    b_delta = tl.load(p_delta + i_bh * total + i_q0 + o_t, mask=o_t < T, other=0.0)
    b_dq = tl.zeros([BT, BD], dtype=tl.float32)
    b_dslopes = tl.zeros([BT], dtype=tl.float32)
    i_last = tl.minimum(i_t * BT + BT, T) - 1
    begin, full_begin, full_end, end = tile_ranges(i_t * BT, i_last, S, lo, hi, HAS_LO, HAS_HI or HAS_HI_START, BS)
    for PART in tl.static_range(3):  # cut tiles, full ones, cut ones
        if (PART == 1) or ((PART == 0 and HAS_LO) or (PART == 2 and (HAS_HI or HAS_HI_START or not EVEN_S))):
            first = begin if PART == 0 else (full_begin if PART == 1 else tl.maximum(full_begin, full_end))
            last = tl.minimum(full_begin, end) if PART == 0 else (full_end if PART == 1 else end)
            for i_s in range(loop_bound(first), loop_bound(last), BS):
                o_s = i_s + tl.arange(0, BS)
                # [BS, BD]
                b_k = load_rows(p_k, k_ss, o_s, o_d, S, D)
                # [BS, BDV]
                b_v = load_rows(p_v, v_ss, o_s, o_dv, S, DV)
                b_c = capped(dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], dtype=tl.float32)), scale, cap, SOFTCAP)
                b_s = with_terms(
                    b_c, o_t[:, None], o_s[None, :], T, S, p_bias, o_bias, bias_st, bias_ss, p_slopes, slope
                )
                b_p = tl.exp2(b_s - b_lse[:, None])
                b_dp = dot(b_do, tl.trans(b_v), tl.zeros([BT, BS], dtype=tl.float32))
                if p_seed is not None:
                    b_keep = keep_factor(o_t[:, None], o_s[None, :], element0, row, p_seed, drop_below, keep_scale)
                    b_dp = kept(b_dp, b_keep)
                b_ds = b_p * (b_dp - b_delta[:, None])
                if (PART != 1) or (p_mask is not None):
                    m_ts = visible(
                        o_t[:, None],
                        o_s[None, :],
                        T,
                        S,
                        lo,
                        hi,
                        p_mask,
                        o_mask,
                        mask_st,
                        mask_ss,
                        HAS_LO,
                        HAS_HI or HAS_HI_START,
                    )
                    b_ds = tl.where(m_ts, b_ds, 0.0)
                if p_dbias is not None:
                    p_ds = p_dbias + element0 + o_t.to(tl.int64)[:, None] * row + o_s[None, :]
                    tl.store(p_ds, b_ds, mask=(o_t < T)[:, None] & (o_s < S)[None, :])
                if p_dslopes is not None:
                    b_far = tl.abs(o_s[None, :] - o_t[:, None] - (S - T)).to(tl.float32)
                    b_dslopes -= tl.sum(b_ds * b_far, axis=1)
                b_dq = dot(through_cap(b_ds, b_c, cap, SOFTCAP).to(b_k.dtype), b_k, b_dq)
    if p_dslopes is not None:
        tl.store(p_dslopes + i_bh * total + i_q0 + o_t, b_dslopes, mask=o_t < T)
    p_dq += i_b * dq_sb + i_h * dq_sh + i_q0.to(tl.int64) * dq_st
    if all_finite(b_dq):
        store_rows(p_dq, dq_st, o_t, o_d, T, D, b_dq * dq_scale)
    else:
        b_sums = tl.zeros([BT, BD], dtype=tl.float32)
        for i_s in range(loop_bound(begin), loop_bound(end)):
            # [1, BD]
            b_k1 = load_rows(p_k, k_ss, i_s + tl.arange(0, 1), o_d, S, D).to(tl.float32)
            # [1, BDV]
            b_v1 = load_rows(p_v, v_ss, i_s + tl.arange(0, 1), o_dv, S, DV).to(tl.float32)
            b_c1 = capped(tl.sum(b_q.to(tl.float32) * b_k1, axis=1), scale, cap, SOFTCAP)
            b_s1 = with_terms(b_c1, o_t, i_s, T, S, p_bias, o_bias, bias_st, bias_ss, p_slopes, slope)
            b_dp1 = tl.sum(b_do.to(tl.float32) * b_v1, axis=1)
            if p_seed is not None:
                b_dp1 = kept(b_dp1, keep_factor(o_t, i_s, element0, row, p_seed, drop_below, keep_scale))
            b_ds1 = through_cap(tl.exp2(b_s1 - b_lse) * (b_dp1 - b_delta), b_c1, cap, SOFTCAP)
            m_t = visible(o_t, i_s, T, S, lo, hi, p_mask, o_mask, mask_st, mask_ss, HAS_LO, HAS_HI or HAS_HI_START)
            b_sums = tl.where(m_t[:, None], b_sums + b_ds1[:, None] * b_k1, b_sums)
        store_rows(p_dq, dq_st, o_t, o_d, T, D, b_sums * dq_scale)


# --- launch -----------------------------------------------------------------------------------------------------------
# (BT, BS, num_warps, num_stages) by kernel and head dim (the larger of the two, as a power of two): the default and
# what _tuning.py tries beside it. Each costs a compilation at a key's first call, so there are few, those that the
# compiler speaks for: 16-bit tiles up to a head dim of 128 spill no register, and all fit into the 99 KB of shared
# memory that sm_86, sm_89 and sm_120 have. In float32 products unroll instead of going to tensor cores, so tiles are
# small.
_HALF_TILES = {
    "fwd": {
        64: [(128, 64, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3)],
        128: [(128, 32, 8, 2), (128, 32, 8, 3)],
        256: [(64, 32, 8, 2), (32, 32, 4, 2)],
    },
    "dkdv": {
        64: [(64, 64, 8, 2), (32, 64, 4, 2), (32, 128, 8, 2)],
        128: [(64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1)],
        256: [(32, 32, 8, 2)],
    },
    "dq": {
        64: [(64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
        128: [(64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 1)],
        256: [(32, 32, 8, 1), (32, 32, 8, 2)],
    },
}
_FLOAT_TILES = {
    32: [(16, 32, 8, 1), (16, 32, 4, 1)],
    64: [(32, 32, 8, 1)],
    128: [(32, 32, 8, 1)],
    256: [(16, 16, 8, 1)],
}
# Up to 227 KB of shared memory, and products from it.
_HOPPER_TILES = {
    "fwd": {
        64: [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)],
        128: [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    },
    "dkdv": {
        64: [(64, 64, 8, 2), (64, 64, 8, 3), (64, 128, 8, 2)],
        128: [(32, 64, 8, 2), (32, 64, 8, 3)],
    },
    "dq": {
        64: [(64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
        128: [(64, 64, 8, 2), (64, 64, 8, 3), (128, 32, 8, 2)],
    },
}
# Masks, biases, slopes and dropout need registers of their own.
_TILES_WITH_TERMS = {
    "fwd": [(64, 32, 8, 1), (64, 32, 8, 2), (64, 32, 4, 1)],
    "dkdv": [(32, 32, 8, 1), (32, 32, 8, 2)],
    "dq": [(32, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 2)],
}
# Up to so many queries and keys the default is as good as any, and a key is not worth its time.
_TOO_SMALL_TO_TUNE = 256


@functools.cache
def configurations(
    kernel: str, capability: tuple[int, int], dtype: torch.dtype, D: int, terms: bool = False
) -> tuple[Configuration, ...]:
    """Tiles, warps and pipeline stages that one kernel, "fwd", "dkdv" or "dq", may run with; the default first."""
    if dtype == torch.float32:
        tiles = _FLOAT_TILES[max(D, 32)]
    elif terms:
        tiles = _TILES_WITH_TERMS[kernel][: 1 if D > 128 else None]
    else:
        tiles = _HALF_TILES[kernel][max(D, 64)]
        if capability[0] == 9:
            tiles = _HOPPER_TILES[kernel].get(max(D, 64), tiles)
    return tuple(dict(zip(("BT", "BS", "num_warps", "num_stages"), each, strict=True)) for each in tiles)


def unsupported(q: Tensor, k: Tensor, v: Tensor, *_options: object) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v of one dtype, float32, bfloat16 or float16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if not (1 <= q.shape[-1] <= _MAX_HEAD_DIM and 1 <= v.shape[-1] <= _MAX_HEAD_DIM):
        return f"takes head dims from 1 to {_MAX_HEAD_DIM}, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def _unsupported_backward(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: object
) -> str | None:
    return unsupported(q, k, v, *rest[:-1])  # the last says which gradients are wanted


class _Problem:
    """What the launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Sequence[Any]):
        (
            mask, bias, slopes, sinks, seed, ends_q, ends_k, _, _, causal, window_left, window_right, scale, softcap,
            dropout_p, _,
        ) = options  # fmt: skip
        self.B, self.H, self.T, self.D = q.shape
        self.Hk, self.S, self.DV = k.shape[1], k.shape[2], v.shape[3]
        self.dtype, self.capability = q.dtype, capability(q.device)
        self.BD, self.BDV = (max(16, triton.next_power_of_2(d)) for d in (self.D, self.DV))
        # A window counts from the last query at the last key, whatever the alignment of the causal mask.
        limits = [window_right] if window_right >= 0 else []
        if causal == 1:
            limits.append(0)
        self.flags = {
            "HAS_LO": window_left >= 0, "HAS_HI": bool(limits), "HAS_HI_START": causal == 2, "SOFTCAP": softcap > 0
        }  # fmt: skip
        # Scores are tanh(qk * scale) * cap with a cap, else qk * scale, in units of log 2.
        of_product = scale / softcap if softcap > 0 else scale * _LOG2E
        self.numbers = (
            self.H, self.H // max(self.Hk, 1), self.T, self.S, -min(_FAR, window_left), min(_FAR, *limits, _FAR), 0,
            of_product, softcap * _LOG2E,
        )  # fmt: skip
        self.bias, self.slopes, self.packed = bias, slopes, ends_q is not None

        def per_score(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.expand(self.B, self.H, self.T, self.S)

        def per_head(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.float().expand(self.B, self.H).contiguous()

        self.sinks = per_head(sinks)
        mask, bias = per_score(None if mask is None else mask.view(torch.uint8)), per_score(bias)
        ends = [None if x is None else x.long().contiguous() for x in (ends_q, ends_k)]
        self.n_sequences = ends[0].numel() - 1 if self.packed else 0
        self.tensors = (mask, bias, per_head(slopes))
        self.more_tensors = (seed.reshape(()) if dropout_p > 0 else None, *ends)
        self.strides = [stride for x in (mask, bias) for stride in (x.stride() if x is not None else (0,) * 4)]
        self.drop = (int(dropout_p * 2**32), 1 / (1 - dropout_p))

    def tiles(self, rows: int, block: int) -> int:
        """Of one head."""
        return rows // block + self.n_sequences if self.packed else triton.cdiv(rows, block)

    def terms(self, tiles: int, *sinks: Tensor | None) -> tuple:
        """The kernels' arguments from p_mask on."""
        return (*self.tensors, *sinks, *self.more_tensors, *self.strides, tiles, self.n_sequences, *self.drop)

    def run(self, kernel: str, launch_with: Callable[[dict[str, Any]], None], device: torch.device) -> None:
        """`launch_with` the constants of the configuration that suits this problem."""

        def constants(chosen: Configuration) -> dict[str, Any]:
            rows, block = (self.T, chosen["BT"]) if kernel == "dkdv" else (self.S, chosen["BS"])
            even = {"EVEN_T" if kernel == "dkdv" else "EVEN_S": rows % block == 0 and not self.packed}
            return {**chosen, **even, "D": self.D, "DV": self.DV, "BD": self.BD, "BDV": self.BDV, **self.flags}

        terms = tuple(x is not None for x in (*self.tensors, self.more_tensors[0]))
        candidates = configurations(kernel, self.capability, self.dtype, max(self.BD, self.BDV), any(terms))
        if max(self.T, self.S) <= _TOO_SMALL_TO_TUNE or self.B * self.H * self.T * self.S == 0:
            candidates = candidates[:1]
        key = (
            kernel, str(self.dtype), self.BD, self.BDV, *terms, *self.flags.values(), bucket(self.B * self.H, 256),
            self.H // max(self.Hk, 1), bucket(self.T, 8192), bucket(self.S, 8192), bucket(self.n_sequences, 256),
        )  # fmt: skip
        chosen = pick(key, candidates, lambda candidate: launch_with(constants(candidate)), device)
        launch_with(constants(chosen))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _output(like: Tensor, last: int, packed: bool) -> Tensor:
    """In the order of `like`; 0 before where sequences are packed, for rows that unchecked ends leave out."""
    x = empty_in_order_of(like, last)
    return x.zero_() if packed else x


@triton_kernel("attention", unsupported)
def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    p = _Problem(q, k, v, options)
    out = _output(q, p.DV, p.packed)
    lse = q.new_empty(p.B, p.H, p.T, dtype=torch.float32)
    if p.packed:
        lse.copy_(lse_of_no_key(p.sinks, lse))
    q, k, v, o = with_rows(q), with_rows(k), with_rows(v), with_rows(out)

    def forward(constants: dict[str, Any]) -> None:
        tiles = p.tiles(p.T, constants["BT"])
        launch(
            attention_fwd_kernel, tiles * p.B * p.H, q, k, v, o, lse, *_strides(q, k, v, o), *p.numbers,
            *p.terms(tiles, p.sinks), **constants,
        )  # fmt: skip

    p.run("fwd", forward, q.device)
    return (out if o is out else out.copy_(o)), lse


@triton_kernel("attention_backward", _unsupported_backward)
def attention_backward(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    *options, wanted = options
    p = _Problem(q, k, v, options)
    dq, dk, dv, dbias, dslopes, dsinks = (q.new_empty(0) for _ in range(6))  # outputs must not share memory
    out = [_output(t, t.shape[-1], p.packed) for t in (q, k, v)]
    do = torch.zeros_like(o) if do is None else do
    if wanted[5]:
        dsinks = sinks_gradient(do, dlse, o, lse, options[3])
    dlse = dlse.contiguous() if dlse is not None else None
    q, k, v, o, do, lse = with_rows(q), with_rows(k), with_rows(v), with_rows(o), with_rows(do), lse.contiguous()
    delta = torch.empty_like(lse)
    launch(
        attention_delta_kernel, triton.cdiv(p.T, 32) * p.B * p.H, do, o, dlse, delta, *_strides(do, o), p.H, p.T,
        DV=p.DV, BDV=p.BDV, BT=32,
    )  # fmt: skip
    scale = options[12]
    if wanted[1] or wanted[2]:
        dk, dv = with_rows(out[1]), with_rows(out[2])

        def of_keys(constants: dict[str, Any]) -> None:
            tiles = p.tiles(p.S, constants["BS"])
            launch(
                attention_bwd_dkdv_kernel, tiles * p.B * p.Hk, q, k, v, do, lse, delta, dk, dv,
                *_strides(q, k, v, do, dk, dv), scale, *p.numbers, *p.terms(tiles), **constants,
            )  # fmt: skip

        p.run("dkdv", of_keys, q.device)
        dk = (dk if dk is out[1] else out[1].copy_(dk)) if wanted[1] else q.new_empty(0)
        dv = (dv if dv is out[2] else out[2].copy_(dv)) if wanted[2] else q.new_empty(0)
    if wanted[0] or wanted[3] or wanted[4]:
        dq = with_rows(out[0])
        ds = lse.new_zeros(*lse.shape, p.S) if wanted[3] else None
        of_rows = lse.new_zeros(lse.shape) if wanted[4] else None

        def of_queries(constants: dict[str, Any]) -> None:
            tiles = p.tiles(p.T, constants["BT"])
            launch(
                attention_bwd_dq_kernel, tiles * p.B * p.H, q, k, v, do, lse, delta, dq, ds, of_rows,
                *_strides(q, k, v, do, dq), scale, *p.numbers, *p.terms(tiles), **constants,
            )  # fmt: skip

        p.run("dq", of_queries, q.device)
        dq = (dq if dq is out[0] else out[0].copy_(dq)) if wanted[0] else q.new_empty(0)
        if ds is not None:
            dbias = ds.sum_to_size(p.bias.shape).to(p.bias.dtype)
        if of_rows is not None:
            of_heads = of_rows.sum(2, dtype=torch.float64)
            dslopes = of_heads.sum_to_size(p.slopes.shape).to(p.slopes.dtype)
    return dq, dk, dv, dbias, dslopes, dsinks
