"""glu(gate, up) = act(gate) * up: gate and up (..., N) of one shape, floating point. Both are saved, by reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._activations import ACTIVATIONS, GRADIENTS, SAVE_OUTPUT, check_activation
from fastlm._checks import ArgumentError, check_device, check_floating_point, check_same_dtype
from fastlm._library import define_op, left_to_torch, small

# Elements up to which plain torch is as fast.
_SMALL = small(1 << 16, 1 << 17)


def glu_reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return (ACTIVATIONS[act](gate) * up).contiguous()


def glu_backward_reference(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    value = ACTIVATIONS[act](gate)
    dgate = GRADIENTS[act](dy * up, value if act in SAVE_OUTPUT else gate)
    return dgate.contiguous(), (dy * value).contiguous()


def _arguments(gate: Tensor, up: Tensor, act: str = "silu") -> tuple:
    for name, t in (("gate", gate), ("up", up)):
        check_floating_point("fastlm.glu", name, t)
    check_activation("fastlm.glu", act)
    if gate.shape != up.shape or gate.dim() < 1:
        raise ArgumentError(
            f"fastlm.glu: gate and up must have one shape (..., N), got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    check_same_dtype("fastlm.glu", "up", up, "gate", gate)
    check_device("fastlm.glu", "up", up, "gate", gate)
    return gate, up, act


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _samples(device: str) -> list[tuple]:
    x = torch.linspace(-4, 4, 1001, device=device).view(7, 143)
    return [(x, x.flip(0), act) for act in ACTIVATIONS]


define_op(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str act) -> (Tensor dgate, Tensor dup)",
    reference=glu_backward_reference,
    fake=lambda dy, gate, up, act: (_contiguous_like(gate), _contiguous_like(up)),
    samples=lambda device: [(gate.flip(1), gate, up, act) for gate, up, act in _samples(device)],
    sharding="*, *, * -> *, *",
)
_glu = define_op(
    "glu(Tensor gate, Tensor up, str act='silu') -> Tensor",
    reference=glu_reference,
    fake=lambda gate, up, act: _contiguous_like(gate),
    samples=_samples,
    save=lambda args, y: args,
    backward=lambda ops, saved, wanted, dy: (*ops.glu_backward(dy, *saved), None),
    autocast=lambda dtype, args: (args[0], args[1].to(args[0].dtype), args[2]),
    arguments=_arguments,
    sharding="*, * -> *",
)


def glu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up, a gated linear unit (Shazeer 2020, https://arxiv.org/abs/2002.05202), in one pass over memory.

    Args:
        gate: (..., N), floating point; a half of one product, such as ``x.chunk(2, -1)`` gives, is not copied.
        up: the same shape, dtype and device.
        act: silu (SwiGLU), gelu or gelu_tanh (GEGLU), relu (ReGLU), sigmoid, tanh, relu_squared, or none.

    Returns:
        A contiguous tensor of that shape and dtype.

    Raises:
        ValueError: an unknown act, shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    if left_to_torch(gate, _SMALL):
        try:
            if gate.dim() > 0 and gate.shape == up.shape and gate.dtype == up.dtype and up.is_cpu:
                return glu_reference(gate, up, act)
        except Exception:
            pass  # is said below
    return _glu.pointwise(*_arguments(gate, up, act))
