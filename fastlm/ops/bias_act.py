"""bias_act(x, bias) = dropout(act(x + bias)): x (..., N), bias (N,), floating point.

Without dropout, none, relu, sigmoid and tanh save their output, which the next layer keeps anyway; every other form its
inputs, by reference.
Under autocast the bias follows x, which comes from a product that autocast has already put into the lower precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._activations import ACTIVATIONS, GRADIENTS, SAVE_OUTPUT, check_activation
from fastlm._checks import ArgumentError, check_device, check_dropout, check_floating_point, check_same_dtype
from fastlm._dropout import check_seed, draw_seed, keep_mask
from fastlm._library import define_op, left_to_torch, small

# Elements up to which plain torch is as fast, and with which activations.
_SMALL = small(1 << 17, 1 << 18)
_CHEAP = frozenset({"none", "relu", "relu_squared", "silu", "sigmoid"})


def bias_act_reference(x: Tensor, bias: Tensor, act: str, dropout_p: float, seed: Tensor | None) -> Tensor:
    y = ACTIVATIONS[act](x + bias)
    if dropout_p > 0:
        y = torch.where(keep_mask(tuple(y.shape), dropout_p, seed), y / (1 - dropout_p), 0)
    return y.contiguous()


def bias_act_backward_reference(dy: Tensor, saved: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor]:
    dx = GRADIENTS[act](dy, saved if act in SAVE_OUTPUT else saved + bias)
    dx = dx.clone() if act == "none" else dx  # an op's output is no argument of it
    return dx.contiguous(), dx.sum_to_size(bias.shape).contiguous()


def _save(args, y):
    x, bias, act, dropout_p, seed = args
    if act in SAVE_OUTPUT and dropout_p == 0:
        return (y, torch.empty_like(bias), act, dropout_p, seed)  # of the bias no more than its size is needed
    return (x, bias, act, dropout_p, seed)


def _backward(ops, saved, wanted, dy):
    at, bias, act, dropout_p, seed = saved
    if dropout_p > 0:
        dy = ops.dropout(dy, dropout_p, seed)
        if act in SAVE_OUTPUT:  # from which dropout has taken a part
            at = ops.bias_act(at, bias, act, 0.0, None)
    return ops.bias_act_backward(dy, at, bias, act)


def _arguments(x: Tensor, bias: Tensor, act: str = "relu", dropout_p: float = 0.0, seed: Tensor | None = None) -> tuple:
    for name, t in (("x", x), ("bias", bias)):
        check_floating_point("fastlm.bias_act", name, t)
    check_activation("fastlm.bias_act", act)
    check_dropout("fastlm.bias_act", dropout_p)
    if x.dim() < 1 or bias.shape != x.shape[-1:]:
        raise ArgumentError(
            f"fastlm.bias_act: bias must be (N,) for x (..., N) = {tuple(x.shape)}, got {tuple(bias.shape)}"
        )
    check_same_dtype("fastlm.bias_act", "bias", bias, "x", x)
    check_device("fastlm.bias_act", "bias", bias, "x", x)
    check_seed("fastlm.bias_act", seed, x.device)
    if dropout_p > 0 and seed is None:
        seed = draw_seed("fastlm.bias_act", x)
    return x, bias, act, dropout_p, seed if dropout_p > 0 else None


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _samples(device: str) -> list[tuple]:
    x = torch.linspace(-2, 2, 1001, device=device).view(7, 143)
    return [(x, x[3].flip(0).contiguous(), act, 0.0, None) for act in ACTIVATIONS]


define_op(
    "bias_act_backward(Tensor dy, Tensor saved, Tensor bias, str act) -> (Tensor dx, Tensor dbias)",
    reference=bias_act_backward_reference,
    fake=lambda dy, saved, bias, act: (_contiguous_like(saved), _contiguous_like(bias)),
    samples=lambda device: [(x.flip(0), x, bias, act) for x, bias, act, _, _ in _samples(device)],
    sharding="*n, *n, n -> *n, n+*",
)
_bias_act = define_op(
    "bias_act(Tensor x, Tensor bias, str act='relu', float dropout_p=0.0, Tensor? seed=None) -> Tensor",
    reference=bias_act_reference,
    fake=lambda x, bias, act, dropout_p, seed: _contiguous_like(x),
    samples=_samples,
    save=_save,
    backward=_backward,
    autocast=lambda dtype, args: (args[0], args[1].to(args[0].dtype), *args[2:]),
    arguments=_arguments,
    # What is dropped depends on an element's number in the whole.
    sharding=lambda x, bias, act, dropout_p, seed: None if dropout_p > 0 else "*n, n, -> *n",
)


def _fits(bias: Tensor, x: Tensor) -> bool:
    return bias.shape == x.shape[-1:] and bias.dtype == x.dtype and bias.is_cpu


def bias_act(x: Tensor, bias: Tensor, act: str = "relu", dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """act(x + bias), then dropout, in one pass over memory.

    Args:
        x: (..., N), floating point.
        bias: (N,), of x's dtype and device.
        act: none, relu, relu_squared, gelu, gelu_tanh, silu, sigmoid or tanh.
        dropout_p: probability in [0, 1) of setting an element to 0; the others are divided by 1 - dropout_p.
        seed: 0-d int64 tensor that decides the mask; drawn from torch's generator where not given.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: an unknown act, a dropout_p outside [0, 1), sizes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    if seed is None and left_to_torch(x, _SMALL):
        try:
            if act in _CHEAP and type(dropout_p) is float and dropout_p == 0 and x.dim() > 0 and _fits(bias, x):
                return bias_act_reference(x, bias, act, 0.0, None)
        except Exception:
            pass  # is said below
    return _bias_act.pointwise(*_arguments(x, bias, act, dropout_p, seed))
