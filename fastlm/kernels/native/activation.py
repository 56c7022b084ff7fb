"""gelu, silu, sigmoid and tanh in C++: csrc/cpu/activation.cpp, csrc/cuda/activation.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import as_laid_out, flat, unsupported_dtype
from fastlm.kernels.native._common import act_backward_on_gpu, act_on_gpu, current_stream

if _native.cpu is not None:
    ACTS = {name: i for i, name in enumerate(_native.cpu.acts)}
    _forward, _backward = _native.cpu.act_forward, _native.cpu.act_backward
    _GELU = {"none": ACTS["gelu"], "tanh": ACTS["gelu_tanh"]}

    def value(x: Tensor, act: int) -> Tensor:
        y = torch.empty_like(x)
        if x.is_contiguous():
            _forward(x, y, act, torch.get_num_threads())
        else:
            _forward(flat(as_laid_out(x, y)), flat(y), act, torch.get_num_threads())
        return y

    def gradient(dy: Tensor, saved: Tensor, act: int) -> Tensor:
        dx = torch.empty_like(saved)
        if dy.is_contiguous() and saved.is_contiguous():
            _backward(dy, saved, dx, act, torch.get_num_threads())
        else:
            dy, saved = flat(as_laid_out(dy, dx)), flat(as_laid_out(saved, dx))
            _backward(dy, saved, flat(dx), act, torch.get_num_threads())
        return dx

    @kernel("gelu", backend="native", device="cpu", supports=unsupported_dtype)
    def gelu(x: Tensor, approximate: str) -> Tensor:
        return value(x, _GELU[approximate])

    @kernel("gelu_backward", backend="native", device="cpu", supports=unsupported_dtype)
    def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
        return gradient(dy, x, _GELU[approximate])

    def _register(name: str) -> None:
        act = ACTS[name]
        kernel(name, backend="native", device="cpu")(lambda x: value(x, act))
        kernel(f"{name}_backward", backend="native", device="cpu")(lambda dy, saved: gradient(dy, saved, act))

    for _name in ("silu", "sigmoid", "tanh"):
        _register(_name)


if _native.cuda is not None:
    _cuda = _native.cuda
    _CUDA_ACTS = {name: i for i, name in enumerate(_cuda.acts)}
    _CUDA_GELU = {"none": _CUDA_ACTS["gelu"], "tanh": _CUDA_ACTS["gelu_tanh"]}

    @kernel("gelu", backend="native", device="cuda", supports=unsupported_dtype)
    def gelu_cuda(x: Tensor, approximate: str) -> Tensor:
        return act_on_gpu(_cuda, current_stream(x), x, _CUDA_GELU[approximate])

    @kernel("gelu_backward", backend="native", device="cuda", supports=unsupported_dtype)
    def gelu_backward_cuda(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
        return act_backward_on_gpu(_cuda, current_stream(x), dy, x, _CUDA_GELU[approximate])

    def _register_cuda(name: str) -> None:
        act = _CUDA_ACTS[name]

        @kernel(name, backend="native", device="cuda")
        def forward(x: Tensor) -> Tensor:
            return act_on_gpu(_cuda, current_stream(x), x, act)

        @kernel(f"{name}_backward", backend="native", device="cuda")
        def backward(dy: Tensor, saved: Tensor) -> Tensor:
            return act_backward_on_gpu(_cuda, current_stream(saved), dy, saved, act)

    for _name in ("silu", "sigmoid", "tanh"):
        _register_cuda(_name)
