"""Dropout in Triton: one pass over memory, its random numbers computed on the way (see fastlm/_dropout.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton._common import launch, triton_kernel, unsupported_in_float32, widen

_BLOCK = 1024


@triton.jit
def random_words(o_counter, p_seed, N: tl.constexpr):
    """[4 N]: the four words of each of N counters, one after the other."""
    low, high = (o_counter & 0xFFFFFFFF).to(tl.uint32), (o_counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), low, high, low * 0, low * 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * N])


@triton.jit(do_not_specialize=["drop_below"])
def dropout_kernel(p_x, p_y, p_seed, n, drop_below, keep_scale, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64) * BLOCK
    o_n = i_n + tl.arange(0, BLOCK)
    m_n = o_n < n
    # [BLOCK]
    b_x = widen(tl.load(p_x + o_n, mask=m_n))
    b_word = random_words(i_n // 4 + tl.arange(0, BLOCK // 4), p_seed, BLOCK // 4)
    # Chosen, not multiplied: what is dropped may be NaN.
    b_y = tl.where(b_word < drop_below.to(tl.uint32), 0.0, b_x * keep_scale)
    tl.store(p_y + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)


def drop(x: Tensor, y: Tensor, p: float, seed: Tensor) -> None:
    """Both contiguous; y may be x."""
    n = x.numel()
    launch(
        dropout_kernel, triton.cdiv(n, _BLOCK), x, y, seed, n, int(p * 2**32), 1 / (1 - p), BLOCK=_BLOCK
    )  # fmt: skip


@triton_kernel("dropout", unsupported_in_float32)
def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    drop(x, y, p, seed)
    return y
