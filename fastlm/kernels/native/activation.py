"""gelu, silu, sigmoid and tanh in C++: csrc/cpu/activation.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import as_laid_out, flat, unsupported_dtype

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
