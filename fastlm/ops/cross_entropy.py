"""cross_entropy(x, target) = log sum exp(x) - x[target] over rows of classes, holding no probabilities in the forward.

x (R, C) logits, target (R,) classes or (R, C) probabilities. The op gives the loss and the log-sum-exp of each row,
(R,), float32 (float64 for float64), both differentiable, both 0 in a row whose target is ignored; reductions and the
z-loss are plain torch on these. Saved: the logits by reference, and the log-sum-exp. Under autocast the logits keep
their dtype, and the loss is float32 as torch's is.

linear_cross_entropy(x, weight, target) = cross_entropy(x weight' + bias, target), reduced over the rows: x (R, D),
weight (C, D), bias (C,). With the loss it makes what the gradients of x, weight and bias would be if that of the loss
were 1; those are saved, and the arguments by reference. So a kernel need not hold all logits, as the reference does.
Under autocast x, weight and bias go to the lower precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm._checks import (
    ArgumentError,
    DTypeError,
    autocast_on,
    check_device,
    check_floating_point,
    check_number,
    check_same_dtype,
    check_softcap,
    check_tensor,
)
from fastlm._library import define_op, left_to_torch, readable_values, small, small_product

# Logits, and multiplications of linear_cross_entropy, up to which plain torch is as fast.
_SMALL, _SMALL_LINEAR = small(1 << 19, 1 << 19), small_product(1 << 27, 1 << 27)
_REDUCTIONS = ("mean", "sum", "none")


def _check_options(op: str, reduction: str, label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        check_number(op, name, value)
    check_softcap(op, softcap)
    if not 0 <= label_smoothing <= 1:
        raise ArgumentError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise ArgumentError(f"{op}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")


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
        raise IndexError(
            f"fastlm.cross_entropy: a target must be a class, 0 to {x.shape[1] - 1}, or ignore_index, {ignore_index}, "
            f"got {target[wrong][0].item()}"
        )
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
    x = torch.linspace(-9, 9, 2 * 2049, device=device).sin().view(2, 2049)  # longer rows run other code on a GPU
    made.append((x, torch.tensor([2048, 5], device=device), None, -100, 0.1, 0.0))
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
    sharding=lambda g, dlse, x, target, *_: f"r, r, rC, {'rC'[: target.ndim]}, C, r -> rC",
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
    """The schema's arguments from the public ones, checked: rows of classes.

    No weight where it is a factor of each row alone, which the public function puts to the op's losses.
    """
    op = "fastlm.cross_entropy"
    check_floating_point(op, "input", input)
    check_tensor(op, "target", target)
    _check_options(op, reduction, label_smoothing, z_loss, softcap)
    if input.dim() < 1:
        raise ArgumentError(f"{op}: input must be (C,), (N, C) or (N, C, ...), got {tuple(input.shape)}")
    C = input.shape[min(input.dim() - 1, 1)]
    probabilities = target.is_floating_point()
    if probabilities:
        expected = input.shape
    elif target.dtype in (torch.int64, torch.uint8):
        expected = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
        target = target.long()
    else:
        raise DTypeError(f"{op}: target must be int64 classes, or probabilities, got {target.dtype}")
    if target.shape != torch.Size(expected):
        raise ArgumentError(
            f"{op}: target must be {tuple(expected)} for input {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if weight is not None:
        check_floating_point(op, "weight", weight)
        if weight.shape != (C,):
            raise ArgumentError(f"{op}: weight must be (C,) = ({C},), got {tuple(weight.shape)}")
    for name, t in (("target", target), ("weight", weight)):
        check_device(op, name, t, "input", input)
    x = input.movedim(1, -1).reshape(-1, C) if input.dim() > 1 else input[None]
    if probabilities and target.dim() > 1:
        target = target.movedim(1, -1)
    target = target.reshape(-1, C) if probabilities else target.reshape(-1)
    if not probabilities and label_smoothing == 0:
        weight = None
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
    sharding=lambda x, target, *_: f"rC, {'rC'[: target.ndim]}, C -> r, r",
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
        that is no class, on the CPU. On a GPU, where that would wait for it, its row's loss is NaN, or torch's
        device-side assertion fails where the reference runs.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    plain = weight is None and softcap is None and type(z_loss) is type(label_smoothing) is float and z_loss == 0
    if plain and left_to_torch(input, _SMALL) and reduction in _REDUCTIONS and 0 <= label_smoothing <= 1:
        try:
            # Where nothing is ignored: else torch makes NaN of the gradient of an ignored row that holds one.
            lowest = readable_values(target.min()) if target.dtype == torch.int64 and ignore_index < 0 else None
            if lowest is not None and lowest >= 0:
                # torch would sum 16-bit logits in 16 bits.
                logits = input if input.dtype.itemsize > 2 else input.float()
                loss = F.cross_entropy(logits, target, None, None, ignore_index, None, reduction, label_smoothing)
                return loss if logits is input else loss.to(input.dtype)
        except Exception:
            pass  # is said below
    options = (weight, None, ignore_index, None, reduction, label_smoothing, z_loss, softcap)
    x, rows, within, ignore_index, *rest = _arguments(input, target, *options)
    differentiate = any(t is not None and t.requires_grad for t in (rows, within))
    run = cross_entropy_reference if differentiate else _cross_entropy
    losses, lse = run(x, rows, within, ignore_index, *rest)
    if weight is not None and not rows.is_floating_point():
        ignored = rows == ignore_index
        of_row = torch.where(ignored, 0, _wide(weight)[torch.where(ignored, 0, rows).clamp(0, x.shape[1] - 1)])
        if within is None:
            losses = losses * of_row
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
            total = total / of_row.sum()
    return total.to(dtype)


# --- with the linear layer before it ----------------------------------------------------------------------------------
def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, mean: bool, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits = F.linear(x, weight, bias)
    losses, lse = cross_entropy_reference(logits, target, None, ignore_index, label_smoothing, softcap)
    if z_loss:
        losses = losses + z_loss * lse.square()
    share = 1 / (target != ignore_index).sum().to(losses.dtype) if mean else losses.new_ones(())
    kept = dtype_of_gradients(x)
    dx, dweight, dbias = (x.new_empty(0, dtype=kept) for _ in range(3))
    if any(wanted):
        early = share if kept == x.dtype else torch.ones_like(share)  # else late: its product may be no float16
        dlogits = cross_entropy_backward_reference(
            early.expand(losses.shape), 2 * z_loss * early * lse if z_loss else None, logits, target,
            None, lse, ignore_index, label_smoothing, softcap,
        ).to(kept)  # fmt: skip
        dx = dlogits @ weight.to(kept) if wanted[0] else dx
        dweight = dlogits.mT @ x.to(kept) if wanted[1] else dweight
        dbias = dlogits.sum(0) if wanted[2] else dbias
        if kept != x.dtype:
            late = share.nan_to_num(posinf=0.0)  # of nothing; its gradients are 0 already
            dx, dweight, dbias = dx * late, dweight * late, dbias * late
    return losses.sum() * share, dx.contiguous(), dweight.contiguous(), dbias


def dtype_of_gradients(x: Tensor) -> torch.dtype:
    """Of those that linear_cross_entropy makes before it knows a loss scale: float16 may not hold them without one."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _fake_linear(x, weight, bias, target, ignore_index, label_smoothing, z_loss, softcap, mean, wanted):
    loss = x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    kept = dtype_of_gradients(x)
    return (loss, *(x.new_empty(shape if w else 0, dtype=kept) for shape, w in zip(shapes, wanted, strict=True)))


