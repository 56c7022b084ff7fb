"""adam_: one step of Adam or AdamW on a list of parameters, in place, in one pass over memory.

Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980), decoupled weight decay of Loshchilov and Hutter 2019
(https://arxiv.org/abs/1711.05101), AMSGrad of Reddi et al. 2018 (https://openreview.net/forum?id=ryQu7f-RZ).
Any sizes and strides; each parameter has one dtype with its gradient, and with its state but where one is float32 and
the other bfloat16. 16-bit dtypes are computed in float32 and rounded when stored. Numbers that lie on a GPU stay there:
nothing waits for it, and a CUDA graph that holds a step goes on counting.

grad_norm: the 2-norm of all elements of a list of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm._library import define_op
from fastlm._rounding import noise_of, noise_of_param, rounded_at_random


def adam_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    scale: Tensor | None = None,
    stochastic: bool = False,
    device_lr: Tensor | None = None,
    stochastic_params: bool = False,
    seed: int = 0,
) -> None:
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad, scale, device_lr)
    if device_lr is not None:
        lr = device_lr.double().reshape(())
    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        step += 1
        t = step.double().reshape(())  # stays where it is
        noise = noise_of(t, i, seed)
        p, g, m, v = (_wide(x) for x in (param, grad, exp_avg, exp_avg_sq))
        if scale is not None:
            g = g * scale
        if maximize:
            g = -g
        if weight_decay != 0 and not decoupled:
            g = g + weight_decay * p
        if weight_decay != 0 and decoupled:
            p = p * (1 - lr * weight_decay)
        m = torch.lerp(m, g, 1 - beta1)
        v = beta2 * v + (1 - beta2) * g * g
        top = torch.maximum(_wide(max_exp_avg_sqs[i]), v) if amsgrad else v
        denominator = top.sqrt() / (1 - beta2**t) ** 0.5 + eps
        p = p - lr / (1 - beta1**t) * (m / denominator)
        param.copy_(rounded_at_random(p, noise_of_param(noise)) if stochastic_params and _narrow(param) else p)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(rounded_at_random(v, noise) if stochastic and _narrow(exp_avg_sq) else v)
        if amsgrad:
            max_exp_avg_sqs[i].copy_(top)


def _narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def _overlaps_itself(x: Tensor) -> bool:
    """Whether some two elements may share memory: a dimension does not step over all that the smaller ones span."""
    span = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += (size - 1) * stride
    return False


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    amsgrad: bool,
    scale: Tensor | None = None,
    device_lr: Tensor | None = None,
) -> None:
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs"]
    lists = [params, grads, exp_avgs, exp_avg_sqs]
    if amsgrad:
        names.append("max_exp_avg_sqs")
        lists.append(max_exp_avg_sqs)
    elif max_exp_avg_sqs:
        raise ValueError(
            f"fastlm.adam_: max_exp_avg_sqs must be empty without amsgrad, got {len(max_exp_avg_sqs)} tensors"
        )
    for name, tensors in zip([*names, "steps"], [*lists, steps], strict=True):
        if len(tensors) != len(params):
            raise ValueError(
                f"fastlm.adam_: {name} must hold one tensor per parameter, {len(params)}, got {len(tensors)}"
            )
    if len({id(p) for p in params}) != len(params):
        raise ValueError("fastlm.adam_: each parameter must be in params once, got one of them twice")
    device = params[0].device if params else None
    for i, tensors in enumerate(zip(*lists, strict=True)):
        shape, dtype = params[i].shape, params[i].dtype
        state_dtype = exp_avgs[i].dtype if {dtype, exp_avgs[i].dtype} == {torch.float32, torch.bfloat16} else dtype
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.layout is not torch.strided:
                raise TypeError(f"fastlm.adam_: {name}[{i}] must be a dense tensor, got layout {tensor.layout}")
            want = dtype if name in ("params", "grads") else state_dtype
            if tensor.dtype is not want or not dtype.is_floating_point:
                of = "params" if want is dtype else "exp_avgs"
                raise TypeError(
                    f"fastlm.adam_: {name}[{i}] must be floating point and of the dtype of {of}[{i}], {want}, "
                    f"got {tensor.dtype}"
                )
            if tensor.shape != shape:
                raise ValueError(
                    f"fastlm.adam_: {name}[{i}] must have the sizes of params[{i}], {tuple(shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(
                    f"fastlm.adam_: {name}[{i}] must be on the device of params[0], {device}, got {tensor.device}"
                )
            if name != "grads" and not tensor.is_contiguous() and _overlaps_itself(tensor):
                raise ValueError(
                    f"fastlm.adam_: {name}[{i}] is written, so no two of its elements may share memory, got sizes "
                    f"{tuple(tensor.shape)} with strides {tensor.stride()}"
                )
    for i, step in enumerate(steps):
        if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"fastlm.adam_: steps[{i}] must be one float32 or float64, got {step.dtype} {tuple(step.shape)}"
            )
        if step.device != steps[0].device or (step.device.type != "cpu" and step.device != device):
            raise ValueError(
                f"fastlm.adam_: steps must all be on the CPU or all on the device of params[0], {device}, got "
                f"steps[{i}] on {step.device} and steps[0] on {steps[0].device}"
            )
    for name, x in (("scale", scale), ("lr", device_lr)):
        if x is not None and (x.numel() != 1 or not x.is_floating_point() or x.device != device):
            raise ValueError(
                f"fastlm.adam_: {name} must be one floating-point number on the device of params[0], {device}, got "
                f"{x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if device_lr is not None and steps and steps[0].device != device:
        raise ValueError(f"fastlm.adam_: lr can be on {device} only where the steps are, got them on {steps[0].device}")


def _samples(device: str) -> list[tuple]:
    samples = []
    for dtype in (torch.float32, torch.bfloat16):
        for decoupled, amsgrad, scale in ((True, False, None), (False, True, None), (True, False, 0.5)):
            x = torch.linspace(-2, 2, 1001, device=device, dtype=dtype)
            params, grads, exp_avgs = ([x * scale, x[:7] * scale] for scale in (1, -0.5, 0.25))
            exp_avg_sqs, tops = ([x.square() * scale, x[:7].square() * scale] for scale in (0.5, 1))
            steps = [torch.tensor(3.0), torch.tensor(0.0)]
            lists = (params, grads, exp_avgs, exp_avg_sqs, tops if amsgrad else [], steps)
            scale = None if scale is None else torch.tensor(scale, device=device)
            options = (0.1, 0.9, 0.99, 1e-8, 0.1, decoupled, amsgrad, False)
            samples.append((*lists, *options, scale, False, None, False, 0))
            if scale is None:  # likewise counted on the device
                on_device = ([x.clone() for x in tensors] for tensors in lists[:5])
                lr, steps = torch.tensor(0.1, device=device), [step.to(device, copy=True) for step in steps]
                samples.append((*on_device, steps, *options, None, False, lr, dtype == torch.bfloat16, 1))
    return samples


def _fake(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled,
          amsgrad, maximize, scale, stochastic, device_lr, stochastic_params, seed) -> None:  # fmt: skip
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad, scale, device_lr)


def _arguments(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, *, lr, beta1, beta2, eps, weight_decay, decoupled,
    amsgrad, maximize, scale=None, stochastic=False, stochastic_params=False, seed=0,
) -> tuple:  # fmt: skip
    lr, device_lr = (1.0, lr) if isinstance(lr, Tensor) else (lr, None)
    return (
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled,
        amsgrad, maximize, scale, stochastic, device_lr, stochastic_params, seed,
    )  # fmt: skip


_adam = define_op(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool amsgrad, bool maximize, Tensor? scale=None, bool stochastic=False, "
    "Tensor? device_lr=None, bool stochastic_params=False, int seed=0) -> ()",
    reference=adam_reference,
    fake=_fake,
    samples=_samples,
    arguments=_arguments,
)


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    scale: Tensor | None = None,
    stochastic: bool = False,
    stochastic_params: bool = False,
    seed: int = 0,
) -> None:
    """One step of Adam, in place on everything but the gradients. Call it under torch.no_grad().

    With g the gradient (times scale, negated for maximize) and t the step, counting this one::

        g += weight_decay * param                      unless decoupled
        param *= 1 - lr * weight_decay                 if decoupled
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
        max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)                      with amsgrad, in place of exp_avg_sq below
        param -= lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

    Args:
        params: distinct tensors on one device, of any sizes, strides and floating-point dtypes.
        grads, exp_avgs, exp_avg_sqs: one each per parameter, of its sizes, dtype and device, with any strides. The
            state of a float32 parameter may be bfloat16, and the other way round.
        max_exp_avg_sqs: the same with amsgrad; empty without.
        steps: per parameter the steps taken so far, one float32 or float64: all on the CPU or all on the parameters'
            device, where nothing waits for it.
        lr: a number, or, with steps on the parameters' device, a tensor of one element there.
        scale: one number on the parameters' device, by which gradients are multiplied as they are read.
        stochastic: exp_avg_sq in bfloat16 is rounded up or down at random, by numbers that follow from the step and the
            element's place. Rounded to nearest it would never decay: beta2 takes off less than half its last digit.
        stochastic_params: parameters in bfloat16 are rounded likewise, so that updates smaller than half their last
            digit are not lost.
        seed: of these random numbers, beside the step.

    Raises:
        ValueError: lists of different lengths, sizes or devices that do not fit, a parameter given twice, or a written
            tensor whose elements share memory.
        TypeError: dtypes that do not fit.
    """
    device_lr = lr if isinstance(lr, Tensor) else None
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad, scale, device_lr)
    if params:  # an empty list names no device
        _adam(*_arguments(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, decoupled=decoupled, amsgrad=amsgrad, maximize=maximize, scale=scale,
            stochastic=stochastic, stochastic_params=stochastic_params, seed=seed,
        ))  # fmt: skip


# --- the norm of gradients --------------------------------------------------------------------------------------------
def grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    squares = torch.stack([g.double().square().sum() for g in grads]).sum()
    return squares.sqrt().to(torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32)


def _samples_norm(device: str) -> list[tuple]:
    x = torch.linspace(-2, 2, 1001, device=device)
    return [([x, x[:7].bfloat16(), x.view(7, 143).t()],)]


_grad_norm = define_op(
    "grad_norm(Tensor[] grads) -> Tensor",
    reference=grad_norm_reference,
    fake=lambda grads: grads[0].new_empty(
        (), dtype=torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    ),
    samples=_samples_norm,
)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of some tensors together, 0-d float32 (float64 where one of them is). Call it under
    torch.no_grad().

    Args:
        grads: at least one floating-point tensor, of any sizes, strides and dtypes, on one device.

    Raises:
        ValueError: no tensor, or several devices. TypeError: a dtype that is not floating point.
    """
    if not grads:
        raise ValueError("fastlm.grad_norm: grads must hold at least one tensor")
    for i, g in enumerate(grads):
        if not g.is_floating_point():
            raise TypeError(f"fastlm.grad_norm: grads[{i}] must be floating point, got {g.dtype}")
        if g.device != grads[0].device:
            raise ValueError(
                f"fastlm.grad_norm: grads[{i}] must be on the device of grads[0], {grads[0].device}, got {g.device}"
            )
    return _grad_norm(list(grads))
