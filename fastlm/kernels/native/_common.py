"""What the wrappers of the CUDA kernels ask of torch. A test answers in its place, to run them without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastlm.kernels._common import as_laid_out, capturing, flat


def current_stream(x: Tensor) -> int:
    """The stream that torch works on at x's device, as the CUDA kernels take it."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of x's device."""
    return torch.cuda.get_device_capability(x.device)


def readable(x: Tensor | None) -> Tensor | None:
    """A number in device memory as the kernels of optimizers read it: float32 or float64."""
    return x if x is None or x.dtype == torch.float64 else x.float()


def step_workspace(
    op: str, cuda: ModuleType, params: Sequence[Tensor], steps: Sequence[Tensor], on_device: bool
) -> Tensor | None:
    """Where a step leaves what follows from the steps taken so far, where those are counted on the device."""
    if on_device:
        return torch.empty(cuda.step_workspace * len(steps), dtype=torch.float64, device=params[0].device)
    if steps and capturing(params[0]):
        raise RuntimeError(f"fastlm.{op} counts steps on the host here, which a CUDA graph would not do again")
    return None


def act_on_gpu(cuda: ModuleType, stream: int, x: Tensor, act: int) -> Tensor:
    y = torch.empty_like(x)
    cuda.act_forward(flat(as_laid_out(x, y)), flat(y), act, stream)
    return y


def act_backward_on_gpu(cuda: ModuleType, stream: int, dy: Tensor, saved: Tensor, act: int) -> Tensor:
    dx = torch.empty_like(saved)
    cuda.act_backward(flat(as_laid_out(dy, dx)), flat(as_laid_out(saved, dx)), flat(dx), act, stream)
    return dx


def bias_act_backward_on_gpu(
    cuda: ModuleType, stream: int, dy: Tensor, saved: Tensor, bias: Tensor | None, act: int
) -> tuple[Tensor, Tensor]:
    """Of contiguous tensors: the gradient, and its sums over rows, (N,), float64 for float64, else float32. Without a
    bias it is none, or in `saved` already.
    """
    cols = saved.shape[-1]
    dx, sums = torch.empty_like(saved), saved.new_empty(cols, dtype=torch.promote_types(saved.dtype, torch.float32))
    partial = sums.new_empty(cuda.bias_act_chunks(saved.numel() // cols if cols > 0 else 0), cols)
    cuda.bias_act_backward(dy, saved, bias, dx, sums, partial, act, stream)
    return dx, sums
