"""The functions of flash-attn 2.8 (Dao-AILab) with its names, arguments and layouts, over `fastlm.attention`.

``from fastlm.compat.flash_attn import flash_attn_func`` in place of ``from flash_attn import flash_attn_func``: on the
CPU as on a GPU, in float32 and float64 too, with any head dim, with gradients of every order.

Tensors are (B, T, H, D), packed ones (total, H, D). causal is aligned at the bottom right; a query that sees no key
gets zeros, and an lse of -inf, where some of flash-attn's kernels have +inf. What stands here only by name is as in
`fastlm.attention`: dropout_p, softmax_scale (there scale), window_size (window), softcap (0: none), alibi_slopes,
deterministic, and what is raised. What cannot be honoured is refused with NotImplementedError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._checks import ArgumentError, check_tensor, checked_window
from fastlm.ops.attention import attention
from fastlm.ops.attention_decode import attention_decode
from fastlm.ops.rope import rope

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool,
    window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    return_attn_probs: bool, **packed,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v: (B, T, H, D)."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, t)
        if t.dim() != 4:
            raise ArgumentError(f"{op}: {name} must be {'(total, H, D)' if packed else '(B, T, H, D)'}")
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            f"{op}: return_attn_probs gives the mask of dropout, which is never kept; with dropout_p = 0 it gives lse"
        )
    window = checked_window(op, window_size, "window_size")
    o, lse = attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=bool(causal), scale=softmax_scale,
        window=window, alibi_slopes=alibi_slopes, softcap=softcap or None, dropout_p=dropout_p,
        deterministic=deterministic, return_lse=True, **packed,
    )  # fmt: skip
    o = o.transpose(1, 2)
    return (o, lse, q.new_empty(0)) if return_attn_probs else o


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of q (B, Tq, Hq, D) to k (B, Tk, Hk, D) and v (B, Tk, Hk, Dv), Hq a multiple of Hk.

    Returns:
        (B, Tq, Hq, Dv) of q's dtype; with return_attn_probs also lse (B, Hq, Tq) and an empty tensor, where flash-attn
        has the mask of dropout.
    """
    return _attend(
        "flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def _unpacked(op: str, name: str, x: Tensor, parts: int, dim: int) -> tuple[Tensor, ...]:
    check_tensor(op, name, x)
    if x.dim() != dim + 3 or x.shape[dim] != parts:
        lead = "(total, " if dim == 1 else "(B, T, "
        raise ArgumentError(f"{op}: {name} must be {lead}{parts}, H, D), got {tuple(x.shape)}")
    return x.unbind(dim)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of qkv (B, T, 3, H, D), without a copy."""
    op = "flash_attn_qkvpacked_func"
    return _attend(
        op, *_unpacked(op, "qkv", qkv, 3, 2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of q (B, Tq, Hq, D) and kv (B, Tk, 2, Hk, D), without a copy."""
    op = "flash_attn_kvpacked_func"
    return _attend(
        op, q, *_unpacked(op, "kv", kv, 2, 2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def _attend_packed(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float | None, causal: bool, window_size: tuple[int, int],
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v: (total, H, D). As one batch."""
    if alibi_slopes is not None and alibi_slopes.dim() != 1:
        raise NotImplementedError(f"{op}: alibi_slopes of each sequence are not supported; (H,) for all are")
    rows = (t[None] if isinstance(t, Tensor) else t for t in (q, k, v))
    found = _attend(
        op, *rows, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    return (found[0][0], found[1][0], found[2]) if return_attn_probs else found[0]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of sequences that lie one behind the other.

    Args:
        q, k, v: (total_q, Hq, D), (total_k, Hk, D), (total_k, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32, where each sequence begins, and the total.
        max_seqlen_q, max_seqlen_k: the longest sequence.
        block_table: refused; `flash_attn_with_kvcache` takes pages.

    Returns:
        (total_q, Hq, Dv); with return_attn_probs also lse (Hq, total_q) and an empty tensor.
    """
    if block_table is not None:
        raise NotImplementedError("flash_attn_varlen_func: block_table is not supported; see flash_attn_with_kvcache")
    return _attend_packed(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D), without a copy."""
    op = "flash_attn_varlen_qkvpacked_func"
    return _attend_packed(
        op, *_unpacked(op, "qkv", qkv, 3, 1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of q (total_q, Hq, D) and kv (total_k, 2, Hk, D), without a copy."""
    op = "flash_attn_varlen_kvpacked_func"
    return _attend_packed(
        op, q, *_unpacked(op, "kv", kv, 2, 1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastlm.attention_decode` under the name and in the layout of flash-attn.

    Args:
        q: (B, Tq, Hq, D), the newest queries.
        k_cache, v_cache: (caches, S, Hk, D); with block_table (blocks, block size, Hk, D).
        k, v: (B, T, Hk, D), written to the cache, in place, behind the first cache_seqlens keys.
        rotary_cos, rotary_sin: (positions, R/2): k is turned by its positions before it is written, and q by
            cache_seqlens and on where causal or window_size orders its rows, else all by cache_seqlens. They need k.
        cache_seqlens: (B,) int32, or one number for all, how many keys the cache holds; all of S where not given.
        cache_batch_idx: (B,), which cache each row has; 0 to B - 1 where not given.
        cache_leftpad: refused.
        block_table: (B, n) int32, the blocks of each row.
        rotary_interleaved: pairs are neighbours; else half a head apart.
        num_splits: a hint on how a GPU shares out the work; nothing here follows it.

    Returns:
        (B, Tq, Hq, Dv); with return_softmax_lse also lse (B, Hq, Tq).
    """
    op = "flash_attn_with_kvcache"
    for name, t in (
        ("q", q),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        *((("k", k), ("v", v)) if k is not None else ()),
    ):
        check_tensor(op, name, t)
        if t.dim() != 4:
            raise ArgumentError(f"{op}: {name} must have 4 dimensions, got {tuple(t.shape)}")
    window = checked_window(op, window_size, "window_size")
    if cache_leftpad is not None:
        raise NotImplementedError(f"{op}: cache_leftpad is not supported")
    if cache_batch_idx is not None and block_table is not None:
        raise ArgumentError(f"{op}: cache_batch_idx and block_table exclude each other")
    B, T = q.shape[:2]
    if cache_seqlens is None:
        if k is not None:
            raise ArgumentError(f"{op}: cache_seqlens must be given with k, for it says where k goes")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if not isinstance(cache_seqlens, Tensor):
        if type(cache_seqlens) is not int:
            raise ArgumentError(f"{op}: cache_seqlens must be an int or a tensor, got {cache_seqlens!r}")
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int32, device=q.device)
    table = block_table
    if cache_batch_idx is not None:  # each cache is a page
        table = cache_batch_idx[:, None]
    if (rotary_cos is None) != (rotary_sin is None):
        raise ArgumentError(f"{op}: rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None:
        if k is None:
            raise ArgumentError(f"{op}: rotary_cos turns new keys, so k and v must be given with it")
        first = cache_seqlens.long()[:, None]
        ordered = causal or window != (-1, -1)
        at_q = first + torch.arange(T, device=q.device) if ordered else first.expand(B, T)
        at_k = first + torch.arange(k.shape[1], device=q.device)
        q = rope(q, rotary_cos, rotary_sin, interleaved=rotary_interleaved, positions=at_q)
        k = rope(k, rotary_cos, rotary_sin, interleaved=rotary_interleaved, positions=at_k)

    def heads_first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.transpose(1, 2)

    o, lse = attention_decode(
        *map(heads_first, (q, k_cache, v_cache)), cache_seqlens=cache_seqlens, k=heads_first(k), v=heads_first(v),
        page_table=table, causal=bool(causal), scale=softmax_scale, window=window,
        alibi_slopes=alibi_slopes, softcap=softcap or None, return_lse=True,
    )  # fmt: skip
    return (heads_first(o), lse) if return_softmax_lse else heads_first(o)
