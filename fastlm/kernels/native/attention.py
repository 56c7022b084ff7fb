"""Attention in C++: csrc/cpu/attention.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels.native._common import FLOATS

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


def _readable(x: Tensor) -> Tensor:
    """x with the elements of a row next to each other, as the kernels read them: itself or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _writing(run: Callable[..., Any], *outputs: Tensor) -> None:
    """run(*outputs), through a copy of those that the kernels cannot write in place."""
    written = [x if _readable(x) is x else torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs]
    run(*written)
    for x, y in zip(outputs, written, strict=True):
        if x is not y:
            x.copy_(y)


def _output_like(q: Tensor, v_dim: int) -> Tensor:
    """An empty (B, H, Tq, Dv) whose dimensions lie in memory in the order of q's."""
    if v_dim == q.shape[-1]:
        return torch.empty_like(q)
    order = sorted(range(4), key=q.stride, reverse=True)
    return torch.empty_permuted((*q.shape[:3], v_dim), order, dtype=q.dtype, device=q.device)


if _native.cpu is not None:
    _forward, _backward = _native.cpu.attention_forward, _native.cpu.attention_backward

    @kernel("attention", backend="native", device="cpu", supports=_unsupported)
    def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        causal, scale = options[9], options[12]
        o = _output_like(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        q, k, v = _readable(q), _readable(k), _readable(v)
        diagonal = _diagonal(causal, q.shape[2], k.shape[2])
        _writing(lambda o: _forward(q, k, v, o, lse, diagonal, scale, torch.get_num_threads()), o)
        return o, lse

    @kernel("attention_backward", backend="native", device="cpu", supports=_backward_unsupported)
    def attention_backward(
        do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        causal, scale, wanted = options[9], options[12], options[16]
        outputs = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        do = torch.zeros_like(o) if do is None else do
        read = [_readable(do), None if dlse is None else dlse.contiguous(), *map(_readable, (q, k, v, o))]
        read.append(lse.contiguous())
        diagonal = _diagonal(causal, q.shape[2], k.shape[2])
        _writing(lambda *written: _backward(*read, *written, diagonal, scale, torch.get_num_threads()), *outputs)
        nothing = q.new_empty(0)
        # The three come from one pass; the other gradients belong to options that this kernel does not take.
        gradients = [x if want else nothing for x, want in zip(outputs, wanted, strict=False)]
        return (*gradients, nothing, nothing, nothing)
