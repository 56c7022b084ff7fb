"""relu and squared relu in C++: csrc/cpu/activation.cpp, csrc/cuda/activation.cu."""

from __future__ import annotations

from torch import Tensor, empty_like, get_num_threads

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels.native._common import act_backward_on_gpu, act_on_gpu, current_stream

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
    _CUDA_RELU, _CUDA_RELU_SQUARED = _cuda.acts.index("relu"), _cuda.acts.index("relu_squared")

    @kernel("relu", backend="native", device="cuda")
    def relu_cuda(x: Tensor) -> Tensor:
        return act_on_gpu(_cuda, current_stream(x), x, _CUDA_RELU)

    @kernel("relu_squared", backend="native", device="cuda")
    def relu_squared_cuda(x: Tensor) -> Tensor:
        return act_on_gpu(_cuda, current_stream(x), x, _CUDA_RELU_SQUARED)

    @kernel("relu_backward", backend="native", device="cuda")
    def relu_backward_cuda(dy: Tensor, y: Tensor) -> Tensor:
        return act_backward_on_gpu(_cuda, current_stream(y), dy, y, _CUDA_RELU)

    @kernel("relu_squared_backward", backend="native", device="cuda")
    def relu_squared_backward_cuda(dy: Tensor, x: Tensor) -> Tensor:
        return act_backward_on_gpu(_cuda, current_stream(x), dy, x, _CUDA_RELU_SQUARED)
