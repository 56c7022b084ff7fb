"""What attention's ops and kernels share: the order of dimensions of their results, the gradient of sinks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _order(like: Tensor) -> list[int]:
    """Its dimensions, the outermost first; expanded ones outermost."""
    return sorted(range(like.dim()), key=lambda i: (-like.stride(i) or -math.inf, i))


def in_order_of(x: Tensor, like: Tensor) -> Tensor:
    """x in memory in the order of dimensions that `like` has."""
    order = _order(like)
    return x.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def empty_in_order_of(like: Tensor, last: int) -> Tensor:
    """Empty and dense, of the sizes of `like` but the last, in its order of dimensions."""
    size = (*like.shape[:-1], last)
    if like.is_contiguous():  # the most frequent, and a tenth of the time
        return torch.empty(size, dtype=like.dtype, device=like.device)
    return torch.empty_permuted(size, _order(like), dtype=like.dtype, device=like.device)


def dims_of_broadcast(t: Tensor | None, names: str) -> str:
    """For a sharding rule: the dimensions of t, which is broadcast against those of these names."""
    if t is None:
        return ""
    return "".join("." if size == 1 else name for name, size in zip(names[len(names) - t.ndim :], t.shape, strict=True))


def dims_of_heads(q: Tensor, k: Tensor) -> str:
    return "b.K" if k.shape[1] == 1 < q.shape[1] else "bhK"


def sinks_gradient(do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Of sinks (Hq,), which have the probability exp(sink - lse) and the value 0. do, o: (B, Hq, Tq, Dv)."""
    delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    finite = torch.where(lse == -math.inf, 0, lse)  # of queries that see nothing, nor a sink
    p = torch.exp(sinks.to(lse.dtype)[None, :, None] - finite)
    return -(p * delta).sum((0, 2), dtype=torch.float64).to(sinks.dtype)


def lse_of_no_key(sinks: Tensor | None, lse: Tensor) -> Tensor:
    """What lse (B, Hq, Tq) is where a query sees nothing: its sink, (Hq,) or (B, Hq), or -inf."""
    if sinks is None:
        return lse.new_full((), -math.inf)
    return (sinks if sinks.dim() == 2 else sinks[None])[:, :, None].to(lse.dtype)
