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


def _unsupported_on_any(
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
    for name, option in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if option is not None:
            return f"does not take {name}"
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        return "does not take packed sequences (cu_seqlens)"
    if softcap > 0:
        return "does not take a softcap"
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v of one floating-point dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    if not (1 <= q.shape[-1] <= MAX_HEAD_DIM and 1 <= v.shape[-1] <= MAX_HEAD_DIM):
        return f"takes head dimensions from 1 to {MAX_HEAD_DIM}, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def _backward_unsupported(do, dlse, q, k, v, o, lse, *rest) -> str | None:
    *options, _wanted = rest
    return _unsupported_on_any(q, k, v, *options)


def _diagonals(causal: int, window_left: int, window_right: int, q_len: int, k_len: int) -> tuple[int, int]:
    """Query i sees key j iff i + lower <= j <= i + upper."""
    last = k_len - q_len  # windows count from key i + last, which ends together with the queries
    lower = last - window_left if window_left >= 0 else -q_len
    upper = last + window_right if window_right >= 0 else k_len
    if causal:
        upper = min(upper, last if causal == 1 else 0)
    return lower, upper


def _writing(run: Callable[..., Any], *outputs: Tensor) -> None:
    """run(*outputs), through a copy of those that the kernels cannot write in place."""
    written = [x if with_rows(x) is x else torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs]
    run(*written)
    for x, y in zip(outputs, written, strict=True):
        if x is not y:
            x.copy_(y)


if _native.cpu is not None:
    _forward, _backward = _native.cpu.attention_forward, _native.cpu.attention_backward

    def _on_scores(x: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """A mask or bias as it lies over the scores, (B, Hq, Tq, Tk)."""
        return None if x is None else x.expand(*q.shape[:3], k.shape[2])

    def _options(q: Tensor, k: Tensor, options: tuple) -> tuple:
        """What the kernels take of them."""
        mask, bias, _, _, seed, _, _, _, _, causal, window_left, window_right, scale, _, dropout_p, _ = options
        if bias is not None:
            bias = bias.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
            if bias.dim() == 0 or bias.shape[-1] != k.shape[2]:  # the same for all keys
                bias = bias.expand(*bias.shape[:-1], k.shape[2])
            bias = with_rows(bias)
        diagonals = _diagonals(causal, window_left, window_right, q.shape[2], k.shape[2])
        number = seed.item() if dropout_p > 0 else 0
        scores = (_on_scores(mask, q, k), _on_scores(bias, q, k))
        return (*scores, *diagonals, scale, dropout_p, number % 2**64, torch.get_num_threads())

    @kernel("attention", backend="native", device="cpu", supports=_unsupported_on_any)
    def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        o = empty_in_order_of(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        taken = _options(q, k, options)
        q, k, v = with_rows(q), with_rows(k), with_rows(v)
        _writing(lambda o: _forward(q, k, v, o, lse, *taken), o)
        return o, lse

    @kernel("attention_backward", backend="native", device="cpu", supports=_backward_unsupported)
    def attention_backward(
        do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        *options, wanted = options
        outputs = [empty_in_order_of(x, x.shape[-1]) for x in (q, k, v)]
        do = torch.zeros_like(o) if do is None else do
        read = [with_rows(do), None if dlse is None else dlse.contiguous(), *map(with_rows, (q, k, v, o))]
        read.append(lse.contiguous())
        bias = options[1]
        dbias = None
        if bias is not None and wanted[3]:  # summed over the batch where it is the same for all
            of_all = bias.dim() < 4 or bias.shape[0] == 1
            dbias = lse.new_zeros(1 if of_all else q.shape[0], *q.shape[1:3], k.shape[2])
        taken = _options(q, k, options)
        _writing(lambda *written: _backward(*read, *written, dbias, *taken), *outputs)
        # The three come from one pass.
        gradients = [x if want else q.new_empty(0) for x, want in zip(outputs, wanted, strict=False)]
        dbias = q.new_empty(0) if dbias is None else dbias.sum_to_size(bias.shape).to(bias.dtype)
        return (*gradients, dbias, q.new_empty(0), q.new_empty(0))


# --- CUDA -------------------------------------------------------------------------------------------------------------
def _unsupported_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, *rest) -> str | None:
    if q.dtype == torch.float64:
        return "does not take float64"
    for name, option in (("mask", mask), ("bias", bias)):
        if option is not None:
            return f"does not take {name}"
    *_, dropout_p, _deterministic = rest
    if dropout_p > 0:
        return "does not take dropout"
    return _unsupported_on_any(q, k, v, mask, bias, *rest)


def _backward_unsupported_cuda(do, dlse, q, k, v, o, lse, *rest) -> str | None:
    *options, _wanted = rest
    if max(q.shape[-1], v.shape[-1]) > 128 and capability(q) < (8, 0):
        return "takes head dimensions above 128 from compute capability 8.0 on"  # for want of shared memory
    return _unsupported_cuda(q, k, v, *options)


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
