"""The gradient of an embedding in C++: csrc/cpu/embedding.cpp; its value is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype

if _native.cpu is not None:

    @kernel("embedding", backend="native", device="cpu", supports=unsupported_dtype)
    def embedding(weight: Tensor, index: Tensor, padding: int) -> Tensor:
        return torch.embedding(weight, index)

    @kernel("embedding_backward", backend="native", device="cpu", supports=unsupported_dtype)
    def embedding_backward(dy: Tensor, index: Tensor, rows: int, padding: int) -> Tensor:
        dweight = dy.new_empty(rows, dy.shape[1])
        _native.cpu.embedding_backward(dy.contiguous(), index.contiguous(), dweight, padding, torch.get_num_threads())
        return dweight
