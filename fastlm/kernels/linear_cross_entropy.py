"""linear_cross_entropy from the products of a device and the kernels of cross_entropy, whichever these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels.products_gpu import unsupported_sum

# Of the logits that are held at a time. Each time the gradient of the weight is read and written, in float32: on an
# H200 (700 TFLOP/s in bf16, 4.3 TB/s) that is 220 / rows of what the three products take if nothing hides it, for
# 2048 rows of 128k classes 11 %. (Twice the logits would cost 5 % and another 0.5 GiB.) The logits themselves are
# read twice and written once besides the products, 160 / columns of x: for 4096 another 4 %.
_MOST_BYTES = 512 << 20
_TILE = 128  # rows: a part of a tile takes as long as all of it


def rows_on_gpu(x: Tensor, weight: Tensor) -> int:
    most = max(_TILE, _MOST_BYTES // max(1, weight.shape[0] * x.element_size()) // _TILE * _TILE)
    parts = max(1, -(-len(x) // most))
    return max(1, -(-len(x) // (parts * _TILE))) * _TILE  # of one size, as far as tiles allow


def unsupported_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *others: Any) -> str | None:
    *_, wanted = others
    return unsupported_sum(x) if wanted[1] else None


def by_parts(
    products: ModuleType,
    rows_at_a_time: Callable[[Tensor, Tensor], int],
    forward: Callable[..., None],
    backward: Callable[..., None],
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, mean: bool, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The logits of some rows at a time, whose gradient takes their place. Nothing waits for a GPU.

    Args:
        products: as products.py and products_gpu.py.
        forward, backward: of cross_entropy, on contiguous tensors: (x, target, loss, lse, ...) and (g, dlse, x, target,
            lse, dx, ...), where dx may be x.
        x, ...: those of the op.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    converts = products.by_conversion(x)
    if converts:  # once, and not once for each part
        weight, bias = weight.float(), None if bias is None else bias.float()
    target = target.contiguous()
    losses, lse = (torch.empty(len(x), dtype=wide, device=x.device) for _ in range(2))
    counted = (target != ignore_index).sum(dtype=torch.float64) if mean else x.new_ones((), dtype=torch.float64)
    share = 1 / counted  # infinite where nothing counts, and 0 times that NaN: the mean of nothing, as in torch
    # In float16 the share would take digits of the logits' gradients: it waits for the end, which is in float32.
    kept, late = (torch.float32, share.nan_to_num(posinf=0.0)) if dtype == torch.float16 else (dtype, None)
    g = (share if late is None else torch.ones_like(share)).to(wide).expand(len(x)).contiguous()
    dx = torch.empty_like(x, dtype=kept, memory_format=torch.contiguous_format) if wanted[0] else None
    make = torch.empty_like if len(x) > 0 else torch.zeros_like  # the first product overwrites what is there
    dweight = make(weight, dtype=wide, memory_format=torch.contiguous_format) if wanted[1] else None
    dbias = x.new_zeros(weight.shape[0], dtype=wide) if wanted[2] else None
    step = rows_at_a_time(x, weight)
    for begin in range(0, len(x), step):
        at = slice(begin, begin + step)
        part = x[at].float() if converts else x[at]
        logits = products.linear(part, weight, bias)
        forward(logits, target[at], losses[at], lse[at], ignore_index, label_smoothing, softcap)
        if any(wanted):
            dlse = 2 * z_loss * g[at] * lse[at] if z_loss else None
            backward(g[at], dlse, logits, target[at], lse[at], logits, ignore_index, label_smoothing, softcap)
        if wanted[0]:
            dx[at] = products.input_gradient(logits, weight)
        if wanted[1]:
            products.add_product(logits.t(), part, dweight, add=begin > 0)
        if wanted[2]:
            dbias += logits.sum(0, dtype=wide)
        del logits  # before the next ones are made
    total = losses.sum(dtype=torch.float64)
    if z_loss:
        total += z_loss * lse.double().square().sum()
    if late is not None:
        for t in (dx, dweight, dbias):
            if t is not None:
                t *= late
    made = (x.new_empty(0, dtype=kept) if t is None else t.to(kept) for t in (dx, dweight, dbias))
    return (total * share).to(wide), *made
