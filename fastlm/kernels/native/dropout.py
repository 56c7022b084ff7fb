"""Dropout in C++: csrc/cpu/dropout.cpp, csrc/cuda/dropout.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.native._common import current_stream

if _native.cpu is not None:

    @kernel("dropout", backend="native", device="cpu", supports=unsupported_dtype)
    def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _native.cpu.dropout(x, y, p, seed.item() % 2**64, torch.get_num_threads())
        return y


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("dropout", backend="native", device="cuda", supports=unsupported_dtype)
    def dropout_cuda(x: Tensor, p: float, seed: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _cuda.dropout(x, y, p, seed, current_stream(x))
        return y
