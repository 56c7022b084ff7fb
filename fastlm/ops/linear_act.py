"""linear_act(x, weight, bias) = act(x weight' + bias): x (..., K), weight (N, K), bias (N,), floating point.

Saved, by reference: x and weight; and y where the gradient of act follows from it (none, relu, sigmoid, tanh), else the
product u, which is written beside y where a gradient will be asked for. Under autocast all three go to the lower
precision, as in torch.nn.functional.linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm._activations import ACTIVATIONS, GRADIENTS, SAVE_OUTPUT, check_activation
from fastlm._checks import ArgumentError, autocast_on, check_device, check_floating_point, check_same_dtype
from fastlm._library import backend_is_free, define_op, left_to_torch, small, small_product

# Multiplications below which a layer is left to plain torch: the op costs what it saves (`fastlm bench linear_sweep`).
_SMALL = small_product(1 << 25, 1 << 27)
_SMALL_ELSEWHERE = small(1 << 25, 1 << 27)  # on devices whose products do not depend on this CPU


def linear_act_reference(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, keep: bool) -> tuple[Tensor, Tensor]:
    u = F.linear(x, weight, bias)
    return ACTIVATIONS[act](u), u.clone() if _keeps(act, keep) else u.new_empty(0)


def _keeps(act: str, keep: bool) -> bool:
    return keep and act not in SAVE_OUTPUT


def linear_act_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, act: str, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    du = GRADIENTS[act](dy, saved)
    products = (lambda: du @ weight, lambda: du.mT @ x, lambda: du.sum(0))
    return tuple(run().contiguous() if want else dy.new_empty(0) for run, want in zip(products, wanted, strict=True))


def _fake(x, weight, bias, act, keep):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if _keeps(act, keep) else x.new_empty(0)


def _fake_backward(dy, x, weight, saved, act, wanted):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(dy.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _save(args, outputs):
    x, weight, bias, act, keep = args
    y, u = outputs
    saved = y if act in SAVE_OUTPUT else u if keep else None
    return (x, weight, bias, act, saved)


def _backward(ops, saved, wanted, dy, du):
    x, weight, bias, act, at = saved
    if at is None:  # it was said that no gradient would be asked for
        at = ops.linear_act(x, weight, bias, "none", False)[0]
    found = None
    if dy is not None:
        found = ops.linear_act_backward(dy, x, weight, at, act, wanted[:3])
    if du is not None and du.numel() == at.numel():
        more = ops.linear_act_backward(du, x, weight, at, "none", wanted[:3])
        found = more if found is None else tuple(a + b for a, b in zip(found, more, strict=True))
    if found is None:
        return (None,) * 5
    return (*(g if want else None for g, want in zip(found, wanted, strict=False)), None, None)


def _autocast(dtype, args):
    # As torch: float64 stays.
    return (*(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in args[:3]), *args[3:])


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "relu") -> tuple:
    op = "fastlm.linear_act"
    check_activation(op, act)
    given = [(name, t) for name, t in (("x", x), ("weight", weight), ("bias", bias)) if name != "bias" or t is not None]
    for name, t in given:
        check_floating_point(op, name, t)
        check_same_dtype(op, name, t, "x", x)
        check_device(op, name, t, "x", x)
    if weight.dim() != 2:
        raise ArgumentError(f"{op}: weight must be (N, K), got {tuple(weight.shape)}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ArgumentError(f"{op}: x must be (..., K) for weight (N, K) = {(N, K)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ArgumentError(f"{op}: bias must be (N,) = ({N},), got {tuple(bias.shape)}")
    keep = torch.is_grad_enabled() and any(t.requires_grad for _, t in given)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), K)
    return rows, weight, bias, act, keep


def _samples(device: str) -> list[tuple]:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        ramp = torch.linspace(-2, 2, 65 * 40, device=device)
        x, weight = (torch.sin(ramp * f).view(-1, 40).to(dtype) for f in (311, 173))
        made += [(x[:33], weight, weight[:, 0].contiguous(), act, True) for act in ACTIVATIONS]
    return made


def _samples_backward(device: str) -> list[tuple]:
    made = []
    for x, weight, bias, act, keep in _samples(device):
        y, u = linear_act_reference(x, weight, bias, act, keep)
        made.append((y.flip(0), x, weight, y if act in SAVE_OUTPUT else u, act, [True] * 3))
    return made


def _sharding(x, weight, bias, act, keep):
    if act == "none":  # the only one that can take a part of the sum
        return "mk, nk, n+k -> mn+k, "
    return f"mK, nK, n -> mn, {'mn' if _keeps(act, keep) else ''}"


def _sharding_backward(*args):
    outputs = (name if w else "" for name, w in zip(("mk+n", "nk+m", "n+m"), args[-1], strict=True))
    return f"mn, mk, nk, mn -> {', '.join(outputs)}"


define_op(
    "linear_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor saved, str act, bool[] wanted) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=linear_act_backward_reference,
    fake=_fake_backward,
    samples=_samples_backward,
    flops=lambda dy, x, weight, saved, act, wanted: 2 * x.numel() * weight.shape[0] * sum(wanted[:2]),
    sharding=_sharding_backward,
)
_linear_act = define_op(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str act, bool keep) -> (Tensor y, Tensor u)",
    reference=linear_act_reference,
    fake=_fake,
    samples=_samples,
    save=_save,
    backward=_backward,
    autocast=_autocast,
    arguments=_arguments,
    flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
    sharding=_sharding,
)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "relu") -> Tensor:
    """act(x weight' + bias): ``torch.nn.functional.linear`` with the activation after it, in one op.

    Float32 products use TF32 on a GPU where ``torch.backends.cuda.matmul`` allows it, as torch's do.

    Args:
        x: (..., K), floating point.
        weight: (N, K), of x's dtype and device.
        bias: (N,), likewise.
        act: none, relu, relu_squared, gelu, gelu_tanh, silu, sigmoid or tanh.

    Returns:
        (..., N), contiguous, of x's dtype; under autocast of the lower precision.

    Raises:
        ValueError: an unknown act, sizes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    try:
        N, _ = weight.shape
        fits = bias is None or (bias.shape == (N,) and bias.dtype == x.dtype and bias.is_cpu)
        if fits and weight.is_cpu and left_to_torch(x, _SMALL, N):
            return ACTIVATIONS[act](F.linear(x, weight, bias))
    except Exception:
        pass  # is said below
    rows, weight, bias, act, keep = _arguments(x, weight, bias, act)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_on(x.device) else x.dtype
    if rows.numel() * weight.shape[0] < (_SMALL if rows.is_cpu else _SMALL_ELSEWHERE)[dtype] and backend_is_free():
        return ACTIVATIONS[act](F.linear(x, weight, bias))
    y, _ = _linear_act(rows, weight, bias, act, keep)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