def _backward_linear(ops, saved, wanted, *grads):
    g, *others = grads
    found = saved[-3:]
    # What was saved holds for a first gradient of the loss alone, and of what was announced.
    known = all(not w or f.numel() == t.numel() for w, f, t in zip(wanted, found, saved, strict=False) if t is not None)
    if torch.is_grad_enabled() or any(o is not None for o in others) or not known:
        return None
    made = ((f * g.to(f.dtype)).to(saved[0].dtype) if w else None for f, w in zip(found, wanted, strict=False))
    return (*made, *[None] * 7)


def _autocast_linear(dtype, args):
    # As torch: float64 stays.
    return (*(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in args[:3]), *args[3:])


def _linear_arguments(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
) -> tuple:
    """The schema's arguments from the public ones, checked; the target as rows of classes or of probabilities."""
    op = "fastlm.linear_cross_entropy"
    operands = [("x", x), ("weight", weight)] + ([("bias", bias)] if bias is not None else [])
    for name, t in operands:
        check_floating_point(op, name, t)
        check_same_dtype(op, name, t, "x", x)
    check_tensor(op, "target", target)
    _check_options(op, reduction, label_smoothing, z_loss, softcap)
    if weight.dim() != 2:
        raise ArgumentError(f"{op}: weight must be (C, D), got {tuple(weight.shape)}")
    C, D = weight.shape
    if x.dim() < 1 or x.shape[-1] != D:
        raise ArgumentError(f"{op}: x must be (..., D) for weight (C, D) = {(C, D)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (C,):
        raise ArgumentError(f"{op}: bias must be (C,) = ({C},), got {tuple(bias.shape)}")
    probabilities = target.is_floating_point()
    if not probabilities and target.dtype not in (torch.int64, torch.uint8):
        raise DTypeError(f"{op}: target must be int64 classes, or probabilities, got {target.dtype}")
    expected = (*x.shape[:-1], C) if probabilities else tuple(x.shape[:-1])
    if target.shape != expected:
        raise ArgumentError(f"{op}: target must be {expected} for x {tuple(x.shape)}, got {tuple(target.shape)}")
    if class_weight is not None:
        check_floating_point(op, "class_weight", class_weight)
        if class_weight.shape != (C,):
            raise ArgumentError(f"{op}: class_weight must be (C,) = ({C},), got {tuple(class_weight.shape)}")
    for name, t in (*operands[1:], ("target", target), ("class_weight", class_weight)):
        check_device(op, name, t, "x", x)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    rows = x.reshape(x.shape[:-1].numel(), D)
    target = target.reshape(len(rows), C) if probabilities else target.reshape(-1).long()
    return (rows, weight, bias, target, ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0),
            reduction == "mean", wanted)  # fmt: skip


