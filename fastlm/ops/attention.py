"""attention(q, k, v) = softmax(scale q k' + bias, over the visible keys) v, and its log-sum-exp.

q (B, Hq, Tq, D), k (B, Hk, Tk, D), v (B, Hk, Tk, Dv), Hq a multiple of Hk: query head h reads key head h // (Hq // Hk).
Gives o (B, Hq, Tq, Dv) in q's order of strides, and lse (B, Hq, Tq), natural log, float32 (float64 for float64).
Saved for backward: the inputs by reference, o and lse; never the scores. 16-bit inputs are computed with in float32.

A key that a query does not see contributes nothing, whatever it holds: no NaN gets through, forward or backward. (Only
where torch differentiates the reference, under torch.func and in second derivatives, an incoming NaN gradient spreads.)
A query that sees no key gets o = 0, lse = -inf (its sink, where there are sinks) and zero gradients.
Under autocast q, k and v go to the lower precision, as in torch.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm._attention import dims_of_broadcast, dims_of_heads, empty_in_order_of, in_order_of, sinks_gradient
from fastlm._checks import (
    ArgumentError,
    DTypeError,
    autocast_on,
    check_device,
    check_dropout,
    check_number,
    check_per_head,
    check_same_dtype,
    check_softcap,
    check_tensor,
    checked_window,
)
from fastlm._dropout import check_seed, draw_seed, keep_mask
from fastlm._library import define_op, readable_values

CAUSAL_NONE, CAUSAL_BOTTOM_RIGHT, CAUSAL_TOP_LEFT = 0, 1, 2
_CAUSAL = {
    False: CAUSAL_NONE,
    True: CAUSAL_BOTTOM_RIGHT,
    "bottom_right": CAUSAL_BOTTOM_RIGHT,
    "top_left": CAUSAL_TOP_LEFT,
}

_OPTIONS = (
    "Tensor? mask=None, Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? seed=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, int max_seqlen_q=0, int max_seqlen_k=0, int causal=0, "
    "int window_left=-1, int window_right=-1, float scale=1.0, float softcap=0.0, float dropout_p=0.0, "
    "bool deterministic=True"
)


# --- the reference ----------------------------------------------------------------------------------------------------
def _positions(total: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor | int]:
    """Per row: its position within its sequence, the sequence's number, -1 outside of all, and length.

    Unchecked numbers, on a GPU, lead to no index out of bounds: there that would end the process.
    """
    at = torch.arange(total, device=device)
    if cu_seqlens is None:
        return at, torch.zeros_like(at), total
    cu_seqlens = cu_seqlens.to(torch.int64)
    number = torch.searchsorted(cu_seqlens, at, right=True) - 1
    inside = number.clamp(0, cu_seqlens.numel() - 2)
    return at - cu_seqlens[inside], torch.where(number == inside, number, -1), cu_seqlens.diff()[inside]


def _geometry(q, k, mask, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right):
    """Which keys are visible, bool broadcastable to (B, Hq, Tq, Tk) or None for all; and j - i, with ends aligned."""
    row, row_sequence, row_length = _positions(q.shape[2], cu_seqlens_q, q.device)
    col, col_sequence, col_length = _positions(k.shape[2], cu_seqlens_k, q.device)
    col_in_row = col_length  # the key length that a query's sequence has
    if cu_seqlens_k is not None:
        col_in_row = cu_seqlens_k.to(torch.int64).diff()[row_sequence.clamp(0, cu_seqlens_k.numel() - 2)]
    shift = col_in_row - row_length  # bottom-right: the last query sits on the last key
    offset = col[None, :] - (row + shift)[:, None]  # (Tq, Tk)
    limits = []
    if causal == CAUSAL_BOTTOM_RIGHT:
        limits.append(offset <= 0)
    elif causal == CAUSAL_TOP_LEFT:
        limits.append(col[None, :] <= row[:, None])
    if window_left >= 0:
        limits.append(offset >= -window_left)
    if window_right >= 0:
        limits.append(offset <= window_right)
    if cu_seqlens_q is not None:
        limits.append((row_sequence[:, None] == col_sequence[None, :]) & (row_sequence >= 0)[:, None])
    if mask is not None:
        limits.append(mask)
    visible = None
    for limit in limits:
        visible = limit if visible is None else visible & limit
    return visible, offset


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


def _known_finite(*tensors: Tensor) -> bool:
    """False also where looking would wait for a GPU or stand in the way of a trace."""
    return all(readable_values(t.detach().isfinite().all()) is True for t in tensors)


def _product(a: Tensor, b: Tensor, visible: Tensor | None) -> Tensor:
    """a (..., M, K) @ b (..., K, N), in which only the pairs (M, K) that are visible take part, whatever b holds.

    The product runs over finite stand-ins, so that its gradient meets no NaN; what the others would have added follows.
    """
    if _known_finite(b):
        return a @ b
    weights, values = a.detach(), b.detach()
    seen = torch.ones_like(weights, dtype=torch.bool) if visible is None else visible.expand(weights.shape)

    def meet(left: Tensor, right: Tensor) -> Tensor:
        return (left & seen).to(a.dtype) @ right.to(a.dtype) > 0

    up, down, positive, negative = values.isposinf(), values.isneginf(), weights > 0, weights < 0
    to_inf = meet(positive, up) | meet(negative, down)
    to_minus_inf = meet(positive, down) | meet(negative, up)
    to_nan = meet(seen, values.isnan()) | meet(weights == 0, up | down)
    product = a @ _finite(b)
    for where, value in ((to_inf, math.inf), (to_minus_inf, -math.inf), (to_nan, math.nan)):
        product = product + torch.where(where, value, 0.0)
    return product


def _scores(q, k, bias, alibi_slopes, visible, offset, scale, softcap):
    """Scores (B, Hq, Tq, Tk) with -inf where invisible, and the factor that softcap puts on their gradient or None."""
    if _known_finite(q, k):
        s = q @ k.mT
    else:  # over finite stand-ins: zero gradients of invisible scores then meet no NaN
        exact = q.detach() @ k.detach().mT
        s = _finite(q) @ _finite(k).mT + torch.where(exact.isfinite(), 0, exact)
    s = scale * s
    slope = None
    if softcap > 0:
        capped = torch.tanh(s / softcap)
        s, slope = softcap * capped, 1 - capped.square()
    if bias is not None:
        s = s + bias.to(s.dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]  # (B or 1, Hq)
        s = s - slopes[:, :, None, None].to(s.dtype) * offset.abs()
    if visible is not None:
        s = torch.where(visible, s, -math.inf)
    return s, slope


def _widen(q, k, v):
    """In the type that is computed in, with a key head for every query head."""
    compute = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    return q.to(compute), *(t.to(compute).repeat_interleave(groups, dim=1) for t in (k, v))


def attention_reference(
    q, k, v, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
    window_left, window_right, scale, softcap, dropout_p, deterministic,
):  # fmt: skip
    wide_q, wide_k, wide_v = _widen(q, k, v)
    visible, offset = _geometry(q, k, mask, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right)
    s, _ = _scores(wide_q, wide_k, bias, alibi_slopes, visible, offset, scale, softcap)
    logits = s
    if sinks is not None:
        sink = sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)
        logits = torch.cat([s, sink], dim=-1)
    lse = torch.logsumexp(logits, dim=-1) if logits.shape[-1] else s.new_full(s.shape[:3], -math.inf)
    p = torch.exp(s - torch.where(lse == -math.inf, 0, lse)[..., None])
    if dropout_p > 0:
        p = torch.where(keep_mask(tuple(p.shape), dropout_p, seed), p / (1 - dropout_p), 0)
    return in_order_of(_product(p, wide_v, visible).to(q.dtype), q), lse


def attention_backward_reference(
    do, dlse, q, k, v, o, lse, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, causal, window_left, window_right, scale, softcap, dropout_p, deterministic, wanted,
):  # fmt: skip
    wide_q, wide_k, wide_v = _widen(q, k, v)
    visible, offset = _geometry(q, k, mask, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right)
    s, slope = _scores(wide_q, wide_k, bias, alibi_slopes, visible, offset, scale, softcap)
    lse = torch.where(lse == -math.inf, 0, lse)
    p = torch.exp(s - lse[..., None])
    do = torch.zeros_like(o) if do is None else do
    wide_do = do.to(s.dtype)
    delta = (wide_do * o.to(s.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dp, kept = wide_do @ wide_v.mT, p
    if dropout_p > 0:
        keep = keep_mask(tuple(p.shape), dropout_p, seed)
        dp, kept = torch.where(keep, dp / (1 - dropout_p), 0), torch.where(keep, p / (1 - dropout_p), 0)
    ds = p * (dp - delta[..., None])
    if visible is not None:
        ds = torch.where(visible, ds, 0)
    draw = ds if slope is None else torch.where(ds == 0, 0, ds * slope)
    seen_from_key = None if visible is None else visible.mT
    dq = scale * _product(draw, wide_k, visible)
    dk = scale * _product(draw.mT, wide_q, seen_from_key)
    dv = _product(kept.mT, wide_do, seen_from_key)
    dk, dv = (g.unflatten(1, (k.shape[1], -1)).sum(2) if k.shape[1] else g for g in (dk, dv))

    triples = zip((dq, dk, dv), (q, k, v), wanted[:3], strict=True)
    grads = [in_order_of(g.to(t.dtype), t) if w else q.new_empty(0) for g, t, w in triples]
    dbias, dslopes, dsinks = (q.new_empty(0) for _ in range(3))  # an op's outputs must not share memory
    if wanted[3]:
        dbias = ds.sum_to_size(bias.shape).to(bias.dtype)
    if wanted[4]:
        dslopes = -(ds * offset.abs()).sum((2, 3))
        dslopes = (dslopes if alibi_slopes.dim() == 2 else dslopes.sum(0)).to(alibi_slopes.dtype)
    if wanted[5]:
        dsinks = sinks_gradient(do, dlse, o, lse, sinks)
    return (*grads, *(g.contiguous() for g in (dbias, dslopes, dsinks)))


# --- the op -----------------------------------------------------------------------------------------------------------
def _fake(q, k, v, *options):
    o = empty_in_order_of(q, v.shape[3])
    return o, q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _fake_backward(do, dlse, q, k, v, o, lse, mask, bias, alibi_slopes, sinks, *options):
    wanted = options[-1]
    pairs = zip((q, k, v), wanted[:3], strict=True)
    extras = zip((bias, alibi_slopes, sinks), wanted[3:], strict=True)
    return (
        *(empty_in_order_of(t, t.shape[3]) if w else q.new_empty(0) for t, w in pairs),
        *(t.new_empty(t.shape) if w else q.new_empty(0) for t, w in extras),
    )


def _flops(q, k, v, *_):
    return 2 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


def _flops_backward(do, dlse, q, k, v, *_):
    """Scores again, dq and dk; dp and dv."""
    return 2 * q.shape[:3].numel() * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])


def _sharding(q, k, v, mask, bias, alibi_slopes, sinks, *options):
    if options[-2] > 0:  # what is dropped depends on a score's number in the whole
        return None
    heads, scores = dims_of_heads(q, k), (dims_of_broadcast(t, "bhQK") for t in (mask, bias))
    slopes = "bh"[2 - alibi_slopes.ndim :] if alibi_slopes is not None else ""
    return f"bhQD, {heads}D, {heads}E, {', '.join(scores)}, {slopes}, h, , ,  -> bhQE, bhQ"


def _sharding_backward(do, dlse, q, k, v, o, lse, mask, bias, alibi_slopes, sinks, *options):
    *options, wanted = options
    rule = _sharding(q, k, v, mask, bias, alibi_slopes, sinks, *options)
    if rule is None:
        return None
    inputs, outputs = (side.split(",") for side in rule.split("->"))

    def gradient(name: str) -> str:
        name = name.strip()
        return f"{name}+{''.join(d for d in 'bh' if d not in name)}"

    gradients = [gradient(n) if w else "" for n, w in zip((*inputs[:3], *inputs[4:7]), wanted, strict=True)]
    return f"{', '.join((*outputs, *inputs[:3], *outputs, *inputs[3:]))} -> {', '.join(gradients)}"


def _save(args, outputs):
    return (*args[:3], *outputs, *args[3:])


def _backward(ops, saved, wanted, do, dlse):
    mine = [*wanted[:3], *wanted[4:7]]  # q, k, v and, after the mask, bias, alibi_slopes, sinks
    found = ops.attention_backward(do, dlse, *saved, mine)
    dq, dk, dv, *extras = (g if w else None for g, w in zip(found, mine, strict=True))
    return (dq, dk, dv, None, *extras)


def _samples(device: str) -> list[tuple]:
    samples = []
    for dtype, dim in ((torch.float32, 40), (torch.bfloat16, 64), (torch.float16, 128)):
        ramp = torch.linspace(-3, 3, 2 * 4 * 130 * dim, device=device)
        q, k, v = (torch.sin(ramp * f).view(2, 4, 130, dim).to(dtype) for f in (311, 173, 97))
        plain = (None,) * 7 + (0, 0)
        samples += [
            (q, k[:, ::2], v[:, ::2], *plain, causal, -1, -1, dim**-0.5, 0.0, 0.0, True) for causal in (0, 1, 2)
        ]
        # All that changes a score; and packed sequences, one of which has no keys.
        heads = torch.tensor([0.1, 0.02, 0.3, 0.005], device=device)
        scores = torch.linspace(-9, 9, 4 * 130 * 130, device=device).view(4, 130, 130)
        seed = torch.tensor(7, device=device)
        terms = (scores[1].sin() < 0.8, scores.cos(), heads, heads.flip(0), seed, None, None, 0, 0)
        samples.append((q, k[:, ::2], v[:, ::2], *terms, 1, 100, 5, dim**-0.5, 3.0, 0.2, True))
        ends = (torch.tensor(e, device=device) for e in ([0, 50, 60, 130], [0, 70, 70, 130]))
        samples.append((q[:1], k[:1, ::2], v[:1, ::2], *(None,) * 5, *ends, 0, 0, 1, -1, -1, dim**-0.5, 0.0, 0.0, True))
    return samples


def _samples_backward(device: str) -> list[tuple]:
    samples = []
    for q, k, v, *options in _samples(device):
        o, lse = attention_reference(q, k, v, *options)
        wanted = [True] * 3 + [x is not None for x in options[1:4]]
        samples.append((o.flip(2), torch.where(lse == -math.inf, 0, lse).flip(1), q, k, v, o, lse, *options, wanted))
    return samples


define_op(
    f"attention_backward(Tensor? do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{_OPTIONS}, bool[] wanted=[True, True, True, False, False, False]) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
    reference=attention_backward_reference,
    fake=_fake_backward,
    samples=_samples_backward,
    flops=_flops_backward,
    sharding=_sharding_backward,
)


def _autocast(dtype, args):
    # As torch: float64 stays.
    return (*(t if t.dtype == torch.float64 else t.to(dtype) for t in args[:3]), *args[3:])


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    op = "fastlm.attention"
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, t)
        if t.dim() != 4:
            raise ArgumentError(f"{op}: {name} must have 4 dimensions (B, H, T, D), got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise DTypeError(f"{op}: {name} must be floating point, got {t.dtype}")
        check_device(op, name, t, "q", q)
        check_same_dtype(op, name, t, "q", q)
    B, Hq, _, D = q.shape
    _, Hk, Tk, _ = k.shape
    if D == 0:
        raise ArgumentError(f"{op}: q must have a head dim D of at least 1, got {tuple(q.shape)}")
    if Hq % Hk if Hk else Hq:  # no heads of either: as empty as no batch
        raise ArgumentError(f"{op}: the heads of q must be a multiple of those of k, got {Hq} and {Hk}")
    if k.shape != (B, Hk, Tk, D):
        raise ArgumentError(f"{op}: k must be (B, Hk, Tk, D) = {(B, Hk, Tk, D)} to match q, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentError(f"{op}: v must be (B, Hk, Tk, Dv) = ({B}, {Hk}, {Tk}, Dv) to match k, got {tuple(v.shape)}")


def _check_packed(op: str, name: str, cu_seqlens: Tensor, total: int, longest: int | None) -> None:
    """As far as the numbers can be read: on a GPU that would wait for it."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ArgumentError(
            f"{op}: cu_seqlens_{name} must be (sequences + 1,) int32 or int64, got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if longest is not None and not (type(longest) is int and longest >= 0):
        raise ArgumentError(f"{op}: max_seqlen_{name} must be an int of at least 0, got {longest!r}")
    starts = readable_values(cu_seqlens)
    if starts is None:
        return
    if starts[0] != 0 or starts[-1] != total or any(a > b for a, b in itertools.pairwise(starts)):
        raise ArgumentError(f"{op}: cu_seqlens_{name} must rise from 0 to the total of {total}, got {starts}")
    found = max(b - a for a, b in itertools.pairwise(starts))
    if longest is not None and longest < found:
        raise ArgumentError(f"{op}: max_seqlen_{name} must be at least the longest sequence, {found}, got {longest}")


