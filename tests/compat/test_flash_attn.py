"""The functions of flash-attn against the plain formula in float64."""

import math

import pytest
import torch

from fastlm.compat import flash_attn as fa


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """q (T, H, D), k, v (S, Hk, D): o (T, H, D) and lse (H, T)."""
    T, S, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    s = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    offset = torch.arange(S) - torch.arange(T)[:, None] - (S - T)
    if slopes is not None:
        s = s - slopes[:, None, None] * offset.abs()
    left, right = window
    right = 0 if causal else right
    seen = torch.ones_like(offset, dtype=torch.bool)
    seen = seen & (offset >= -left) if left >= 0 else seen
    seen = seen & (offset <= right) if right >= 0 else seen
    s = s.masked_fill(~seen, -math.inf)
    return torch.einsum("hts,shd->thd", s.softmax(-1).nan_to_num(0), v), s.logsumexp(-1)


CASES = [
    {}, {"causal": True}, {"window_size": (2, 1)}, {"causal": True, "window_size": (3, 3)}, {"softcap": 0.7},
    {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "causal": True},
]  # fmt: skip


def meaning(options):
    return {
        "causal": options.get("causal", False), "window": options.get("window_size", (-1, -1)),
        "softcap": options.get("softcap", 0.0), "slopes": options.get("alibi_slopes"),
    }  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=str)
def test_dense(options):
    q, k, v = numbers(2, 5, 4, 8), numbers(2, 9, 2, 8, seed=1), numbers(2, 9, 2, 8, seed=2)
    o, lse, none = fa.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    want = [plain(*row, **meaning(options)) for row in zip(q, k, v, strict=True)]
    torch.testing.assert_close(o, torch.stack([w[0] for w in want]))
    torch.testing.assert_close(lse, torch.stack([w[1] for w in want]))
    assert none.numel() == 0
    torch.testing.assert_close(fa.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options), o)
    qkv = numbers(2, 6, 3, 4, 8, seed=3)
    torch.testing.assert_close(
        fa.flash_attn_qkvpacked_func(qkv, **options), fa.flash_attn_func(*qkv.unbind(2), **options)
    )


@pytest.mark.parametrize("options", CASES, ids=str)
def test_packed(options):
    q_ends, k_ends = [0, 3, 3, 10], [0, 4, 5, 13]
    q, k, v = numbers(10, 4, 8), numbers(13, 2, 8, seed=1), numbers(13, 2, 8, seed=2)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in (q_ends, k_ends))
    o, lse, _ = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 8, **options, return_attn_probs=True)
    pieces = [
        plain(q[a:b], k[c:d], v[c:d], **meaning(options))
        for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)
    ]
    torch.testing.assert_close(o, torch.cat([p[0] for p in pieces]))
    torch.testing.assert_close(lse, torch.cat([p[1] for p in pieces], dim=1))
    torch.testing.assert_close(
        fa.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), cu_q, cu_k, 7, 8, **options), o
    )
    qkv = numbers(13, 3, 4, 8, seed=3)
    torch.testing.assert_close(
        fa.flash_attn_varlen_qkvpacked_func(qkv, cu_k, 8, **options),
        fa.flash_attn_varlen_func(*qkv.unbind(1), cu_k, cu_k, 8, 8, **options),
    )


def turned(x, positions, cos, sin, interleaved):
    """x (T, H, D), its first R elements turned."""
    c, s = cos[positions][:, None], sin[positions][:, None]
    R = 2 * c.shape[-1]
    a, b = (x[..., :R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
    pair = a * c - b * s, a * s + b * c
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), x[..., R:]], -1)


