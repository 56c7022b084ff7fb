"""Cross-entropy over rows of logits in Triton: forward reads them once, with an online softmax (Milakov and Gimelshein
2018, arXiv:1805.02867), backward reads them again and writes their gradient. A program has a row. linear_cross_entropy
is torch's products and these kernels.

Rows of an odd number of classes begin anywhere. Tiles begin at multiples of 16 elements all the same, so that all but
the two that hold a row's ends are accessed by whole vectors, without masks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels import products_gpu
from fastlm.kernels.linear_cross_entropy import by_parts, rows_on_gpu, unsupported_on_gpu
from fastlm.kernels.triton._common import (
    launch,
    loop_bound,
    tanh,
    tanh_and_slope,
    triton_kernel,
    unsupported_in_float32,
    widen,
)
from fastlm.kernels.triton._tuning import Configuration, bucket, pick

_MOST_CLASSES = 2**30  # so that offsets within a row stay in 32 bits


# --- device code ------------------------------------------------------------------------------------------------------
@triton.jit
def begin_of(i_r, C, BC: tl.constexpr):
    """Of row i_r: the element at which its tiles begin, how many more come before its first, and the tiles' number."""
    i_first = i_r * C
    i_begin = i_first // 16 * 16
    before = (i_first - i_begin).to(tl.int32)
    return i_begin, before, tl.cdiv(before + C, BC)


@triton.jit
def part_of(n_tiles, PART: tl.constexpr):
    """A row's first tile, those in between, the last: a range of tiles."""
    first = 0 if PART == 0 else (1 if PART == 1 else tl.maximum(n_tiles - 1, 1))
    last = tl.minimum(n_tiles, 1) if PART == 0 else (n_tiles - 1 if PART == 1 else n_tiles)
    return first, last


@triton.jit
def tile(i_tile, before, C, BC: tl.constexpr, WHOLE: tl.constexpr):
    """[BC] each: the offsets of a tile from where a row's tiles begin, and whether they are of the row."""
    o_c = i_tile * BC + tl.arange(0, BC)
    m_c = tl.full([BC], True, dtype=tl.int1)
    if not WHOLE:
        m_c = (o_c >= before) & (o_c < before + C)
    return o_c, m_c


@triton.jit
def online(b_z, m_c, top, b_total, b_all, SMOOTH: tl.constexpr):
    """The largest logit, the sums of exp(z - top) and, with SMOOTH, those of z, after one more tile."""
    if SMOOTH:
        b_all += tl.where(m_c, b_z, 0.0)
    b_z = tl.where(m_c, b_z, float("-inf"))
    new_top = tl.maximum(top, tl.max(b_z, axis=0))  # a NaN gets lost here, and comes back with the sum
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # exp(-inf - -inf) would be NaN
    return new_top, b_total * tl.exp(top - base) + tl.exp(b_z - base), b_all


@triton.jit
def capped(b_x, cap, CAPPED: tl.constexpr):
    if CAPPED:
        b_x = cap * tanh(b_x * (1 / cap))
    return b_x


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_fwd_kernel(
    p_x, p_target, p_loss, p_lse, C, ignore_index, smoothing, cap,
    SMOOTH: tl.constexpr, CAPPED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + i_r)
    if target == ignore_index:
        tl.store(p_loss + i_r, 0.0)
        tl.store(p_lse + i_r, 0.0)
        return
    i_begin, before, n_tiles = begin_of(i_r, C, BC)
    p_x += tl.multiple_of(i_begin, 16)
    top = float("-inf")
    b_total, b_all = tl.zeros([BC], dtype=tl.float32), tl.zeros([BC], dtype=tl.float32)
    for PART in tl.static_range(3):
        first, last = part_of(n_tiles, PART)
        for i_tile in range(loop_bound(first), loop_bound(last)):
            o_c, m_c = tile(i_tile, before, C, BC, PART == 1)
            # [BC]
            b_z = capped(widen(tl.load(p_x + o_c, mask=m_c)), cap, CAPPED)
            top, b_total, b_all = online(b_z, m_c, top, b_total, b_all, SMOOTH)
    rest = tl.log(tl.sum(b_total, axis=0))
    known = (target >= 0) & (target < C)
    z = capped(widen(tl.load(p_x + before + target, mask=known, other=0.0)), cap, CAPPED)
    loss = (top - z) + rest
    if SMOOTH:
        loss = (1 - smoothing) * loss + smoothing * ((top - tl.sum(b_all, axis=0) / C) + rest)
    tl.store(p_loss + i_r, tl.where(known, loss, float("nan")))
    tl.store(p_lse + i_r, top + rest)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_bwd_kernel(
    p_x, p_target, p_lse, p_g, p_dlse, p_dx, C, ignore_index, smoothing, cap,
    CAPPED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + i_r)
    counts, known = target != ignore_index, (target >= 0) & (target < C)
    g = tl.where(known, tl.load(p_g + i_r), float("nan"))
    of_lse = 0.0
    if p_dlse is not None:
        of_lse = tl.load(p_dlse + i_r)
    lse = tl.load(p_lse + i_r)
    even, of_target = g * smoothing / C, g * (1 - smoothing)
    i_begin, before, n_tiles = begin_of(i_r, C, BC)
    p_x += tl.multiple_of(i_begin, 16)
    p_dx += tl.multiple_of(i_begin, 16)
    i_target = tl.where(known, before + target, -1).to(tl.int32)
    for PART in tl.static_range(3):
        first, last = part_of(n_tiles, PART)
        for i_tile in range(loop_bound(first), loop_bound(last)):
            o_c, m_c = tile(i_tile, before, C, BC, PART == 1)
            # [BC]
            b_x = widen(tl.load(p_x + o_c, mask=m_c))
            b_slope = 1.0
            if CAPPED:
                b_x, b_slope = tanh_and_slope(b_x * (1 / cap))
                b_x *= cap
            b_p = tl.exp(b_x - lse)
            # Of a class: p less its share of the target, times g, and p times dlse.
            b_dx = b_p * of_lse + (b_p * g - (even + tl.where(o_c == i_target, of_target, 0.0)))
            b_dx = tl.where(counts, b_dx * b_slope, 0.0)
            tl.store(p_dx + o_c, b_dx.to(p_dx.dtype.element_ty), mask=m_c)