def _check_options(
    q, k, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
    scale, dropout_p, softcap,
):  # fmt: skip
    op = "fastlm.attention"
    B, Hq, Tq, _ = q.shape
    full = (B, Hq, Tq, k.shape[2])
    tensors = (mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    names = ("mask", "bias", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k")
    given = [(name, t) for name, t in zip(names, tensors, strict=True) if t is not None]
    for name, t in given:
        check_tensor(op, name, t)
    if not isinstance(causal, (bool, str)) or causal not in _CAUSAL:
        raise ArgumentError(f"{op}: causal must be False, True, 'bottom_right' or 'top_left', got {causal!r}")
    check_dropout(op, dropout_p)
    if scale is not None:
        check_number(op, "scale", scale)
    check_softcap(op, softcap)
    if mask is not None and mask.dtype != torch.bool:
        raise DTypeError(f"{op}: mask must be bool (True: visible), got {mask.dtype}; an additive mask is called bias")
    if bias is not None and not bias.is_floating_point():
        raise DTypeError(f"{op}: bias must be floating point, got {bias.dtype}")
    for name, t in (("mask", mask), ("bias", bias)):
        fits = t is None or (
            t.dim() <= 4 and all(a in (1, b) for a, b in zip(reversed(t.shape), reversed(full), strict=False))
        )
        if not fits:
            raise ArgumentError(f"{op}: {name} must broadcast to (B, Hq, Tq, Tk) = {full}, got {tuple(t.shape)}")
    check_per_head(op, q, alibi_slopes, sinks)
    check_seed(op, seed, q.device)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ArgumentError(f"{op}: cu_seqlens_q and cu_seqlens_k must be given together")
    if cu_seqlens_q is not None:
        if B != 1:
            raise ArgumentError(f"{op}: packed sequences must come as one batch, q (1, H, total, D), got B = {B}")
        _check_packed(op, "q", cu_seqlens_q, Tq, max_seqlen_q)
        _check_packed(op, "k", cu_seqlens_k, k.shape[2], max_seqlen_k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ArgumentError(
                f"{op}: cu_seqlens_k must have as many sequences as cu_seqlens_q, {cu_seqlens_q.numel() - 1}, "
                f"got {cu_seqlens_k.numel() - 1}"
            )
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ArgumentError(f"{op}: max_seqlen_q and max_seqlen_k belong to packed sequences, given by cu_seqlens_q")
    for name, t in given:
        check_device(op, name, t, "q", q)


def _arguments(
    q, k, v, causal=False, scale=None, window=None, mask=None, bias=None, alibi_slopes=None, sinks=None, softcap=None,
    dropout_p=0.0, seed=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=None, return_lse=False,
) -> tuple:  # fmt: skip
    """The schema's arguments from the public ones, checked."""
    _check(q, k, v)
    _check_options(
        q, k, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
        scale, dropout_p, softcap,
    )  # fmt: skip
    left, right = checked_window("fastlm.attention", window)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed("fastlm.attention", q)
    return (
        q, k, v, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0,
        max_seqlen_k or 0, _CAUSAL[causal], left, right,
        q.shape[-1] ** -0.5 if scale is None else float(scale), softcap or 0.0, dropout_p,
        deterministic is not False or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


_attention = define_op(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)",
    reference=attention_reference,
    fake=_fake,
    samples=_samples,
    save=_save,
    backward=_backward,
    autocast=_autocast,
    arguments=_arguments,
    flops=_flops,
    sharding=_sharding,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in tiles: no (Tq, Tk) matrix is kept (online softmax, Milakov and Gimelshein 2018;
    FlashAttention, Dao et al. 2022). What no kernel can do yet runs on the reference, which does hold that matrix:
    ``fastlm.backends("attention", q=q, k=k, v=v, ...)`` tells.

    Args:
        q: (B, Hq, Tq, D), floating point. A transposed view of (B, T, H, D) costs no copy.
        k: (B, Hk, Tk, D), Hq a multiple of Hk: grouped or multi-query heads.
        v: (B, Hk, Tk, Dv).
        causal: False; True or "bottom_right": key j is visible to query i iff j <= i + Tk - Tq, so that the last query
            sees every key; "top_left": iff j <= i.
        scale: on the scores; 1 / sqrt(D) where not given.
        window: (left, right), how many keys before and after the aligned one are visible, -1 = all; an int for both.
        mask: bool, broadcastable to (B, Hq, Tq, Tk); True = visible.
        bias: added to the scaled scores; floating point, broadcastable to (B, Hq, Tq, Tk); has a gradient, for which
            GPUs hold that of every score for a while. A query whose scores all lie below -2e38 may count as one that
            sees nothing.
        alibi_slopes: (Hq,) or (B, Hq); subtracts slope * |i + Tk - Tq - j| (Press et al. 2022); has a gradient.
        sinks: (Hq,), a logit per head that takes part in the softmax and carries no value; has a gradient.
        softcap: c > 0 replaces the scaled scores s by c tanh(s / c).
        dropout_p: probability in [0, 1) of dropping a weight after the softmax; the others are divided by 1 - p.
        seed: 0-d int64 tensor that decides what is dropped; drawn from torch's generator where not given.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) int32 or int64, where each of n packed sequences begins, and the total;
            then q is (1, Hq, total, D), and a query sees keys of its own sequence alone. On a GPU their numbers are
            not checked, since that would wait for it; a query outside of all sequences sees nothing.
        max_seqlen_q, max_seqlen_k: the longest of those; checked, and of no use to today's kernels.
        deterministic: False allows a backward whose last bits may differ from run to run, where it takes fewer
            products: in the CUDA kernels for Hopper (FASTLM_CUDA_FAMILY=sm90), with 4 bytes more for each element of
            q. `torch.use_deterministic_algorithms` overrules it. Triton's kernels give the same bits for the same
            choice of tiles (FASTLM_TRITON_TUNE).
        return_lse: also give lse (B, Hq, Tq), the natural log of the softmax's denominator; it has a gradient.

    Returns:
        o (B, Hq, Tq, Dv) of q's dtype, in q's order of strides; with return_lse also lse, float32 (float64 for
        float64).

    Raises:
        ValueError: sizes, devices or options that do not fit. TypeError: dtypes that do not fit.
    """
    o, lse = _attention(
        *_arguments(
            q, k, v, causal, scale, window, mask, bias, alibi_slopes, sinks, softcap, dropout_p, seed, cu_seqlens_q,
            cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic,
        )
    )  # fmt: skip
    return (o, lse) if return_lse else o


def _check_drop_in(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> torch.Size:
    """The leading dimensions of the output, after checking what the drop-in calls by other names than attention.

    What torch's function refuses is refused, by TypeError or ValueError where torch has RuntimeError or IndexError too.
    """
    op = "fastlm.scaled_dot_product_attention"
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, (bool, torch.SymBool)):
            raise DTypeError(f"{op}: {name} must be a bool, got {flag!r}")
    heads = 1 if enable_gqa else 0
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, t)
        if t.dim() < 2 + heads:
            raise ArgumentError(f"{op}: {name} must have at least {2 + heads} dimensions, got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise DTypeError(f"{op}: {name} must be floating point, got {t.dtype}")
        check_same_dtype(op, name, t, "query", query)
        check_device(op, name, t, "query", query)

    def said() -> str:
        return ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("query", query), ("key", key), ("value", value)))

    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ArgumentError(
            f"{op}: sizes must be query (..., Tq, D), key (..., Tk, D), value (..., Tk, Dv), got {said()}"
        )
    Hq, Hk = query.shape[-3] if heads else 0, key.shape[-3] if heads else 0
    if heads and (value.shape[-3] != Hk or (Hq % Hk if Hk else Hq)):
        raise ArgumentError(
            f"{op}: with enable_gqa query must have a multiple of the heads of key and value, got {said()}"
        )
    lead, *others = (t.shape[: t.dim() - 2 - heads] for t in (query, key, value))
    if others != [lead, lead]:
        try:
            lead = torch.broadcast_shapes(lead, *others)
        except RuntimeError:
            raise ArgumentError(f"{op}: leading dimensions must broadcast, got {said()}") from None
    check_number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ArgumentError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    if scale is not None:
        check_number(op, "scale", scale)
    if attn_mask is not None:
        check_tensor(op, "attn_mask", attn_mask)
        autocast = attn_mask.dtype in (torch.bfloat16, torch.float16) and autocast_on(query.device)
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) and not autocast:
            raise DTypeError(
                f"{op}: attn_mask must be bool, float32 or of the dtype of query, {query.dtype}, got {attn_mask.dtype}"
            )
        check_device(op, "attn_mask", attn_mask, "query", query)
        full = (*lead, *query.shape[query.dim() - 2 - heads : -2], query.shape[-2], key.shape[-2])
        sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
        if attn_mask.dim() > len(full) or any(a not in (1, b) for a, b in sizes):
            raise ArgumentError(f"{op}: attn_mask must broadcast to {full}, got {tuple(attn_mask.shape)}")
    return lead


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.scaled_dot_product_attention``, whose arguments and meanings these are.

    Args:
        query: (..., Hq, Tq, D). key: (..., Hk, Tk, D). value: (..., Hk, Tk, Dv). Leading dimensions broadcast.
        attn_mask: bool (True: visible), or float32 or query's dtype (added to the scores), broadcastable to
            (..., Hq, Tq, Tk).
        dropout_p: probability of dropping a weight; applied always, as in torch.
        is_causal: key j is visible to query i iff j <= i: aligned at the top left, as in torch. With attn_mask, what
            both let through (torch does so in some of its kernels and refuses it in others).
        scale: on the scores; 1 / sqrt(D) where not given.
        enable_gqa: allow Hq to be a multiple of Hk.

    Returns:
        (..., Hq, Tq, Dv) of query's dtype. Rows that see nothing are zero.

    Raises:
        ValueError: sizes or options that do not fit. TypeError: dtypes that do not fit.
    """
    lead = _check_drop_in(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if dropout_p == 1 or query.shape[-1] == 0:  # no scores to speak of: what attention refuses
        options = (attn_mask, float(dropout_p), is_causal)
        return F.scaled_dot_product_attention(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
    heads = 1 if enable_gqa else 0  # dimensions, left of (T, D), that do not broadcast

    def as_4d(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.shape[: 2 - heads] == lead:
            return t
        t = t.expand(*lead, *t.shape[t.dim() - 2 - heads :])
        while t.dim() < 4:
            t = t[None]
        return t.flatten(0, t.dim() - 4)

    mask = attn_mask
    if mask is not None and len(lead) + heads != 2:
        mask = mask.expand(*lead, *query.shape[query.dim() - 2 - heads : -2], query.shape[-2], key.shape[-2])
        while mask.dim() < 4:
            mask = mask[None]
        mask = mask.flatten(0, mask.dim() - 4)
    additive = mask is not None and mask.dtype != torch.bool
    o = attention(
        as_4d(query),
        as_4d(key),
        as_4d(value),
        causal="top_left" if is_causal else False,
        scale=scale,
        mask=None if additive else mask,
        bias=mask if additive else None,
        dropout_p=dropout_p,
    )
    if query.dim() == 4 and query.shape[: 2 - heads] == lead:
        return o
    return o.reshape(*lead, *query.shape[query.dim() - 2 - heads : -1], value.shape[-1])
