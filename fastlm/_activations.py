"""The activations that ops apply, by name, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# Those whose gradient is computed from the output, which the next layer keeps anyway, the others' from the input.
SAVE_OUTPUT = frozenset({"none", "relu", "sigmoid", "tanh"})


def _gelu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return dy * (0.5 * torch.special.erfc(-x / math.sqrt(2)) + x * density)


def _gelu_tanh_gradient(dy: Tensor, x: Tensor) -> Tensor:
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.square())
    return dy * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * slope)


def _silu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return dy * (s * (1 + x * (1 - s)))


# (dy, what was saved) -> dx
GRADIENTS = {
    "none": lambda dy, x: dy,
    "relu": lambda dy, y: torch.where(y <= 0, 0, dy),
    "relu_squared": lambda dy, x: torch.where(x <= 0, 0, dy * (2 * x)),
    "gelu": _gelu_gradient,
    "gelu_tanh": _gelu_tanh_gradient,
    "silu": _silu_gradient,
    "sigmoid": lambda dy, y: dy * ((1 - y) * y),
    "tanh": lambda dy, y: dy * (1 - y.square()),
}


def check_activation(op: str, act: str) -> None:
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