@pytest.mark.parametrize("layout", ["rows", "batch index", "blocks"])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("rotary", [None, True, False])
def test_cache(layout, options, rotary):
    """New keys go behind the others, turned; nothing else in the cache changes."""
    B, T, S, lens = 2, 3, 12, [5, 0]
    q, k, v = numbers(B, T, 4, 8), numbers(B, T, 2, 8, seed=1), numbers(B, T, 2, 8, seed=2)
    cos, sin = (f(numbers(16, 2, seed=5)) for f in (torch.cos, torch.sin))
    if layout == "blocks":
        table = torch.tensor([[4, 1, 0], [2, 5, 3]], dtype=torch.int32)
        caches, where = [numbers(6, 4, 2, 8, seed=i) for i in (3, 4)], {"block_table": table}
        rows = lambda c: c[table.long()].flatten(1, 2)  # noqa: E731
    else:
        index = torch.tensor([0, 1]) if layout == "rows" else torch.tensor([2, 0])
        caches = [numbers(2 if layout == "rows" else 3, S, 2, 8, seed=i) for i in (3, 4)]
        where = {} if layout == "rows" else {"cache_batch_idx": index.int()}
        rows = lambda c: c[index]  # noqa: E731
    before = [rows(c).clone() for c in caches]
    turn = {} if rotary is None else {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary}
    o, lse = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=torch.tensor(lens, dtype=torch.int32), **turn, **where, **options,
        return_softmax_lse=True,
    )  # fmt: skip
    ordered = options.get("causal") or "window_size" in options
    for b, n in enumerate(lens):
        at = n + torch.arange(T)
        q_b, k_b = q[b], k[b]
        if rotary is not None:
            q_b = turned(q_b, at if ordered else torch.full((T,), n), cos, sin, rotary)
            k_b = turned(k_b, at, cos, sin, rotary)
        for cache, old, new in zip(caches, before, (k_b, v[b]), strict=True):
            want = old[b].clone()
            want[n : n + T] = new
            torch.testing.assert_close(rows(cache)[b], want)
        keys, values = (rows(c)[b, : n + T] for c in caches)
        want, want_lse = plain(q_b, keys, values, **meaning(options))
        torch.testing.assert_close(o[b], want)
        torch.testing.assert_close(lse[b], want_lse)


def test_cache_as_it_is():
    q, k, v = numbers(2, 1, 4, 8), numbers(2, 9, 2, 8, seed=1), numbers(2, 9, 2, 8, seed=2)
    for given, n in ((None, 9), (4, 4)):
        o = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=given)
        torch.testing.assert_close(o[1], plain(q[1], k[1, :n], v[1, :n])[0])


def test_gradients():
    qkv = numbers(1, 4, 3, 2, 4).requires_grad_()
    slopes = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s: fa.flash_attn_qkvpacked_func(x, causal=True, alibi_slopes=s, softcap=1.0), (qkv, slopes)
    )


def test_what_is_refused():
    q, cu = numbers(1, 4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    for call, error, words in [
        (lambda: fa.flash_attn_func(q[0], q, q), ValueError, r"flash_attn_func: q must be \(B, T, H, D\)"),
        (lambda: fa.flash_attn_func(q, q, q, dropout_p=0.1, return_attn_probs=True), NotImplementedError, "never kept"),
        (lambda: fa.flash_attn_func(q, q, q, window_size="wide"), ValueError, "func: window_size must be an int"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, window_size=-2), ValueError, "window_size must be an int or"),
        (lambda: fa.flash_attn_qkvpacked_func(q), ValueError, r"qkv must be \(B, T, 3, H, D\), got \(1, 4, 2, 8\)"),
        (lambda: fa.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, alibi_slopes=torch.ones(1, 2)),
         NotImplementedError, "alibi_slopes of each sequence"),
        (lambda: fa.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, block_table=cu[None]),
         NotImplementedError, "block_table"),
        (lambda: fa.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 3, 4), ValueError, "max_seqlen_q"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, q, q), ValueError, "cache_seqlens must be given with k"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, q, q, cache_seqlens=1), ValueError, "from 0 to 0, for 4"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, cache_seqlens=2.7), ValueError, "an int or a tensor, got 2.7"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, cache_leftpad=cu), NotImplementedError, "cache_leftpad"),
        (lambda: fa.flash_attn_with_kvcache(q, q, q, rotary_cos=q[0, 0], rotary_sin=q[0, 0]), ValueError, "new keys"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            call()
