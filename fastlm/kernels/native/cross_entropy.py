"""cross_entropy in C++: csrc/cpu/cross_entropy.cpp, csrc/cuda/cross_entropy.cu; on the CPU linear_cross_entropy from it
and the products of products.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.native._common import current_stream


def _unsupported(x: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> str | None:
    if target.is_floating_point():
        return "does not do probabilities as targets"
    if weight is not None:
        return "does not do class weights with label smoothing"
    return unsupported_dtype(x)


def _unsupported_backward(g, dlse, x, target, weight, *_: object) -> str | None:
    return _unsupported(x, target, weight)


def _register(device: str, forward: Callable[..., None], backward: Callable[..., None]) -> Callable[..., Any]:
    """Both run on contiguous tensors. Returns the forward."""

    @kernel("cross_entropy", backend="native", device=device, supports=_unsupported)
    def cross_entropy(
        x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        loss, lse = (torch.empty(len(x), dtype=wide, device=x.device) for _ in range(2))
        forward(x.contiguous(), target.contiguous(), loss, lse, ignore_index, label_smoothing, softcap)
        return loss, lse

    @kernel("cross_entropy_backward", backend="native", device=device, supports=_unsupported_backward)
    def cross_entropy_backward(
        g: Tensor, dlse: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
        ignore_index: int, label_smoothing: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        backward(
            g.contiguous(), dlse if dlse is None else dlse.contiguous(), x.contiguous(), target.contiguous(),
            lse.contiguous(), dx, ignore_index, label_smoothing, softcap,
        )  # fmt: skip
        return dx

    return cross_entropy


if _native.cuda is not None:
    _cuda = _native.cuda
    _register(
        "cuda",
        lambda x, *args: _cuda.cross_entropy_forward(x, *args, current_stream(x)),
        lambda g, *args: _cuda.cross_entropy_backward(g, *args, current_stream(g)),
    )

if _native.cpu is not None:
    from fastlm.kernels.native.products import add_product, by_conversion, input_gradient, linear

    cross_entropy = _register(
        "cpu",
        lambda *args: _native.cpu.cross_entropy_forward(*args, torch.get_num_threads()),
        lambda *args: _native.cpu.cross_entropy_backward(*args, torch.get_num_threads()),
    )

    # Rows whose logits are held at a time: a tenth of all, since each time the gradient of the weight is read and
    # written, but no more than products need to be fast; and as many as make 4 Mi logits, however few those are.
    _LEAST_ROWS, _SHARE_OF_ROWS, _MOST_ROWS, _LEAST_LOGITS = 128, 10, 1024, 4 << 20

    def _unsupported_linear(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *_: object) -> str | None:
        return unsupported_dtype(x)

    @kernel("linear_cross_entropy", backend="native", device="cpu", supports=_unsupported_linear)
    def linear_cross_entropy(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float,
        z_loss: float, softcap: float, mean: bool, wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        converts = by_conversion(x)
        if converts:  # once, and not once for each part
            weight, bias = weight.float(), None if bias is None else bias.float()
        count = (target != ignore_index).sum().item() if mean else 1
        share = 1 / count if count else float("nan")  # the mean of nothing, as in torch
        total = torch.zeros((), dtype=torch.float64)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format) if wanted[1] else None
        dbias = torch.zeros(weight.shape[0], dtype=wide) if wanted[2] else None
        rows = max(_LEAST_ROWS, min(_MOST_ROWS, len(x) // _SHARE_OF_ROWS), _LEAST_LOGITS // max(1, weight.shape[0]))
        for begin in range(0, len(x), rows):
            part, classes = x[begin : begin + rows], target[begin : begin + rows]
            if converts:
                part = part.float()
            logits = linear(part, weight, bias)
            losses, lse = cross_entropy(logits, classes, None, ignore_index, label_smoothing, softcap)
            total += losses.sum(dtype=torch.float64)
            if z_loss:
                total += z_loss * lse.double().square().sum()
            if not any(wanted):
                continue
            _native.cpu.cross_entropy_backward(
                torch.full_like(lse, share), 2 * z_loss * share * lse if z_loss else None, logits, classes, lse, logits,
                ignore_index, label_smoothing, softcap, torch.get_num_threads(),
            )  # fmt: skip
            if wanted[0]:
                dx[begin : begin + rows] = input_gradient(logits, weight)
            if dweight is not None:
                if x.dtype == torch.float64:
                    dweight.addmm_(logits.t(), part)
                else:
                    add_product(logits.t(), part, dweight)
            if dbias is not None:
                dbias += logits.sum(0, dtype=wide)
        made = (x.new_empty(0, dtype=dtype) if g is None else g.to(dtype) for g in (dx, dweight, dbias))
        return (total * share).to(wide), *made
