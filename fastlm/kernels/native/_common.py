"""What the wrappers of the CUDA kernels ask of torch. A test answers in its place, to run them without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def current_stream(x: Tensor) -> int:
    """The stream that torch works on at x's device, as the CUDA kernels take it."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of x's device."""
    return torch.cuda.get_device_capability(x.device)
