"""cross_entropy in C++: csrc/cpu/cross_entropy.cpp, csrc/cuda/cross_entropy.cu; linear_cross_entropy from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels import products_gpu
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.linear_cross_entropy import by_parts, rows_on_gpu, unsupported_on_gpu
from fastlm.kernels.native._common import current_stream


def _unsupported(x: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> str | None:
    if target.is_floating_point():
        return "does not do probabilities as targets"
    if weight is not None:
        return "does not do class weights with label smoothing"
    return unsupported_dtype(x)


def _unsupported_backward(g, dlse, x, target, weight, *_: object) -> str | None:
    return _unsupported(x, target, weight)


def _register(device: str, forward: Callable[..., None], backward: Callable[..., None]) -> None:
    """Both run on contiguous tensors."""

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


def _register_linear(device: str, *how: Any, supports: Callable[..., str | None]) -> None:
    @kernel("linear_cross_entropy", backend="native", device=device, supports=supports)
    def linear_cross_entropy(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return by_parts(*how, *args)


def _unsupported_linear(x: Tensor, *_: object) -> str | None:
    return unsupported_dtype(x)


if _native.cpu is not None:
    from fastlm.kernels.native import products

    # Rows whose logits are held at a time: a tenth of all, since each time the gradient of the weight is read and
    # written, but no more than products need to be fast; and as many as make 4 Mi logits, however few those are.
    _LEAST_ROWS, _SHARE_OF_ROWS, _MOST_ROWS, _LEAST_LOGITS = 128, 10, 1024, 4 << 20

    def _rows(x: Tensor, weight: Tensor) -> int:
        few = min(_MOST_ROWS, len(x) // _SHARE_OF_ROWS)
        return max(_LEAST_ROWS, few, _LEAST_LOGITS // max(1, weight.shape[0]))

    _on_cpu = (
        lambda *args: _native.cpu.cross_entropy_forward(*args, torch.get_num_threads()),
        lambda *args: _native.cpu.cross_entropy_backward(*args, torch.get_num_threads()),
    )
    _register("cpu", *_on_cpu)
    _register_linear("cpu", products, _rows, *_on_cpu, supports=_unsupported_linear)

if _native.cuda is not None:
    _cuda = _native.cuda

    def _unsupported_linear_on_gpu(x: Tensor, *others: Any) -> str | None:
        return unsupported_dtype(x) or unsupported_on_gpu(x, *others)

    _on_gpu = (
        lambda x, *args: _cuda.cross_entropy_forward(x, *args, current_stream(x)),
        lambda g, *args: _cuda.cross_entropy_backward(g, *args, current_stream(g)),
    )
    _register("cuda", *_on_gpu)
    _register_linear("cuda", products_gpu, rows_on_gpu, *_on_gpu, supports=_unsupported_linear_on_gpu)
