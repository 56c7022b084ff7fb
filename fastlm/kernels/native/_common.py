"""What the wrappers of the CUDA kernels ask of torch. A test answers in its place, to run them without a GPU."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastlm.kernels._common import as_laid_out, flat


def current_stream(x: Tensor) -> int:
    """The stream that torch works on at x's device, as the CUDA kernels take it."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of x's device."""
    return torch.cuda.get_device_capability(x.device)


def act_on_gpu(cuda: ModuleType, stream: int, x: Tensor, act: int) -> Tensor:
    y = torch.empty_like(x)
    cuda.act_forward(flat(as_laid_out(x, y)), flat(y), act, stream)
    return y


def act_backward_on_gpu(cuda: ModuleType, stream: int, dy: Tensor, saved: Tensor, act: int) -> Tensor:
    dx = torch.empty_like(saved)
    cuda.act_backward(flat(as_laid_out(dy, dx)), flat(as_laid_out(saved, dx)), flat(dx), act, stream)
    return dx
