"""cross_entropy in C++: csrc/cpu/cross_entropy.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype

if _native.cpu is not None:

    def _unsupported(x: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> str | None:
        if weight is not None:
            return "does not do class weights"
        if target.is_floating_point():
            return "does not do probabilities as targets"
        return unsupported_dtype(x)

    @kernel("cross_entropy", backend="native", device="cpu", supports=_unsupported)
    def cross_entropy(
        x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        loss, lse = (torch.empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
        _native.cpu.cross_entropy_forward(
            x.contiguous(), target.contiguous(), loss, lse, ignore_index, label_smoothing, softcap,
            torch.get_num_threads(),
        )  # fmt: skip
        return loss, lse

    def _unsupported_backward(g, dlse, x, target, weight, *_: object) -> str | None:
        return _unsupported(x, target, weight)

    @kernel("cross_entropy_backward", backend="native", device="cpu", supports=_unsupported_backward)
    def cross_entropy_backward(
        g: Tensor, dlse: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
        ignore_index: int, label_smoothing: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        _native.cpu.cross_entropy_backward(
            g.contiguous(), dlse if dlse is None else dlse.contiguous(), x.contiguous(), target.contiguous(),
            lse.contiguous(), dx, ignore_index, label_smoothing, softcap, torch.get_num_threads(),
        )  # fmt: skip
        return dx
