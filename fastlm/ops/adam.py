"""adam_: one step of Adam or AdamW on a list of parameters, in place, in one pass over memory.

Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980), decoupled weight decay of Loshchilov and Hutter 2019
(https://arxiv.org/abs/1711.05101), AMSGrad of Reddi et al. 2018 (https://openreview.net/forum?id=ryQu7f-RZ), states of
8 bits in blocks after Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861).
Any sizes and strides. 16-bit dtypes are computed in float32 and rounded when stored. Numbers that lie on a GPU stay
there: nothing waits for it, and a CUDA graph that holds a step goes on counting.

grad_norm: the 2-norm of all elements of a list of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm._eight_bit import dequantized, quantized, random_of
from fastlm._library import define_op
from fastlm._rounding import noise_of, noise_of_param, random_words
from fastlm._step import check_step, store, wide


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
    l1: float = 0.0,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
    emas: Sequence[Tensor] = (),
    ema_decay: float = 0.0,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
) -> None:
    _check(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad, scale, device_lr, stochastic_params,
        found_inf, masters, emas, exp_avg_scales, exp_avg_sq_scales,
    )  # fmt: skip
    if device_lr is not None:
        lr = device_lr.double().reshape(())
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    scale = None if scale is None else scale.reshape(())
    for i, (param, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        step += 1 if skip is None else (~skip).reshape(step.shape)
        t = step.double().reshape(())  # stays where it is
        noise = noise_of(t, i, seed)
        p, g = wide(masters[i] if masters else param), wide(grad)
        if exp_avg_scales:
            m = _unpacked(exp_avgs[i], exp_avg_scales[i], signed=True)
            v = _unpacked(exp_avg_sqs[i], exp_avg_sq_scales[i], signed=False)
        else:
            m, v = wide(exp_avgs[i]), wide(exp_avg_sqs[i])
        if scale is not None:
            g = (g * scale).to(g.dtype)  # of one element it would be of the scale's dtype
        if maximize:
            g = -g
        if weight_decay != 0 and not decoupled:
            g = g + weight_decay * p
        if l1 != 0:
            g = g + l1 * p.sign()
        if weight_decay != 0 and decoupled:
            p = p * (1 - lr * weight_decay)
        m = torch.lerp(m, g, 1 - beta1)
        v = beta2 * v + (1 - beta2) * g * g
        top = torch.maximum(wide(max_exp_avg_sqs[i]), v) if amsgrad else v
        denominator = top.sqrt() / (1 - beta2**t) ** 0.5 + eps
        p = (p - lr / (1 - beta1**t) * (m / denominator)).to(m.dtype)  # of one element it is float64, as t is
        store(param, p, noise_of_param(noise) if stochastic_params else None, skip)
        if masters:
            store(masters[i], p, None, skip)
        if emas:
            store(emas[i], torch.lerp(emas[i], p, 1 - ema_decay), None, skip)
        if exp_avg_scales:
            _pack(exp_avgs[i], exp_avg_scales[i], m, noise, skip, signed=True)
            _pack(exp_avg_sqs[i], exp_avg_sq_scales[i], v, noise, skip, signed=False)
            continue
        store(exp_avgs[i], m, None, skip)
        store(exp_avg_sqs[i], v, noise if stochastic else None, skip)
        if amsgrad:
            store(max_exp_avg_sqs[i], top, None, skip)


def _in_memory(x: Tensor) -> Tensor:
    """The elements of a tensor without gaps, (numel,), in the order of memory."""
    return x.as_strided((x.numel(),), (1,))


def _unpacked(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    return dequantized(_in_memory(codes), scales, signed).as_strided(codes.shape, codes.stride())


def _pack(
    codes: Tensor, scales: Tensor, x: Tensor, noise: Tensor, skip: Tensor | None, signed: bool
) -> None:  # fmt: skip
    found = torch.empty_like(codes, dtype=x.dtype).copy_(x)  # with the strides of the codes
    found = _in_memory(found)
    new = quantized(found, signed, random_of(random_words(found, noise), signed))
    for to, x in zip((_in_memory(codes), scales), new, strict=True):
        store(to, x, None, skip)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    amsgrad: bool,
    scale: Tensor | None,
    device_lr: Tensor | None,
    stochastic_params: bool,
    found_inf: Tensor | None,
    masters: Sequence[Tensor],
    emas: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
) -> None:
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    elif max_exp_avg_sqs:
        raise ValueError(
            f"fastlm.adam_: max_exp_avg_sqs must be empty without amsgrad, got {len(max_exp_avg_sqs)} tensors"
        )
    if len(steps) != len(params):
        raise ValueError(f"fastlm.adam_: steps must hold one tensor per parameter, {len(params)}, got {len(steps)}")
    if masters and stochastic_params:
        raise ValueError("fastlm.adam_: parameters that have masters are not rounded at random, got stochastic_params")
    numbers = {"scale": scale, "lr": device_lr, "found_inf": found_inf}
    check_step("adam_", lists, steps, numbers, masters, emas, (exp_avg_scales, exp_avg_sq_scales))


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
            samples.append((*lists, *options, scale, False, None, False, 0, *_NO_EXTRAS))
            if scale is None:  # likewise counted on the device
                on_device = ([x.clone() for x in tensors] for tensors in lists[:5])
                lr, steps = torch.tensor(0.1, device=device), [step.to(device, copy=True) for step in steps]
                random = dtype == torch.bfloat16
                samples.append((*on_device, steps, *options, None, False, lr, random, 1, *_NO_EXTRAS))
    return samples + _more_samples(device)


_NO_EXTRAS = (0.0, None, [], [], 0.0, [], [])


def _more_samples(device: str) -> list[tuple]:
    """Masters and averages of weights in float16, a step that is skipped, and states of 8 bits."""
    x = torch.linspace(-2, 2, 1001, device=device)
    options = (0.1, 0.9, 0.99, 1e-8, 0.1, True, False, False)
    samples = []
    for found in (None, 0.0, 1.0):
        lists = [[x.half() * scale] for scale in (1, -0.5)] + [[x * 0.25], [x.square()], []]
        found_inf = None if found is None else torch.tensor(found, device=device)
        extras = (0.01, found_inf, [x.clone()], [x * 0.5], 0.9, [], [])
        samples.append((*lists, [torch.tensor(3.0, device=device)], *options, None, False, None, False, 0, *extras))
    for dtype in (torch.float32, torch.bfloat16):
        lists = [[x.to(dtype)], [x.to(dtype) * -0.5]]
        packed = [quantized(x * 0.25, True), quantized(x.square(), False)]
        lists += [[codes] for codes, _ in packed]
        extras = (0.0, None, [], [], 0.0, *([scales] for _, scales in packed))
        samples.append((*lists, [], [torch.tensor(3.0)], *options, None, False, None, False, 7, *extras))
    return samples


def _check_call(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled,
    amsgrad, maximize, scale, stochastic, device_lr, stochastic_params, seed, l1, found_inf, masters, emas, ema_decay,
    exp_avg_scales, exp_avg_sq_scales,
) -> None:  # fmt: skip
    _check(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, amsgrad, scale, device_lr, stochastic_params,
        found_inf, masters, emas, exp_avg_scales, exp_avg_sq_scales,
    )  # fmt: skip


def _arguments(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, *, lr, beta1, beta2, eps, weight_decay, decoupled,
    amsgrad, maximize, scale=None, stochastic=False, stochastic_params=False, seed=0, l1=0.0, found_inf=None,
    masters=(), emas=(), ema_decay=0.0, exp_avg_scales=(), exp_avg_sq_scales=(),
) -> tuple:  # fmt: skip
    lr, device_lr = (1.0, lr) if isinstance(lr, Tensor) else (lr, None)
    return (
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled,
        amsgrad, maximize, scale, stochastic, device_lr, stochastic_params, seed, l1, found_inf, masters, emas,
        ema_decay, exp_avg_scales, exp_avg_sq_scales,
    )  # fmt: skip


_adam = define_op(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool amsgrad, bool maximize, Tensor? scale, bool stochastic, "
    "Tensor? device_lr, bool stochastic_params, int seed, float l1, Tensor? found_inf, "
    "Tensor(f!)[] masters, Tensor(g!)[] emas, float ema_decay, Tensor(h!)[] exp_avg_scales, "
    "Tensor(i!)[] exp_avg_sq_scales) -> ()",
    reference=adam_reference,
    fake=_check_call,
    check=_check_call,
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
    l1: float = 0.0,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
    emas: Sequence[Tensor] = (),
    ema_decay: float = 0.0,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
) -> None:
    """One step of Adam, in place on everything but the gradients. Call it under torch.no_grad().

    With g the gradient (times scale, negated for maximize) and t the step, counting this one::

        g += weight_decay * param                      unless decoupled
        g += l1 * sign(param)
        param *= 1 - lr * weight_decay                 if decoupled
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
        max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)                      with amsgrad, in place of exp_avg_sq below
        param -= lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        ema = ema_decay * ema + (1 - ema_decay) * param

    Args:
        params: distinct tensors on one device, of any sizes, strides and floating-point dtypes.
        grads: one per parameter, of its sizes, dtype and device, with any strides.
        exp_avgs, exp_avg_sqs: likewise, both of one dtype: the parameter's, float32, bfloat16 (but for float16) or
            uint8 (but for float64), which takes scales, and memory without gaps laid out as the parameter's.
        max_exp_avg_sqs: the same with amsgrad, which states of uint8 do not have; empty without.
        steps: per parameter the steps taken so far, one float32 or float64: all on the CPU or all on the parameters'
            device, where nothing waits for it.
        lr: a number, or, with steps on the parameters' device, a tensor of one element there.
        scale: one number on the parameters' device, by which gradients are multiplied as they are read.
        stochastic: exp_avg_sq in bfloat16 is rounded up or down at random, by numbers that follow from the step and the
            element's place. Rounded to nearest it would never decay: beta2 takes off less than half its last digit.
        stochastic_params: parameters in bfloat16 are rounded likewise, so that updates smaller than half their last
            digit are not lost.
        seed: of these random numbers, beside the step. States of 8 bits are always rounded so.
        l1: weight of an L1 penalty, whose gradient is added.
        found_inf: one number on the parameters' device, and on a GPU the steps too: other than 0, nothing is written
            and the step does not count.
        masters: of 16-bit parameters, a float32 each: the step is theirs, and the parameter is what they round to.
        emas: one per parameter (of its master, where there is one), float32 (float64 for float64): averages of it after
            the steps, with ema_decay.
        exp_avg_scales, exp_avg_sq_scales: for states of 8 bits one float32 per block of 256 elements, see
            fastlm/_eight_bit.py.

    Raises:
        ValueError: lists of different lengths, sizes or devices that do not fit, a parameter given twice, or a written
            tensor whose elements share memory.
        TypeError: dtypes that do not fit.
    """
    args = _arguments(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, decoupled=decoupled, amsgrad=amsgrad, maximize=maximize, scale=scale,
        stochastic=stochastic, stochastic_params=stochastic_params, seed=seed, l1=l1, found_inf=found_inf,
        masters=masters, emas=emas, ema_decay=ema_decay, exp_avg_scales=exp_avg_scales,
        exp_avg_sq_scales=exp_avg_sq_scales,
    )  # fmt: skip
    (_adam if params else _check_call)(*args)  # an empty list names no device


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
