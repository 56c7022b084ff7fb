"""Dropout in C++: csrc/cpu/dropout.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype

if _native.cpu is not None:

    @kernel("dropout", backend="native", device="cpu", supports=unsupported_dtype)
    def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _native.cpu.dropout(x, y, p, seed.item() % 2**64, torch.get_num_threads())
        return y
