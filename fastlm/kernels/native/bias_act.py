"""act(x + bias) in C++: csrc/cpu/activation.cpp, csrc/cuda/activation.cu and dropout.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.native._common import bias_act_backward_on_gpu, current_stream

if _native.cpu is not None:
    from fastlm.kernels.native.activation import ACTS

    @kernel("bias_act", backend="native", device="cpu", supports=unsupported_dtype)
    def bias_act(x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None) -> Tensor:
        x, bias = x.contiguous(), bias.contiguous()
        y = torch.empty_like(x)
        number = seed.item() % 2**64 if dropout_p > 0 else 0
        _native.cpu.bias_act_forward(x, bias, y, ACTS[act], dropout_p, number, torch.get_num_threads())
        return y

    @kernel("bias_act_backward", backend="native", device="cpu", supports=unsupported_dtype)
    def bias_act_backward(dy: Tensor, saved: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor]:
        dy, saved, bias = dy.contiguous(), saved.contiguous(), bias.contiguous()
        dx = torch.empty_like(saved)
        sums = torch.empty_like(bias, dtype=torch.float64 if bias.dtype == torch.float64 else torch.float32)
        _native.cpu.bias_act_backward(dy, saved, bias, dx, sums, ACTS[act], torch.get_num_threads())
        return dx, sums.to(bias.dtype)


if _native.cuda is not None:
    _cuda = _native.cuda
    _CUDA_ACTS = {name: i for i, name in enumerate(_cuda.acts)}

    @kernel("bias_act", backend="native", device="cuda", supports=unsupported_dtype)
    def bias_act_cuda(x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None) -> Tensor:
        x, bias = x.contiguous(), bias.contiguous()
        y = torch.empty_like(x)
        _cuda.bias_act_forward(x, bias, y, _CUDA_ACTS[act], current_stream(x))
        if dropout_p > 0:
            _cuda.dropout(y, y, dropout_p, seed, current_stream(x))
        return y

    @kernel("bias_act_backward", backend="native", device="cuda", supports=unsupported_dtype)
    def bias_act_backward_cuda(dy: Tensor, saved: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor]:
        dy, saved, bias = dy.contiguous(), saved.contiguous(), bias.contiguous()
        dx, sums = bias_act_backward_on_gpu(_cuda, current_stream(saved), dy, saved, bias, _CUDA_ACTS[act])
        return dx, sums.to(bias.dtype)
