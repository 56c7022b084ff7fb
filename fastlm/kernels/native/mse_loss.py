"""mse_loss in C++: csrc/cpu/mse_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import as_laid_out, unsupported_dtype

if _native.cpu is not None:

    def _operands(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        return x, as_laid_out(target, x)

    @kernel("mse_loss", backend="native", device="cpu", supports=unsupported_dtype)
    def mse_loss(x: Tensor, target: Tensor) -> Tensor:
        x, target = _operands(x, target)
        total = _native.cpu.mse_loss_forward(x, target, torch.get_num_threads())
        return torch.tensor(total, dtype=torch.promote_types(x.dtype, torch.float32))

    @kernel("mse_loss_backward", backend="native", device="cpu", supports=lambda g, x, target: unsupported_dtype(x))
    def mse_loss_backward(g: Tensor, x: Tensor, target: Tensor) -> Tensor:
        x, target = _operands(x, target)
        dx = torch.empty_like(x)
        _native.cpu.mse_loss_backward(x, target, 2 * g.item(), dx, torch.get_num_threads())
        return dx