def _samples_linear(device: str) -> list[tuple]:
    made = []
    for x, target, _, ignore_index, smoothing, softcap in _samples(device)[:-1]:  # without the longest
        if x.dtype != torch.float32 and device == "cpu":  # there 16-bit logits may be kept in float32
            continue
        rows, weight = x[:, :40].contiguous() / 8, x.flatten()[: 33 * 40].view(33, 40).clone() / 8
        target = torch.where(target > 0, target % 33, target)
        made.append((rows, weight, None, target, ignore_index, smoothing, 1e-3, softcap, True, [True, True, False]))
    return made


def _sharding_linear(*args):
    *_, mean, wanted = args
    if mean:  # over the rows that count, in the whole
        return None
    outputs = (name if w else "" for name, w in zip(("rD", "CD+r", "C+r"), wanted, strict=True))
    return f"rD, CD, C, r -> +r, {', '.join(outputs)}"


_linear_cross_entropy = define_op(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool mean, bool[] wanted) "
    "-> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    reference=linear_cross_entropy_reference,
    fake=_fake_linear,
    samples=_samples_linear,
    save=lambda args, outputs: (*args, *outputs[1:]),
    backward=_backward_linear,
    autocast=_autocast_linear,
    arguments=_linear_arguments,
    flops=lambda x, weight, *others: 2 * x.numel() * weight.shape[0] * (1 + sum(others[-1][:2])),
    sharding=_sharding_linear,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """cross_entropy(x weight' + bias, target) without holding all logits: a language model's last layer and loss.

    Their gradients are made together with the loss, some rows at a time (on the CPU a tenth, or 4 Mi logits if that is
    more; on a GPU 512 MiB of logits), and only scaled in backward. All logits are held with reduction none, class
    weights or probabilities, in second derivatives, and on a GPU in 16 bits before torch 2.8. Float32 products use TF32
    on a GPU where ``torch.backends.cuda.matmul`` allows it.

    Args:
        x: (..., D), floating point.
        weight: (C, D), of x's dtype; its gradient is summed in float32.
        target: (...), int64 classes; or (..., C), probabilities.
        bias: (C,), of x's dtype.
        class_weight: (C,), the weight of each class.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as in `fastlm.cross_entropy`.

    Returns:
        0-d, or with reduction none of target's shape. Of x's dtype; float32 under autocast.

    Raises:
        ValueError: sizes, devices or options that do not fit. TypeError: dtypes that do not fit. IndexError: a target
        that is no class, on the CPU; on a GPU it makes the loss NaN, as in `fastlm.cross_entropy`.
    """
    try:
        C, D = weight.shape
        if (
            reduction != "none"
            and class_weight is None
            and left_to_torch(x, _SMALL_LINEAR, C)
            and x.shape[-1] == D
            and x.numel() * C <= D << 22  # 4 Mi logits
            and weight.is_cpu
            and target.shape == x.shape[:-1]
            and not target.is_floating_point()
            and (bias is None or (bias.shape == (C,) and bias.dtype == x.dtype and bias.is_cpu))
        ):
            logits = F.linear(x, weight, bias)
            return cross_entropy(
                logits if x.dim() == 2 else logits.view(-1, C), target if x.dim() == 2 else target.reshape(-1),
                ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
                softcap=softcap,
            )  # fmt: skip
    except Exception:
        pass  # is said below
    options = (ignore_index, reduction, label_smoothing, z_loss, softcap, class_weight)
    args = _linear_arguments(x, weight, target, bias, *options)
    if reduction == "none" or class_weight is not None or target.is_floating_point():
        losses = cross_entropy(
            F.linear(args[0], weight, bias), args[3], class_weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
        return losses.view(x.shape[:-1]) if reduction == "none" else losses
    loss = _linear_cross_entropy(*args)[0]
    return loss if autocast_on(x.device) else loss.to(x.dtype)
