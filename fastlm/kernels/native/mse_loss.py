"""mse_loss in C++: csrc/cpu/mse_loss.cpp, csrc/cuda/mse_loss.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import as_laid_out, unsupported_dtype
from fastlm.kernels.native._common import current_stream


def _operands(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    return x, as_laid_out(target, x)


def _unsupported_backward(g: Tensor, x: Tensor, target: Tensor) -> str | None:
    return unsupported_dtype(x)


if _native.cpu is not None:

    @kernel("mse_loss", backend="native", device="cpu", supports=unsupported_dtype)
    def mse_loss(x: Tensor, target: Tensor) -> Tensor:
        x, target = _operands(x, target)
        total = _native.cpu.mse_loss_forward(x, target, torch.get_num_threads())
        return torch.tensor(total, dtype=torch.promote_types(x.dtype, torch.float32))

    @kernel("mse_loss_backward", backend="native", device="cpu", supports=_unsupported_backward)
    def mse_loss_backward(g: Tensor, x: Tensor, target: Tensor) -> Tensor:
        x, target = _operands(x, target)
        dx = torch.empty_like(x)
        _native.cpu.mse_loss_backward(x, target, 2 * g.item(), dx, torch.get_num_threads())
        return dx


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("mse_loss", backend="native", device="cuda", supports=unsupported_dtype)
    def mse_loss_cuda(x: Tensor, target: Tensor) -> Tensor:
        x, target = _operands(x, target)
        total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
        partial = total.new_empty(_cuda.mse_loss_chunks(x.numel()))
        _cuda.mse_loss_forward(x, target, total, partial, current_stream(x))
        return total

    @kernel("mse_loss_backward", backend="native", device="cuda", supports=_unsupported_backward)
    def mse_loss_backward_cuda(g: Tensor, x: Tensor, target: Tensor) -> Tensor:
        x, target = _operands(x, target)
        dx = torch.empty_like(x)
        _cuda.mse_loss_backward(g, x, target, dx, current_stream(x))
        return dx
