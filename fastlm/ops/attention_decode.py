"""attention_decode: new queries of a batch of sequences against a cache of keys and values, contiguous or in pages.

q (B, Hq, Tq, D); k_cache (B, Hk, S, D) and v_cache (B, Hk, S, Dv), or in pages (pages, Hk, page size, D or Dv) that
page_table (B, n) lists for each sequence; cache_seqlens (B,), how many keys of each sequence are filled. The last query
of a sequence sits on its last key. Gives o (B, Hq, Tq, Dv) of q's dtype and lse (B, Hq, Tq). What lies behind the
filled keys is never read into a result. Saved for backward: the arguments; the reference is differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._attention import dims_of_heads, empty_in_order_of
from fastlm._checks import (
    ArgumentError,
    DTypeError,
    check_device,
    check_number,
    check_per_head,
    check_same_dtype,
    check_softcap,
    check_tensor,
    checked_window,
)
from fastlm._library import define_op, readable_values


def attention_decode_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, window_left: int, window_right: int, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if page_table is not None:
        # Beyond a sequence's keys the table may hold anything.
        used = torch.arange(page_table.shape[1], device=q.device) * k_cache.shape[2] < cache_seqlens[:, None]
        table = torch.where(used, page_table, 0)
        # (B, n, Hk, page size, D) to (B, Hk, n * page size, D)
        k_cache, v_cache = (c[table].transpose(1, 2).flatten(2, 3) for c in (k_cache, v_cache))
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    col = torch.arange(k_cache.shape[2], device=q.device)
    lens = cache_seqlens[:, None, None]
    offset = col - (row + lens - q.shape[2])  # (B, Tq, S)
    visible = col < lens
    if window_left >= 0:
        visible = visible & (offset >= -window_left)
    if window_right >= 0:
        visible = visible & (offset <= window_right)
    bias = None
    if alibi_slopes is not None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        bias = -slopes.to(wide)[:, :, None, None] * offset[:, None].abs()
    options = (None, sinks, None, None, None, 0, 0, 0, -1, -1, scale, softcap, 0.0, True)
    return torch.ops.fastlm_reference.attention(q, k_cache, v_cache, visible[:, None], bias, *options)


def _fake(q, k_cache, v_cache, *_):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_in_order_of(q, v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)


def _flops(q, k_cache, v_cache, cache_seqlens, page_table, *_):
    """Of caches that are full: how full they are is not known without waiting for a GPU."""
    S = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    return 2 * q.shape[:3].numel() * S * (q.shape[3] + v_cache.shape[3])


def _autocast(dtype, args):
    # As torch: float64 stays.
    return (*(t if t.dtype == torch.float64 else t.to(dtype) for t in args[:3]), *args[3:])


def _samples(device: str) -> list[tuple]:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (
            torch.linspace(-3, 3, n * h * t * 40, device=device).mul(f).sin().to(dtype).view(n, h, t, 40)
            for f, n, h, t in ((311, 2, 4, 3), (173, 6, 2, 16), (97, 6, 2, 16))
        )
        lens = torch.tensor([5, 37], device=device)
        table = torch.tensor([[3, 0, 0], [1, 5, 2]], device=device)
        for k_cache, v_cache, pages in ((k, v, table), (k[:2], v[:2], None)):
            filled = lens.clamp(max=48 if pages is not None else 16)
            made.append((q, k_cache, v_cache, filled, pages, None, None, -1, 0, 0.2, 0.0))
            heads = torch.tensor([0.1, 0.02, 0.3, 0.005], device=device)
            made.append((q, k_cache, v_cache, filled, pages, heads, heads.flip(0), 20, 0, 0.2, 3.0))
    return made


def _append(cache: Tensor, new: Tensor, cache_seqlens: Tensor, page_table: Tensor | None) -> None:
    """new (B, Hk, T, D) behind each sequence's keys."""
    at = cache_seqlens[:, None] + torch.arange(new.shape[2], device=new.device)  # (B, T)
    if page_table is None:
        row = torch.arange(len(at), device=new.device)[:, None]
    else:
        row, at = page_table.gather(1, at // cache.shape[2]), at % cache.shape[2]
    # The two indices side by side: with a dimension between them torch.func.vmap writes elsewhere, without a word.
    cache.transpose(1, 2)[row, at] = new.transpose(1, 2).to(cache.dtype)


def _check(q, k_cache, v_cache, cache_seqlens, k, v, page_table, alibi_slopes, sinks, scale, softcap) -> None:
    op = "fastlm.attention_decode"
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(op, name, t)
        if t.dim() != 4:
            raise ArgumentError(f"{op}: {name} must have 4 dimensions, got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise DTypeError(f"{op}: {name} must be floating point, got {t.dtype}")
        check_same_dtype(op, name, t, "q", q)
    check_tensor(op, "cache_seqlens", cache_seqlens)
    B, Hq, _, D = q.shape
    _, Hk, S, _ = k_cache.shape
    if page_table is None:
        if k_cache.shape[0] != B:
            raise ArgumentError(f"{op}: k_cache must be (B, Hk, S, D) with B = {B} of q, got {tuple(k_cache.shape)}")
    else:
        check_tensor(op, "page_table", page_table)
        if page_table.dtype not in (torch.int32, torch.int64) or page_table.dim() != 2 or page_table.shape[0] != B:
            raise ArgumentError(
                f"{op}: page_table must be (B, n) of int32 or int64 with B = {B}, got {page_table.dtype} "
                f"{tuple(page_table.shape)}"
            )
        S = S * page_table.shape[1]
    if D == 0 or k_cache.shape[3] != D:
        raise ArgumentError(f"{op}: k_cache must have the head dim of q, {D}, at least 1, got {tuple(k_cache.shape)}")
    if Hq % Hk if Hk else Hq:
        raise ArgumentError(f"{op}: the heads of q must be a multiple of those of k_cache, got {Hq} and {Hk}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ArgumentError(f"{op}: v_cache must have the sizes of k_cache but the last, got {tuple(v_cache.shape)}")
    if cache_seqlens.dtype not in (torch.int32, torch.int64) or cache_seqlens.shape != (B,):
        raise ArgumentError(
            f"{op}: cache_seqlens must be (B,) = ({B},) of int32 or int64, got {cache_seqlens.dtype} "
            f"{tuple(cache_seqlens.shape)}"
        )
    if (k is None) != (v is None):
        raise ArgumentError(f"{op}: k and v must be given together")
    new = 0
    if k is not None:
        for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
            check_tensor(op, name, t)
            if t.dim() != 4 or t.shape != (B, Hk, k.shape[2], cache.shape[3]):
                raise ArgumentError(
                    f"{op}: {name} must be (B, Hk, T, D) = ({B}, {Hk}, T, {cache.shape[3]}), got {tuple(t.shape)}"
                )
            check_same_dtype(op, name, t, "q", q)
        new = k.shape[2]
    check_per_head(op, q, alibi_slopes, sinks)
    check_softcap(op, softcap)
    if scale is not None:
        check_number(op, "scale", scale)
    given = (k_cache, v_cache, cache_seqlens, k, v, page_table, alibi_slopes, sinks)
    names = ("k_cache", "v_cache", "cache_seqlens", "k", "v", "page_table", "alibi_slopes", "sinks")
    for name, t in zip(names, given, strict=True):
        check_device(op, name, t, "q", q)
    lens = readable_values(cache_seqlens)
    if lens is None:
        return
    for i, n in enumerate(lens):
        if not 0 <= n <= S - new:
            raise ArgumentError(
                f"{op}: cache_seqlens[{i}] must be from 0 to {S - new}, for {new} more keys to fit, got {n}"
            )
    if page_table is None:
        return
    used = torch.arange(page_table.shape[1], device=q.device) * k_cache.shape[2] < (cache_seqlens + new)[:, None]
    bad = used & ((page_table < 0) | (page_table >= k_cache.shape[0]))
    if readable_values(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        raise ArgumentError(
            f"{op}: page_table[{i}] must hold pages, 0 to {k_cache.shape[0] - 1}, got {page_table[i, j].item()}"
        )


def _arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool | str = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple:
    """The schema's arguments from the public ones, checked, as they are when k and v have been written."""
    op = "fastlm.attention_decode"
    _check(q, k_cache, v_cache, cache_seqlens, k, v, page_table, alibi_slopes, sinks, scale, softcap)
    left, right = checked_window(op, window)
    if not isinstance(causal, bool) and causal != "bottom_right":
        raise ArgumentError(f"{op}: causal must be True, 'bottom_right' or False, got {causal!r}")
    return (
        q, k_cache, v_cache, cache_seqlens.long() + (0 if k is None else k.shape[2]),
        None if page_table is None else page_table.long(), alibi_slopes, sinks, left, 0 if causal else right,
        q.shape[-1] ** -0.5 if scale is None else float(scale), softcap or 0.0,
    )  # fmt: skip


def _sharding(q, k_cache, v_cache, cache_seqlens, page_table, alibi_slopes, sinks, *options):
    cache = dims_of_heads(q, k_cache)
    if page_table is not None:
        cache = cache.replace("b", "P")
    slopes = "bh"[2 - alibi_slopes.ndim :] if alibi_slopes is not None else ""
    return f"bhQD, {cache}D, {cache}E, b, bN, {slopes}, h -> bhQE, bhQ"


_attention_decode = define_op(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? page_table, "
    "Tensor? alibi_slopes, Tensor? sinks, int window_left, int window_right, float scale, float softcap) "
    "-> (Tensor o, Tensor lse)",
    reference=attention_decode_reference,
    fake=_fake,
    samples=_samples,
    autocast=_autocast,
    arguments=_arguments,
    flops=_flops,
    sharding=_sharding,
)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool | str = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest queries of each sequence to all of its keys, which lie in a cache: one step of
    generation, or a part of a prompt. Writes k and v into the cache first, if given.

    Args:
        q: (B, Hq, Tq, D), floating point. The last query of a sequence sits on its last key.
        k_cache: (B, Hk, S, D), of q's dtype, Hq a multiple of Hk; with page_table (pages, Hk, page size, D). A
            transposed view of (B, S, Hk, D) costs no copy.
        v_cache: the same with Dv.
        cache_seqlens: (B,) int32 or int64, how many keys the cache holds of each sequence, without k. Not changed.
        k, v: (B, Hk, T, D) and (B, Hk, T, Dv), the next T keys and values: written to the cache behind the others.
        page_table: (B, n) int32 or int64: page_table[b, i] holds keys i * page size and on of sequence b. Pages may be
            shared between sequences, but for those that are written.
        causal: True or "bottom_right": key j is visible to query i of a sequence of N keys iff j <= i + N - Tq; False:
            all N keys are.
        scale, window, alibi_slopes, sinks, softcap, return_lse: as in `fastlm.attention`.

    Returns:
        o (B, Hq, Tq, Dv) of q's dtype; with return_lse also lse (B, Hq, Tq), float32 (float64 for float64).

    Gradients go to the arguments of one call, not through a chain of calls that write to one cache.
    On a GPU the numbers in cache_seqlens and page_table are not checked, since that would wait for it.

    Raises:
        ValueError: sizes, devices or options that do not fit, a cache without room. TypeError: dtypes that do not fit.
    """
    args = _arguments(
        q, k_cache, v_cache, cache_seqlens, k, v, page_table, causal, scale, window, alibi_slopes, sinks, softcap
    )
    if k is not None:
        _attention_decode.refuse_early(*args)
        lens, table = args[3] - k.shape[2], args[4]
        _append(k_cache, k, lens, table)
        _append(v_cache, v, lens, table)
    o, lse = _attention_decode(*args)
    return (o, lse) if return_lse else o
