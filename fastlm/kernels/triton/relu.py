"""relu and squared relu in Triton: activation.py."""

from __future__ import annotations

from torch import Tensor

from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.triton._common import triton_kernel
from fastlm.kernels.triton.activation import gradient, value


@triton_kernel("relu", unsupported_dtype)
def relu(x: Tensor) -> Tensor:
    return value(x, "relu")


@triton_kernel("relu_squared", unsupported_dtype)
def relu_squared(x: Tensor) -> Tensor:
    return value(x, "relu_squared")


@triton_kernel("relu_backward", unsupported_dtype)
def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    return gradient(dy, y, "relu")


@triton_kernel("relu_squared_backward", unsupported_dtype)
def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    return gradient(dy, x, "relu_squared")
