"""sgd_: one step of stochastic gradient descent on a list of parameters, in place, in one pass over memory.

Momentum as in torch.optim.SGD (Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html, with the
learning rate outside the average), which starts as the first gradient.
Any sizes and strides. 16-bit dtypes are computed in float32 and rounded when stored. Numbers that lie on a GPU stay
there: nothing waits for it, and a CUDA graph that holds a step goes on counting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm._library import define_op
from fastlm._rounding import noise_of, noise_of_param
from fastlm._step import check_step, store, wide


def sgd_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    l1: float,
    nesterov: bool,
    maximize: bool,
    scale: Tensor | None,
    device_lr: Tensor | None,
    found_inf: Tensor | None,
    masters: Sequence[Tensor],
    emas: Sequence[Tensor],
    ema_decay: float,
    stochastic_params: bool,
    seed: int,
) -> None:
    _check(
        params, grads, momentum_buffers, steps, momentum, scale, device_lr, found_inf, masters, emas, stochastic_params
    )
    if device_lr is not None:
        lr = device_lr.double().reshape(())
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    scale = None if scale is None else scale.reshape(())
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        noise = t = None
        if steps:
            steps[i].add_(1 if skip is None else (~skip).reshape(steps[i].shape))
            t = steps[i].double().reshape(())  # stays where it is
            noise = noise_of_param(noise_of(t, i, seed)) if stochastic_params else None
        p, g = wide(masters[i] if masters else param), wide(grad)
        if scale is not None:
            g = (g * scale).to(g.dtype)  # of one element it would be of the scale's dtype
        if maximize:
            g = -g
        if weight_decay != 0:
            g = g + weight_decay * p
        if l1 != 0:
            g = g + l1 * p.sign()
        if momentum != 0:
            buffer = momentum_buffers[i]
            average = torch.where(t == 1, g, momentum * wide(buffer) + (1 - dampening) * g)
            g = g + momentum * average if nesterov else average
            store(buffer, average, None, skip)
        p = (p - lr * g).to(p.dtype)  # of one element it is float64, as a learning rate in a tensor is
        store(param, p, noise, skip)
        if masters:
            store(masters[i], p, None, skip)
        if emas:
            store(emas[i], torch.lerp(emas[i], p, 1 - ema_decay), None, skip)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    momentum: float,
    scale: Tensor | None,
    device_lr: Tensor | None,
    found_inf: Tensor | None,
    masters: Sequence[Tensor],
    emas: Sequence[Tensor],
    stochastic_params: bool,
) -> None:
    lists = {"params": params, "grads": grads}
    if momentum != 0:
        lists["momentum_buffers"] = momentum_buffers
    elif momentum_buffers:
        raise ValueError(
            f"fastlm.sgd_: momentum_buffers must be empty without momentum, got {len(momentum_buffers)} tensors"
        )
    if (momentum != 0 or stochastic_params) and len(steps) != len(params):
        raise ValueError(
            f"fastlm.sgd_: with momentum or stochastic_params, steps must hold one tensor per parameter, "
            f"{len(params)}, got {len(steps)}"
        )
    if masters and stochastic_params:
        raise ValueError("fastlm.sgd_: parameters that have masters are not rounded at random, got stochastic_params")
    numbers = {"scale": scale, "lr": device_lr, "found_inf": found_inf}
    check_step("sgd_", lists, steps, numbers, masters, emas)


def _samples(device: str) -> list[tuple]:
    samples = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.linspace(-2, 2, 1001, device=device, dtype=dtype)

        def lists(x: Tensor) -> list[list[Tensor]]:
            return [[x * scale, x[:7] * scale] for scale in (1, -0.5, 0.25)]

        steps = [torch.tensor(3.0), torch.tensor(0.0)]
        more = (None, None, None, [], [], 0.0, False, 0)
        # lr, momentum, dampening, weight_decay, l1, nesterov, maximize
        samples.append((*lists(x)[:2], [], [], 0.1, 0.0, 0.0, 0.1, 0.01, False, True, *more))
        samples.append((*lists(x), steps, 0.1, 0.9, 0.5, 0.1, 0.0, False, False, *more))
        for found in (0.0, 1.0):
            numbers = [torch.tensor(n, device=device) for n in (0.5, 0.1, found)]
            on_device = [step.to(device, copy=True) for step in steps]
            masters = [p.float() for p in lists(x)[0]] if dtype != torch.float32 else []
            emas = [p.float() * 0.5 for p in lists(x)[0]]
            more_of = (*numbers, masters, emas, 0.9, False, 0)
            samples.append((*lists(x), on_device, 1.0, 0.9, 0.0, 0.1, 0.0, True, False, *more_of))
    x = torch.linspace(-2, 2, 1001, device=device, dtype=torch.bfloat16)
    samples.append(([x], [x * 0.01], [], [torch.tensor(4.0)], 0.1, 0.0, 0.0, 0.0, 0.0, False, False, None, None, None,
                    [], [], 0.0, True, 5))  # fmt: skip
    return samples


def _check_call(
    params, grads, momentum_buffers, steps, lr, momentum, dampening, weight_decay, l1, nesterov, maximize, scale,
    device_lr, found_inf, masters, emas, ema_decay, stochastic_params, seed,
) -> None:  # fmt: skip
    _check(
        params, grads, momentum_buffers, steps, momentum, scale, device_lr, found_inf, masters, emas, stochastic_params
    )


def _arguments(
    params, grads, momentum_buffers=(), steps=(), *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, l1=0.0,
    nesterov=False, maximize=False, scale=None, found_inf=None, masters=(), emas=(), ema_decay=0.0,
    stochastic_params=False, seed=0,
) -> tuple:  # fmt: skip
    lr, device_lr = (1.0, lr) if isinstance(lr, Tensor) else (lr, None)
    return (
        params, grads, momentum_buffers, steps, lr, momentum, dampening, weight_decay, l1, nesterov, maximize, scale,
        device_lr, found_inf, masters, emas, ema_decay, stochastic_params, seed,
    )  # fmt: skip


_sgd = define_op(
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, float lr, "
    "float momentum, float dampening, float weight_decay, float l1, bool nesterov, bool maximize, Tensor? scale, "
    "Tensor? device_lr, Tensor? found_inf, Tensor(d!)[] masters, Tensor(e!)[] emas, float ema_decay, "
    "bool stochastic_params, int seed) -> ()",
    reference=sgd_reference,
    fake=_check_call,
    check=_check_call,
    samples=_samples,
    arguments=_arguments,
)


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
    emas: Sequence[Tensor] = (),
    ema_decay: float = 0.0,
    stochastic_params: bool = False,
    seed: int = 0,
) -> None:
    """One step of SGD, in place on everything but the gradients. Call it under torch.no_grad().

    With g the gradient (times scale, negated for maximize) and t the step, counting this one::

        g += weight_decay * param
        g += l1 * sign(param)
        momentum_buffer = g if t = 1 else momentum * momentum_buffer + (1 - dampening) * g      with momentum
        g = g + momentum * momentum_buffer if nesterov else momentum_buffer                     with momentum
        param -= lr * g
        ema = ema_decay * ema + (1 - ema_decay) * param

    Args:
        params: distinct tensors on one device, of any sizes and strides, and of float32, bfloat16, float16 or float64.
        grads: one per parameter, of its sizes, dtype and device, with any strides.
        momentum_buffers: likewise with momentum, each of its parameter's dtype, float32 or bfloat16 (but for float16);
            empty without.
        steps: per parameter the steps taken so far, one float32 or float64: all on the CPU or all on the parameters'
            device, where nothing waits for it. May be empty without momentum and stochastic_params.
        lr: a number, or, where the steps are on the parameters' device too, a tensor of one element there.
        scale: one number on the parameters' device, by which gradients are multiplied as they are read.
        found_inf, masters, emas, ema_decay, stochastic_params, seed: as in ``fastlm.ops.adam.adam_``.

    Raises:
        ValueError: lists of different lengths, sizes or devices that do not fit, a parameter given twice, or a written
            tensor whose elements share memory.
        TypeError: dtypes that do not fit.
    """
    args = _arguments(
        params, grads, momentum_buffers, steps, lr=lr, momentum=momentum, dampening=dampening,
        weight_decay=weight_decay, l1=l1, nesterov=nesterov, maximize=maximize, scale=scale, found_inf=found_inf,
        masters=masters, emas=emas, ema_decay=ema_decay, stochastic_params=stochastic_params, seed=seed,
    )  # fmt: skip
    (_sgd if params else _check_call)(*args)  # an empty list names no device
