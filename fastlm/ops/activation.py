"""gelu, silu, sigmoid and tanh, elementwise, any shape, floating point.

gelu(x) = x Φ(x), Φ the normal distribution, or its tanh approximation; silu(x) = x sigmoid(x). sigmoid and tanh save
their output, which the next layer keeps anyway; gelu and silu their input, by reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm._activations import ACTIVATIONS, GRADIENTS, SAVE_OUTPUT
from fastlm._checks import ArgumentError, check_floating_point, check_tensor
from fastlm._library import define_op, left_to_torch, small

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by `approximate`


def gelu_reference(x: Tensor, approximate: str) -> Tensor:
    check_floating_point("fastlm.gelu", "x", x)
    return ACTIVATIONS[_GELU[approximate]](x)


def gelu_backward_reference(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return GRADIENTS[_GELU[approximate]](dy, x)


def _samples(device: str, *more: object) -> list[tuple]:
    dtypes = (torch.float32, torch.bfloat16)
    return [(torch.linspace(-4, 4, 1001, device=device, dtype=dtype), *more) for dtype in dtypes]


def _samples_backward(device: str, *more: object) -> list[tuple]:
    return [(x.flip(0), x, *more) for (x,) in _samples(device)]


def _samples_gelu(samples):
    return lambda device: [args for a in _GELU for args in samples(device, a)]


define_op(
    "gelu_backward(Tensor dy, Tensor x, str approximate) -> Tensor",
    reference=gelu_backward_reference,
    fake=lambda dy, x, approximate: torch.empty_like(x),
    samples=_samples_gelu(_samples_backward),
    sharding="*, * -> *",
)
_gelu = define_op(
    "gelu(Tensor x, str approximate='none') -> Tensor",
    reference=gelu_reference,
    fake=lambda x, approximate: torch.empty_like(x),
    samples=_samples_gelu(_samples),
    save=lambda args, y: args,
    backward=lambda ops, saved, wanted, dy: (ops.gelu_backward(dy, *saved), None),
    sharding="* -> *",
)


def _define(name: str):
    def reference(x: Tensor) -> Tensor:
        check_floating_point(f"fastlm.{name}", "x", x)
        return ACTIVATIONS[name](x)

    def backward_reference(dy: Tensor, saved: Tensor) -> Tensor:
        return GRADIENTS[name](dy, saved)

    define_op(
        f"{name}_backward(Tensor dy, Tensor saved) -> Tensor",
        reference=backward_reference,
        fake=lambda dy, saved: torch.empty_like(saved),
        samples=_samples_backward,
        sharding="*, * -> *",
    )
    return define_op(
        f"{name}(Tensor x) -> Tensor",
        reference=reference,
        fake=torch.empty_like,
        samples=_samples,
        save=lambda args, y: (y,) if name in SAVE_OUTPUT else args,
        backward=lambda ops, saved, wanted, dy: (getattr(ops, f"{name}_backward")(dy, *saved),),
        sharding="* -> *",
    ).unary()


# Elements up to which torch's are as fast.
_SMALL, _SMALL_SILU = small(1 << 14, 1 << 16), small(1 << 17, 1 << 17)
_silu, _sigmoid, _tanh = map(_define, ("silu", "sigmoid", "tanh"))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Φ(x), elementwise, Φ the normal distribution (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415).

    Args:
        x: any shape, floating point.
        approximate: none, or tanh: 0.5 x (1 + tanh(sqrt(2 / π) (x + 0.044715 x^3))).

    Returns:
        A tensor of x's shape, dtype and strides.

    Raises:
        ValueError: an unknown approximation.
        TypeError: x is not floating point.

    Under torch.compile it becomes torch's gelu, so that Inductor fuses it with its neighbours.
    """
    check_tensor("fastlm.gelu", "x", x)
    if approximate not in _GELU:
        raise ArgumentError(f"fastlm.gelu: approximate must be one of {', '.join(_GELU)}, got {approximate!r}")
    return _gelu.pointwise(x, approximate)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), elementwise, also called swish (Ramachandran et al. 2017, https://arxiv.org/abs/1710.05941).

    Args:
        x: any shape, floating point.

    Returns:
        A tensor of x's shape, dtype and strides.

    Raises:
        TypeError: x is not floating point.

    Under torch.compile it becomes torch's silu, so that Inductor fuses it with its neighbours.
    """
    return F.silu(x) if left_to_torch(x, _SMALL_SILU) else _silu(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise.

    Args:
        x: any shape, floating point.

    Returns:
        A tensor of x's shape, dtype and strides.

    Raises:
        TypeError: x is not floating point.

    Under torch.compile it becomes torch.sigmoid, so that Inductor fuses it with its neighbours.
    """
    return torch.sigmoid(x) if left_to_torch(x, _SMALL) else _sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent, elementwise.

    Args:
        x: any shape, floating point.

    Returns:
        A tensor of x's shape, dtype and strides.

    Raises:
        TypeError: x is not floating point.

    Under torch.compile it becomes torch.tanh, so that Inductor fuses it with its neighbours.
    """
    return torch.tanh(x) if left_to_torch(x, _SMALL) else _tanh(x)