# --- launch -----------------------------------------------------------------------------------------------------------
# Of long rows: the default, what the compiler speaks for, and what _tuning.py tries beside it. In the backward 8
# elements a thread: with 16 the cut tiles take more than 128 registers.
_TILES = {
    "fwd": [{"BC": 4096, "num_warps": 8}, {"BC": 2048, "num_warps": 8}, {"BC": 8192, "num_warps": 8}],
    "bwd": [{"BC": 2048, "num_warps": 8}, {"BC": 2048, "num_warps": 4}, {"BC": 4096, "num_warps": 8}],
}
_SHORT = 2048


def configurations(direction: str, C: int) -> list[Configuration]:
    """A short row is one tile, of 8 elements a thread; one of an odd number of classes maybe two."""
    if C > _SHORT:
        return _TILES[direction]
    BC = max(32, triton.next_power_of_2(C))
    return [{"BC": BC, "num_warps": max(1, BC // 256)}]


def _launch(kernel: Any, direction: str, flags: dict[str, bool], tuned: bool, x: Tensor, *args: object) -> None:
    """What is not tuned takes the default: it may overwrite what it reads, which it could not do twice."""
    R, C = x.shape
    candidates = configurations(direction, C)

    def run(c: Configuration) -> None:
        launch(kernel, R, x, *args, **flags, **c)

    sizes = (C % 16 == 0, bucket(C, 1 << 18), bucket(R, 4096))
    if not tuned:
        run(candidates[0])
        return
    key = (f"cross_entropy_{direction}", str(x.dtype), *flags.values(), *(a is None for a in args), *sizes)
    run(pick(key, candidates, run, x.device))


def _forward(x: Tensor, target: Tensor, loss: Tensor, lse: Tensor, ignore_index: int, smoothing: float, cap: float):
    flags = {"SMOOTH": smoothing > 0, "CAPPED": cap > 0}
    _launch(
        cross_entropy_fwd_kernel, "fwd", flags, True, x, target, loss, lse, x.shape[1], ignore_index, smoothing, cap
    )  # fmt: skip


def _backward(g, dlse, x: Tensor, target, lse, dx: Tensor, ignore_index: int, smoothing: float, cap: float) -> None:
    """dx may be x."""
    _launch(
        cross_entropy_bwd_kernel, "bwd", {"CAPPED": cap > 0}, dx is not x, x, target, lse, g, dlse, dx, x.shape[1],
        ignore_index, smoothing, cap,
    )  # fmt: skip


def _unsupported(x: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> str | None:
    if target.is_floating_point():
        return "does not do probabilities as targets"
    if weight is not None:
        return "does not do class weights with label smoothing"
    if x.shape[1] > _MOST_CLASSES:
        return f"takes at most {_MOST_CLASSES} classes, not {x.shape[1]}"
    return unsupported_in_float32(x)


def _unsupported_backward(g, dlse, x, target, weight, *_: object) -> str | None:
    return _unsupported(x, target, weight)


@triton_kernel("cross_entropy", _unsupported)
def cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    loss, lse = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    _forward(x.contiguous(), target.contiguous(), loss, lse, ignore_index, label_smoothing, softcap)
    return loss, lse


@triton_kernel("cross_entropy_backward", _unsupported_backward)
def cross_entropy_backward(
    g: Tensor, dlse: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float,
) -> Tensor:  # fmt: skip
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _backward(
        g.contiguous(), dlse if dlse is None else dlse.contiguous(), x.contiguous(), target.contiguous(),
        lse.contiguous(), dx, ignore_index, label_smoothing, softcap,
    )  # fmt: skip
    return dx


def _unsupported_linear(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *others: Any) -> str | None:
    if x.is_cpu and x.element_size() == 2 and others[-1][1]:
        return "sums products of 16 bits in float32 on a GPU alone"
    return _unsupported(weight.t(), target, None) or unsupported_on_gpu(x, weight, bias, target, *others)


@triton_kernel("linear_cross_entropy", _unsupported_linear)
def linear_cross_entropy(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return by_parts(products_gpu, rows_on_gpu, _forward, _backward, *args)
