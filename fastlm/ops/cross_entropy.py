"""cross_entropy(x, target) = log sum exp(x) - x[target] over rows of classes, holding no probabilities in the forward.

x (R, C) logits, target (R,) classes or (R, C) probabilities. The op gives the loss and the log-sum-exp of each row,
(R,), float32 (float64 for float64), both differentiable, both 0 in a row whose target is ignored; reductions and the
z-loss are plain torch on these. Saved: the logits by reference, and the log-sum-exp. Under autocast the logits keep
their dtype, and the loss is float32 as torch's is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm._checks import autocast_on, check_floating_point, check_number, check_tensor
from fastlm._library import define_op, readable_values

_REDUCTIONS = ("mean", "sum", "none")


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap > 0 else x


def _ignored(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """(R,): which rows do not count. Raises IndexError, as torch does, where a target is no class."""
    if target.is_floating_point():
        return torch.zeros(target.shape[0], dtype=torch.bool, device=target.device)
    ignored = target == ignore_index
    wrong = ((target < 0) | (target >= x.shape[1])) & ~ignored
    if readable_values(wrong.any()) is True:  # elsewhere, gather complains
        raise IndexError(f"fastlm.cross_entropy: a target must be a class, 0 to {x.shape[1] - 1}, or {ignore_index}")
    return ignored


def _weighted_target(x, target, ignored, weight):
    """(R, C): the target as probabilities, times the weight of each class; and that weight."""
    if target.is_floating_point():
        shares = _wide(target)
    else:
        shares = torch.zeros_like(x).scatter(1, torch.where(ignored, 0, target)[:, None], 1.0)
    weight = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)
    return shares * weight, weight


def cross_entropy_reference(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    ignored = _ignored(x, target, ignore_index)
    z = _capped(torch.where(ignored[:, None], 0, _wide(x)), softcap)  # an ignored row may hold anything
    lse = torch.logsumexp(z, dim=1)
    lse = torch.where(lse == math.inf, math.nan, lse)  # inf - inf, as in torch
    if target.is_floating_point() or weight is not None:
        shares, weight = _weighted_target(z, target, ignored, weight)
        shares = (1 - label_smoothing) * shares + label_smoothing / x.shape[1] * weight
        losses = (shares * (lse[:, None] - z)).sum(1)
    else:
        losses = lse - z.gather(1, torch.where(ignored, 0, target)[:, None])[:, 0]
        if label_smoothing > 0:
            losses = (1 - label_smoothing) * losses + label_smoothing * (lse[:, None] - z).mean(1)
    return torch.where(ignored, 0, losses), torch.where(ignored, 0, lse)


def cross_entropy_backward_reference(
    g: Tensor, dlse: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float,
) -> Tensor:  # fmt: skip
    ignored = _ignored(x, target, ignore_index)
    z = _capped(torch.where(ignored[:, None], 0, _wide(x)), softcap)
    p = torch.exp(z - lse[:, None])
    shares, weight = _weighted_target(z, target, ignored, weight)
    dz = (1 - label_smoothing) * (p * shares.sum(1, keepdim=True) - shares)
    if label_smoothing > 0:
        dz = dz + label_smoothing * (p * weight.mean() - weight / x.shape[1])
    dz = g[:, None] * dz
    if dlse is not None:
        dz = dz + dlse[:, None] * p
    if softcap > 0:
        dz = dz * (1 - torch.tanh(_wide(x) / softcap).square())
    return torch.where(ignored[:, None], 0, dz).to(x.dtype).contiguous()


def _fake(x, target, weight, ignore_index, label_smoothing, softcap):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:1], dtype=dtype), x.new_empty(x.shape[:1], dtype=dtype)


def _samples(device: str) -> list[tuple]:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        x = (4 * torch.linspace(-9, 9, 7 * 301, device=device).sin()).to(dtype).view(7, 301)
        target = torch.tensor([0, 300, 17, -100, 150, 256, 1], device=device)
        made += [(x, target, None, -100, smoothing, softcap) for smoothing, softcap in ((0.0, 0.0), (0.1, 5.0))]
    return made


def _samples_backward(device: str) -> list[tuple]:
    made = []
    for x, target, weight, *options in _samples(device):
        loss, lse = cross_entropy_reference(x, target, weight, *options)
        made.append((loss.flip(0), lse, x, target, weight, lse, *options))
    return made


define_op(
    "cross_entropy_backward(Tensor g, Tensor? dlse, Tensor x, Tensor target, Tensor? weight, Tensor lse, "
    "int ignore_index, float label_smoothing, float softcap) -> Tensor",
    reference=cross_entropy_backward_reference,
    fake=lambda g, dlse, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    samples=_samples_backward,
)


def _save(args, outputs):
    x, target, weight, *options = args
    return (x, target, weight, outputs[1], *options)


def _backward(ops, saved, wanted, g, dlse):
    if wanted[1] or wanted[2]:
        raise NotImplementedError("fastlm.cross_entropy: the op has no gradient for target and weight")
    g = torch.zeros_like(saved[3]) if g is None else g
    return (ops.cross_entropy_backward(g, dlse, *saved), *[None] * 5)


def _arguments(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple:
    """The schema's arguments from the public ones, checked: rows of classes."""
    op = "fastlm.cross_entropy"
    check_floating_point(op, "input", input)
    check_tensor(op, "target", target)
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        check_number(op, name, value)
    if softcap is not None:
        check_number(op, "softcap", softcap)
        if not 0 < softcap < float("inf"):
            raise ValueError(f"{op}: softcap must be positive and finite, or None, got {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if input.dim() < 1:
        raise ValueError(f"{op}: input must be (C,), (N, C) or (N, C, ...), got {tuple(input.shape)}")
    C = input.shape[min(input.dim() - 1, 1)]
    probabilities = target.is_floating_point()
    if probabilities:
        expected = input.shape
    elif target.dtype in (torch.int64, torch.uint8):
        expected = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
        target = target.long()
    else:
        raise TypeError(f"{op}: target must be int64 classes, or probabilities, got {target.dtype}")
    if target.shape != torch.Size(expected):
        raise ValueError(
            f"{op}: target must be {tuple(expected)} for input {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if weight is not None:
        check_floating_point(op, "weight", weight)
        if weight.shape != (C,):
            raise ValueError(f"{op}: weight must be (C,) = ({C},), got {tuple(weight.shape)}")
    for name, t in (("target", target), ("weight", weight)):
        if t is not None and t.device != input.device:
            raise ValueError(f"{op}: {name} must be on the device of input, {input.device}, got {t.device}")
    x = input.movedim(1, -1).reshape(-1, C) if input.dim() > 1 else input[None]
    if probabilities and target.dim() > 1:
        target = target.movedim(1, -1)
    target = target.reshape(-1, C) if probabilities else target.reshape(-1)
    return x, target, weight, ignore_index, float(label_smoothing), float(softcap or 0.0)


_cross_entropy = define_op(
    "cross_entropy(Tensor x, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, float softcap) "
    "-> (Tensor loss, Tensor lse)",
    reference=cross_entropy_reference,
    fake=_fake,
    samples=_samples,
    save=_save,
    backward=_backward,
    arguments=_arguments,
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """``torch.nn.functional.cross_entropy``, whose arguments and meanings these are, and two more.

    Args:
        input: (C,), (N, C) or (N, C, d1, ...), logits of any floating-point dtype. They are not changed.
        target: classes, int64, of input's shape without C; or probabilities, of input's shape.
        weight: (C,), the weight of each class.
        ignore_index: a target that does not count; its row may hold anything, and has a zero gradient.
        reduction: mean, sum or none; size_average and reduce are its older names in torch.
        label_smoothing: share in [0, 1] of the target that is spread evenly over the classes.
        z_loss: factor of lse^2, which is added to each row's loss (Chowdhery et al. 2022, arXiv:2204.02311); lse is the
            log of the softmax's denominator.
        softcap: c > 0 replaces the logits x by c tanh(x / c).

    Returns:
        0-d, or with reduction none of target's shape (without C). Of input's dtype; float32 under autocast.

    Raises:
        ValueError: sizes, devices or options that do not fit. TypeError: dtypes that do not fit. IndexError: a target
        that is no class.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options = (weight, None, ignore_index, None, reduction, label_smoothing, z_loss, softcap)
    x, rows, weight, ignore_index, *rest = _arguments(input, target, *options)
    differentiate = any(t is not None and t.requires_grad for t in (rows, weight))
    run = cross_entropy_reference if differentiate else _cross_entropy
    losses, lse = run(x, rows, weight, ignore_index, *rest)
    if z_loss:
        losses = losses + z_loss * lse.square()
    dtype = losses.dtype if autocast_on(input.device) else input.dtype
    if reduction == "none":
        shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
        return losses.view(shape).to(dtype)
    total = losses.sum()
    if reduction == "mean":
        if rows.is_floating_point():
            total = total / losses.numel()
        elif weight is None:
            total = total / (rows != ignore_index).sum()
        else:
            counts = rows != ignore_index
            total = total / (weight[torch.where(counts, rows, 0)] * counts).sum()
    return total.to(dtype)
