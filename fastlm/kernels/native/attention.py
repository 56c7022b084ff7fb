"""Attention in C++: csrc/cpu/attention.cpp, csrc/cuda/attention.cu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import FLOATS, empty_in_order_of, with_rows
from fastlm.kernels.native._common import capability, current_stream

MAX_HEAD_DIM = 256


def _unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
) -> str | None:
    for name, option in (("mask", mask), ("bias", bias), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if option is not None:
            return f"does not take {name}"
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        return "does not take packed sequences (cu_seqlens)"
    if window_left >= 0 or window_right >= 0:
        return "does not take a window"
    if softcap > 0:
        return "does not take a softcap"
    if dropout_p > 0:
        return "does not take dropout"
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v of one floating-point dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    if not (1 <= q.shape[-1] <= MAX_HEAD_DIM and 1 <= v.shape[-1] <= MAX_HEAD_DIM):
        return f"takes head dimensions from 1 to {MAX_HEAD_DIM}, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def _backward_unsupported(do, dlse, q, k, v, o, lse, *rest) -> str | None:
    *options, _wanted = rest
    return _unsupported(q, k, v, *options)


def _diagonal(causal: int, q_len: int, k_len: int) -> int:
    """Query i sees key j iff j <= i + diagonal."""
    return (k_len, k_len - q_len, 0)[causal]


def _writing(run: Callable[..., Any], *outputs: Tensor) -> None:
    """run(*outputs), through a copy of those that the kernels cannot write in place."""
    written = [x if with_rows(x) is x else torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs]
    run(*written)
    for x, y in zip(outputs, written, strict=True):
        if x is not y:
            x.copy_(y)


if _native.cpu is not None:
    _forward, _backward = _native.cpu.attention_forward, _native.cpu.attention_backward

    @kernel("attention", backend="native", device="cpu", supports=_unsupported)
    def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        *_, causal, _, _, scale, _softcap, _dropout_p, _deterministic = options
        o = empty_in_order_of(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        q, k, v = with_rows(q), with_rows(k), with_rows(v)
        diagonal = _diagonal(causal, q.shape[2], k.shape[2])
        _writing(lambda o: _forward(q, k, v, o, lse, diagonal, scale, torch.get_num_threads()), o)
        return o, lse

    @kernel("attention_backward", backend="native", device="cpu", supports=_backward_unsupported)
    def attention_backward(
        do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        *_, causal, _, _, scale, _softcap, _dropout_p, _deterministic, wanted = options
        outputs = [empty_in_order_of(x, x.shape[-1]) for x in (q, k, v)]
        do = torch.zeros_like(o) if do is None else do
        read = [with_rows(do), None if dlse is None else dlse.contiguous(), *map(with_rows, (q, k, v, o))]
        read.append(lse.contiguous())
        diagonal = _diagonal(causal, q.shape[2], k.shape[2])
        _writing(lambda *written: _backward(*read, *written, diagonal, scale, torch.get_num_threads()), *outputs)
        # The three come from one pass; the other gradients belong to options that this kernel does not take.
        gradients = [x if want else q.new_empty(0) for x, want in zip(outputs, wanted, strict=False)]
        return (*gradients, *(q.new_empty(0) for _ in range(3)))


# --- CUDA -------------------------------------------------------------------------------------------------------------
def _unsupported_cuda(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str | None:
    if q.dtype == torch.float64:
        return "does not take float64"
    *tensors, causal, _, _, scale, softcap, dropout_p, deterministic = options
    return _unsupported(q, k, v, *tensors, causal, -1, -1, scale, softcap, dropout_p, deterministic)  # it takes windows


def _backward_unsupported_cuda(do, dlse, q, k, v, o, lse, *rest) -> str | None:
    *options, _wanted = rest
    if max(q.shape[-1], v.shape[-1]) > 128 and capability(q) < (8, 0):
        return "takes head dimensions above 128 from compute capability 8.0 on"  # for want of shared memory
    return _unsupported_cuda(q, k, v, *options)


def _diagonals(causal: int, window_left: int, window_right: int, q_len: int, k_len: int) -> tuple[int, int]:
    """Query i sees key j iff i + lower <= j <= i + upper."""
    last = k_len - q_len  # windows count from key i + last, which ends together with the queries
    lower = last - window_left if window_left >= 0 else -q_len
    upper = last + window_right if window_right >= 0 else k_len
    if causal:
        upper = min(upper, last if causal == 1 else 0)
    return lower, upper


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("attention", backend="native", device="cuda", supports=_unsupported_cuda)
    def attention_cuda(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        *_, causal, window_left, window_right, scale, _softcap, _dropout_p, _deterministic = options
        o = empty_in_order_of(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        q, k, v = with_rows(q), with_rows(k), with_rows(v)
        diagonals = _diagonals(causal, window_left, window_right, q.shape[2], k.shape[2])
        _writing(lambda o: _cuda.attention_forward(q, k, v, o, lse, *diagonals, scale, current_stream(q)), o)
        return o, lse

    @kernel("attention_backward", backend="native", device="cuda", supports=_backward_unsupported_cuda)
    def attention_backward_cuda(
        do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        *_, causal, window_left, window_right, scale, _softcap, _dropout_p, _deterministic, wanted = options
        dq = torch.empty_like(q) if wanted[0] else None
        # These two come from one pass.
        dk, dv = (torch.empty_like(k), torch.empty_like(v)) if wanted[1] or wanted[2] else (None, None)
        do = torch.zeros_like(o) if do is None else do
        read = [with_rows(do), None if dlse is None else dlse.contiguous(), *map(with_rows, (q, k, v, o))]
        read.append(lse.contiguous())
        stats = lse.new_empty(*lse.shape, 2)
        diagonals = _diagonals(causal, window_left, window_right, q.shape[2], k.shape[2])

        def run(*outputs: Tensor) -> None:
            given = iter(outputs)
            written = [None if x is None else next(given) for x in (dq, dk, dv)]
            _cuda.attention_backward(*read, *written, stats, *diagonals, scale, current_stream(q))

        _writing(run, *(x for x in (dq, dk, dv) if x is not None))
        gradients = [
            x if want and x is not None else q.new_empty(0) for x, want in zip((dq, dk, dv), wanted, strict=False)
        ]
        return (*gradients, *(q.new_empty(0) for _ in range(3)))
