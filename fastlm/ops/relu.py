"""relu(x) = max(x, 0) and relu_squared(x) = max(x, 0)^2, elementwise, any shape, floating point.

relu saves its output, which the next layer keeps anyway; relu_squared its input, by reference: from its output the
gradient cannot be rebuilt, since squaring underflows and overflows. NaN stays NaN and passes its gradient, as in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._activations import ACTIVATIONS, GRADIENTS
from fastlm._checks import check_floating_point
from fastlm._library import define_op, left_to_torch, small


def relu_reference(x: Tensor) -> Tensor:
    check_floating_point("fastlm.relu", "x", x)
    return torch.relu(x)


def relu_backward_reference(dy: Tensor, y: Tensor) -> Tensor:
    return GRADIENTS["relu"](dy, y)


def relu_squared_reference(x: Tensor) -> Tensor:
    check_floating_point("fastlm.relu_squared", "x", x)
    return ACTIVATIONS["relu_squared"](x)


def relu_squared_backward_reference(dy: Tensor, x: Tensor) -> Tensor:
    return GRADIENTS["relu_squared"](dy, x)


def _samples(device: str) -> list[tuple]:
    return [(torch.linspace(-2, 2, 1001, device=device, dtype=dtype),) for dtype in (torch.float32, torch.bfloat16)]


def _samples_backward(device: str) -> list[tuple]:
    return [(x.flip(0), x) for (x,) in _samples(device)]


def _fake_backward(dy: Tensor, saved: Tensor) -> Tensor:
    return torch.empty_like(saved)


define_op(
    "relu_backward(Tensor dy, Tensor y) -> Tensor",
    reference=relu_backward_reference,
    fake=_fake_backward,
    samples=_samples_backward,
    sharding="*, * -> *",
)
_relu = define_op(
    "relu(Tensor x) -> Tensor",
    reference=relu_reference,
    fake=torch.empty_like,
    samples=_samples,
    save=lambda args, y: (y,),
    backward=lambda ops, saved, wanted, dy: (ops.relu_backward(dy, *saved),),
    sharding="* -> *",
)
define_op(
    "relu_squared_backward(Tensor dy, Tensor x) -> Tensor",
    reference=relu_squared_backward_reference,
    fake=_fake_backward,
    samples=_samples_backward,
    sharding="*, * -> *",
)
_relu_squared = define_op(
    "relu_squared(Tensor x) -> Tensor",
    reference=relu_squared_reference,
    fake=torch.empty_like,
    samples=_samples,
    save=lambda args, y: args,
    backward=lambda ops, saved, wanted, dy: (ops.relu_squared_backward(dy, *saved),),
    sharding="* -> *",
)


# Elements up to which torch's is as fast: in the caches nothing can be saved.
_SMALL, _SMALL_SQUARED = small(1 << 22, 1 << 18), small(1 << 16, 1 << 16)
_fast_relu, _fast_relu_squared = _relu.unary(), _relu_squared.unary()


def relu(x: Tensor) -> Tensor:
    """max(x, 0), elementwise.

    Args:
        x: any shape, floating point.

    Returns:
        A tensor of x's shape and dtype, and of its strides where x is dense.

    Raises:
        TypeError: x is not floating point.

    Under torch.compile it becomes torch.relu, so that Inductor fuses it with its neighbours.
    """
    return torch.relu(x) if left_to_torch(x, _SMALL) else _fast_relu(x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise: the activation of Primer (So et al. 2021, https://arxiv.org/abs/2109.08668).

    Args:
        x: any shape, floating point.

    Returns:
        A tensor of x's shape and dtype, and of its strides where x is dense.

    Raises:
        TypeError: x is not floating point.

    Under torch.compile it becomes plain torch, so that Inductor fuses it with its neighbours.
    """
    return ACTIVATIONS["relu_squared"](x) if left_to_torch(x, _SMALL_SQUARED) else _fast_relu_squared(x)
