"""relu and squared relu in C++: csrc/cpu/activation.cpp, csrc/cuda/relu.cu."""

from __future__ import annotations

from torch import Tensor, empty_like, get_num_threads

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import as_laid_out, flat
from fastlm.kernels.native._common import current_stream

if _native.cpu is not None:
    from fastlm.kernels.native.activation import ACTS, gradient, value

    _RELU, _RELU_SQUARED = ACTS["relu"], ACTS["relu_squared"]
    _forward = _native.cpu.act_forward

    @kernel("relu", backend="native", device="cpu")
    def relu(x: Tensor) -> Tensor:
        if not x.is_contiguous():
            return value(x, _RELU)
        y = empty_like(x)  # spelt out: a call more is felt on 64 elements
        _forward(x, y, _RELU, get_num_threads())
        return y

    @kernel("relu_squared", backend="native", device="cpu")
    def relu_squared(x: Tensor) -> Tensor:
        return value(x, _RELU_SQUARED)

    @kernel("relu_backward", backend="native", device="cpu")
    def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
        return gradient(dy, y, _RELU)

    @kernel("relu_squared_backward", backend="native", device="cpu")
    def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
        return gradient(dy, x, _RELU_SQUARED)


if _native.cuda is not None:
    _cuda = _native.cuda

    def _cuda_output(x: Tensor, squared: bool) -> Tensor:
        y = empty_like(x)
        _cuda.relu_forward(flat(as_laid_out(x, y)), flat(y), squared, current_stream(x))
        return y

    def _cuda_gradient(dy: Tensor, saved: Tensor, squared: bool) -> Tensor:
        dx = empty_like(saved)
        dy, saved = flat(as_laid_out(dy, dx)), flat(as_laid_out(saved, dx))
        _cuda.relu_backward(dy, saved, flat(dx), squared, current_stream(dx))
        return dx

    @kernel("relu", backend="native", device="cuda")
    def relu_cuda(x: Tensor) -> Tensor:
        return _cuda_output(x, False)

    @kernel("relu_squared", backend="native", device="cuda")
    def relu_squared_cuda(x: Tensor) -> Tensor:
        return _cuda_output(x, True)

    @kernel("relu_backward", backend="native", device="cuda")
    def relu_backward_cuda(dy: Tensor, y: Tensor) -> Tensor:
        return _cuda_gradient(dy, y, False)

    @kernel("relu_squared_backward", backend="native", device="cuda")
    def relu_squared_backward_cuda(dy: Tensor, x: Tensor) -> Tensor:
        return _cuda_gradient(dy, x, True)
