"""Attention to a cache in C++: csrc/cpu/attention.cpp, csrc/cuda/attention_decode.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._attention import empty_in_order_of
from fastlm._library import kernel
from fastlm.kernels._common import with_rows
from fastlm.kernels.native._common import current_stream
from fastlm.kernels.native.attention import band_of, diagonals_of, per_head, unsupported, unsupported_cuda, writing

if _native.cpu is not None:

    @kernel("attention_decode", backend="native", device="cpu", supports=unsupported)
    def attention_decode(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None,
        alibi_slopes: Tensor | None, sinks: Tensor | None, window_left: int, window_right: int, scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        o = empty_in_order_of(q, v_cache.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        table = None if page_table is None else page_table.contiguous()
        capacity = k_cache.shape[2] * (1 if table is None else table.shape[1])
        heads = per_head(alibi_slopes, q), per_head(sinks, q)
        diagonals = band_of(0, window_left, window_right, q.shape[2], capacity)
        last = (cache_seqlens.contiguous(), table, *heads, *diagonals, scale, softcap, torch.get_num_threads())
        q, k, v = with_rows(q), with_rows(k_cache), with_rows(v_cache)
        writing(lambda o: _native.cpu.attention_decode(q, k, v, o, lse, *last), o)
        return o, lse


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("attention_decode", backend="native", device="cuda", supports=unsupported_cuda)
    def attention_decode_cuda(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None,
        alibi_slopes: Tensor | None, sinks: Tensor | None, window_left: int, window_right: int, scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        o = empty_in_order_of(q, v_cache.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        table = None if page_table is None else page_table.contiguous()
        heads = (per_head(x, q, torch.float32) for x in (alibi_slopes, sinks))
        diagonals = diagonals_of(0, window_left, window_right)
        last = (cache_seqlens.contiguous(), table, *heads, diagonals, scale, softcap, current_stream(q))
        q, k, v = with_rows(q), with_rows(k_cache), with_rows(v_cache)

        def run(o: Tensor) -> None:
            partial = lse.new_empty(_cuda.attention_decode(q, k, v, o, lse, None, *last))
            _cuda.attention_decode(q, k, v, o, lse, partial, *last)

        writing(run, o)
        return o, lse
