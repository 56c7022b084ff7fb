"""relu and squared relu in C++: csrc/cpu/relu.cpp."""

from __future__ import annotations

from torch import Tensor, empty_like, get_num_threads

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels.native._common import as_laid_out

if _native.cpu is not None:
    _forward, _backward = _native.cpu.relu_forward, _native.cpu.relu_backward

    @kernel("relu", backend="native", device="cpu")
    def relu(x: Tensor) -> Tensor:
        y = empty_like(x)
        _forward(x if x.is_contiguous() else as_laid_out(x, y), y, False, get_num_threads())
        return y

    @kernel("relu_squared", backend="native", device="cpu")
    def relu_squared(x: Tensor) -> Tensor:
        y = empty_like(x)
        _forward(x if x.is_contiguous() else as_laid_out(x, y), y, True, get_num_threads())
        return y

    def _gradient(dy: Tensor, saved: Tensor, squared: bool) -> Tensor:
        dx = empty_like(saved)
        _backward(as_laid_out(dy, dx), as_laid_out(saved, dx), dx, squared, get_num_threads())
        return dx

    @kernel("relu_backward", backend="native", device="cpu")
    def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
        return _gradient(dy, y, False)

    @kernel("relu_squared_backward", backend="native", device="cpu")
    def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
        return _gradient(dy, x, True)
