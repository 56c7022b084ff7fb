"""act(gate) * up in C++: csrc/cpu/activation.cpp, csrc/cuda/activation.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import matrix, unsupported_dtype
from fastlm.kernels.native._common import current_stream

if _native.cpu is not None:
    from fastlm.kernels.native.activation import ACTS

    @kernel("glu", backend="native", device="cpu", supports=unsupported_dtype)
    def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _native.cpu.glu_forward(matrix(gate), matrix(up), matrix(y), ACTS[act], torch.get_num_threads())
        return y

    @kernel("glu_backward", backend="native", device="cpu", supports=unsupported_dtype)
    def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
        dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        _native.cpu.glu_backward(
            matrix(dy.contiguous()), matrix(gate), matrix(up), matrix(dgate), matrix(dup),
            ACTS[act], torch.get_num_threads(),
        )  # fmt: skip
        return dgate, dup


if _native.cuda is not None:
    _cuda = _native.cuda
    _CUDA_ACTS = {name: i for i, name in enumerate(_cuda.acts)}

    @kernel("glu", backend="native", device="cuda", supports=unsupported_dtype)
    def glu_cuda(gate: Tensor, up: Tensor, act: str) -> Tensor:
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _cuda.glu_forward(matrix(gate), matrix(up), matrix(y), _CUDA_ACTS[act], current_stream(gate))
        return y

    @kernel("glu_backward", backend="native", device="cuda", supports=unsupported_dtype)
    def glu_backward_cuda(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
        dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        _cuda.glu_backward(
            matrix(dy.contiguous()), matrix(gate), matrix(up), matrix(dgate), matrix(dup),
            _CUDA_ACTS[act], current_stream(gate),
        )  # fmt: skip
        return dgate, dup
