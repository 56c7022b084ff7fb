"""Rows of a table, and its gradient: csrc/cuda/embedding.cu; on the CPU torch's value and csrc/cpu/embedding.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.native._common import current_stream

if _native.cpu is not None:

    @kernel("embedding", backend="native", device="cpu", supports=unsupported_dtype)
    def embedding(weight: Tensor, index: Tensor, padding: int) -> Tensor:
        return torch.embedding(weight, index)

    @kernel("embedding_backward", backend="native", device="cpu", supports=unsupported_dtype)
    def embedding_backward(dy: Tensor, index: Tensor, rows: int, padding: int) -> Tensor:
        dweight = dy.new_empty(rows, dy.shape[1])
        _native.cpu.embedding_backward(dy.contiguous(), index.contiguous(), dweight, padding, torch.get_num_threads())
        return dweight


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("embedding", backend="native", device="cuda", supports=unsupported_dtype)
    def embedding_cuda(weight: Tensor, index: Tensor, padding: int) -> Tensor:
        y = torch.empty(len(index), weight.shape[1], dtype=weight.dtype, device=weight.device)
        _cuda.embedding_forward(weight.contiguous(), index.contiguous(), y, current_stream(weight))
        return y

    @kernel("embedding_backward", backend="native", device="cuda", supports=unsupported_dtype)
    def embedding_backward_cuda(dy: Tensor, index: Tensor, rows: int, padding: int) -> Tensor:
        dweight = dy.new_zeros(rows, dy.shape[1])  # most rows of a large table are in no batch
        found, order = torch.sort(index, stable=True)  # as the places stand: the same sums every time
        wide = torch.promote_types(dy.dtype, torch.float32)
        partial = dy.new_empty(_cuda.embedding_partial_rows(len(index)), dy.shape[1], dtype=wide)
        _cuda.embedding_backward(dy.contiguous(), found, order, dweight, partial, padding, current_stream(dy))
        return dweight
