"""mse_loss(input, target) = mean (input - target)^2, in one pass each way: input and target of one shape and dtype.

The op gives the sum of squares, 0-d, float32 (float64 for float64), summed in double across runs of 4,096; what divides
it by the number of elements is plain torch. Saved: both inputs, by reference. Under autocast both go to float32, as in
torch.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm._checks import ArgumentError, autocast_on, check_device, check_floating_point
from fastlm._library import define_op, left_to_torch, small

_SMALL = small(1 << 18, 0)  # elements up to which torch's is as fast; in 16 bits it rounds the squares to 16 bits
_REDUCTIONS = ("mean", "sum", "none")


def mse_loss_reference(x: Tensor, target: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - target.to(wide)).square().sum()


def mse_loss_backward_reference(g: Tensor, x: Tensor, target: Tensor) -> Tensor:
    return (2 * g * (x.to(g.dtype) - target.to(g.dtype))).to(x.dtype).contiguous()


def _samples(device: str) -> list[tuple]:
    ramp = torch.linspace(-2, 3, 9001, device=device)
    return [(ramp.sin().to(dtype), ramp.cos().to(dtype)) for dtype in (torch.float32, torch.bfloat16)]


define_op(
    "mse_loss_backward(Tensor g, Tensor x, Tensor target) -> Tensor",
    reference=mse_loss_backward_reference,
    fake=lambda g, x, target: torch.empty_like(x, memory_format=torch.contiguous_format),
    samples=lambda device: [(torch.tensor(0.3, device=device), *sample) for sample in _samples(device)],
    sharding=", *, * -> *",
)


def _backward(ops, saved, wanted, g):
    dx = ops.mse_loss_backward(g, *saved)
    return (dx if wanted[0] else None, -dx if wanted[1] else None)


def _checked(
    input: Tensor, target: Tensor, size_average: bool | None, reduce: bool | None, reduction: str, weight: Tensor | None
) -> tuple[Tensor, Tensor, str]:
    """input and target of one shape, and the reduction."""
    op = "fastlm.mse_loss"
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    check_floating_point(op, "input", input)
    check_floating_point(op, "target", target)
    check_device(op, "target", target, "input", input)
    if reduction not in _REDUCTIONS:
        raise ArgumentError(f"{op}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if weight is not None:
        check_floating_point(op, "weight", weight)
        check_device(op, "weight", weight, "input", input)
        if weight.shape != input.shape:
            raise ArgumentError(
                f"{op}: weight must be of input's shape, {tuple(input.shape)}, got {tuple(weight.shape)}"
            )
    if target.shape != input.shape:
        shapes = f"input {tuple(input.shape)} and target {tuple(target.shape)}"
        try:
            input, target = torch.broadcast_tensors(input, target)
        except RuntimeError:
            raise ArgumentError(f"{op}: shapes must broadcast, got {shapes}") from None
        warnings.warn(f"{op}: {shapes} are broadcast, which is seldom what is meant", stacklevel=3)
    return input, target, reduction


def _arguments(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    input, target, _ = _checked(input, target, size_average, reduce, reduction, weight)
    dtype = torch.promote_types(input.dtype, target.dtype)
    return input.to(dtype), target.to(dtype)


_mse_loss = define_op(
    "mse_loss(Tensor x, Tensor target) -> Tensor",
    reference=mse_loss_reference,
    fake=lambda x, target: x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)),
    samples=_samples,
    backward=_backward,
    arguments=_arguments,
    autocast=lambda dtype, args: tuple(t if t.dtype == torch.float64 else t.float() for t in args),
    sharding="*, * -> +*",
)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.mse_loss``, whose arguments and meanings these are.

    Args:
        input, target: of any shape, floating point. Of different shapes they are broadcast, with a warning.
        reduction: mean, sum or none; size_average and reduce are its older names in torch.
        weight: of input's shape, a factor of each square; the mean is then divided by its sum.

    Returns:
        0-d, or with reduction none of the inputs' shape; of the dtype that input and target have together, float32
        under autocast. With a weight or without a reduction it is torch's own.

    Raises:
        ValueError: sizes, devices or options that do not fit. TypeError: dtypes that do not fit.
    """
    input, target, reduction = _checked(input, target, size_average, reduce, reduction, weight)
    if weight is not None:
        squares = F.mse_loss(input, target, reduction="none") * weight
        return squares if reduction == "none" else squares.sum() / (weight.sum() if reduction == "mean" else 1)
    if reduction == "none" or (input.dtype == target.dtype and left_to_torch(input, _SMALL)):
        return F.mse_loss(input, target, reduction=reduction)
    dtype = torch.promote_types(input.dtype, target.dtype)
    total = _mse_loss(input.to(dtype), target.to(dtype))
    loss = total / input.numel() if reduction == "mean" else total
    return loss if autocast_on(input.device) else loss.to(dtype)
