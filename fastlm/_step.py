"""What the ops that take an optimizer's step have in common: their checks, and how they store what they computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm._eight_bit import blocks_of
from fastlm._rounding import rounded_at_random

# What a state may be stored as: 8 bits need scales, and then memory without gaps.
STATE_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.uint8),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.uint8),
    torch.float16: (torch.float16, torch.float32, torch.uint8),
    torch.float64: (torch.float64,),
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a step computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def check_step(
    op: str,
    lists: dict[str, Sequence[Tensor]],
    steps: Sequence[Tensor],
    numbers: dict[str, Tensor | None],
    masters: Sequence[Tensor],
    emas: Sequence[Tensor],
    scales: Sequence[Sequence[Tensor]] = (),
) -> None:
    """Raises where a step cannot be taken.

    Args:
        lists: params, grads, and the states, of which the first has the dtype that the others must have.
        steps: one number a parameter, or none.
        numbers: of one element, on the device of the parameters.
        masters, emas: one a parameter, or none.
        scales: of the states that may have 8 bits, in their order; empty where none has.
    """
    params = lists["params"]
    names, states = list(lists), list(lists)[2:]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"fastlm.{op}: {name} must hold one tensor per parameter, {len(params)}, got {len(tensors)}"
            )
    for name, tensors in {"steps": steps, "masters": masters, "emas": emas}.items():
        if len(tensors) not in (0, len(params)):
            raise ValueError(
                f"fastlm.{op}: {name} must hold one tensor per parameter, {len(params)}, or none, got {len(tensors)}"
            )
    if len({id(p) for p in params}) != len(params):
        raise ValueError(f"fastlm.{op}: each parameter must be in params once, got one of them twice")
    device = params[0].device if params else None
    for i, tensors in enumerate(zip(*lists.values(), strict=True)):
        shape, dtype = params[i].shape, params[i].dtype
        if dtype not in STATE_DTYPES:
            raise TypeError(f"fastlm.{op}: params[{i}] must be floating point, got {dtype}")
        state_dtype = tensors[2].dtype if states else dtype
        if state_dtype not in STATE_DTYPES[dtype]:
            allowed = " or ".join(map(str, STATE_DTYPES[dtype]))
            raise TypeError(
                f"fastlm.{op}: {states[0]}[{i}] must be of {allowed} for params[{i}] of {dtype}, got {state_dtype}"
            )
        of_state = f"the dtype of {states[0]}[{i}]" if states else ""
        expected = [(n, t, dtype, f"the dtype of params[{i}]") for n, t in zip(names[:2], tensors[:2], strict=True)]
        expected += [(n, t, state_dtype, of_state) for n, t in zip(states, tensors[2:], strict=True)]
        for name, extra in (("masters", masters), ("emas", emas)):
            if extra:
                expected.append((name, extra[i], wide_dtype(dtype), "what the step computes in"))
        for name, tensor, want, of in expected:
            if tensor.layout is not torch.strided:
                raise TypeError(f"fastlm.{op}: {name}[{i}] must be a dense tensor, got layout {tensor.layout}")
            if tensor.dtype is not want:
                raise TypeError(f"fastlm.{op}: {name}[{i}] must be of {of}, {want}, got {tensor.dtype}")
            if tensor.shape != shape:
                raise ValueError(
                    f"fastlm.{op}: {name}[{i}] must have the sizes of params[{i}], {tuple(shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(
                    f"fastlm.{op}: {name}[{i}] must be on the device of params[0], {device}, got {tensor.device}"
                )
            if name != "grads" and not tensor.is_contiguous() and _overlaps_itself(tensor):
                raise ValueError(
                    f"fastlm.{op}: {name}[{i}] is written, so no two of its elements may share memory, got sizes "
                    f"{tuple(tensor.shape)} with strides {tensor.stride()}"
                )
        if masters and params[i].element_size() != 2:
            raise TypeError(f"fastlm.{op}: masters are for 16-bit parameters, got params[{i}] of {dtype}")
        if state_dtype == torch.uint8:
            _check_scales(op, i, params[i], dict(zip(states, tensors[2:], strict=True)), scales)
        elif any(scales):
            raise TypeError(f"fastlm.{op}: scales are for states of 8 bits, got {states[0]}[{i}] of {state_dtype}")
    for i, step in enumerate(steps):
        if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"fastlm.{op}: steps[{i}] must be one float32 or float64, got {step.dtype} {tuple(step.shape)}"
            )
        if step.device != steps[0].device or (step.device.type != "cpu" and step.device != device):
            raise ValueError(
                f"fastlm.{op}: steps must all be on the CPU or all on the device of params[0], {device}, got "
                f"steps[{i}] on {step.device} and steps[0] on {steps[0].device}"
            )
    for name, x in numbers.items():
        if x is not None and (x.numel() != 1 or not x.is_floating_point() or x.device != device):
            raise ValueError(
                f"fastlm.{op}: {name} must be one floating-point number on the device of params[0], {device}, got "
                f"{x.dtype} {tuple(x.shape)} on {x.device}"
            )
    for name in ("lr", "found_inf"):
        if numbers[name] is not None and steps and steps[0].device != device:
            raise ValueError(
                f"fastlm.{op}: {name} can be on {device} only where the steps are, got them on {steps[0].device}"
            )


def _check_scales(
    op: str, i: int, param: Tensor, states: dict[str, Tensor], scales: Sequence[Sequence[Tensor]]
) -> None:
    if not torch.ops.aten.is_non_overlapping_and_dense(param):
        raise ValueError(
            f"fastlm.{op}: states of 8 bits are for parameters without gaps in memory, got params[{i}] of sizes "
            f"{tuple(param.shape)} with strides {param.stride()}"
        )
    if len(states) != len(scales):  # SGD's, and the largest squares of Adam
        raise ValueError(f"fastlm.{op}: {list(states)[-1]}[{i}] cannot have 8 bits")
    for (name, state), tensors in zip(states.items(), scales, strict=True):
        if state.stride() != param.stride():
            raise ValueError(
                f"fastlm.{op}: {name}[{i}] has 8 bits and must have the strides of params[{i}], {param.stride()}, "
                f"got {state.stride()}"
            )
        want = blocks_of(param.numel())
        found = tensors[i] if i < len(tensors) else None
        if (
            found is None or found.dtype != torch.float32 or found.shape != (want,)
            or found.device != param.device or not found.is_contiguous()
        ):  # fmt: skip
            got = "none" if found is None else f"{found.dtype} {tuple(found.shape)} on {found.device}"
            raise ValueError(
                f"fastlm.{op}: {name}[{i}] has 8 bits and needs scales, contiguous float32 ({want},) on "
                f"{param.device}, got {got}"
            )


def _overlaps_itself(x: Tensor) -> bool:
    """Whether some two elements may share memory: a dimension does not step over all that the smaller ones span."""
    span = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += (size - 1) * stride
    return False


def store(to: Tensor, x: Tensor, noise: Tensor | None, skip: Tensor | None) -> None:
    """Into a tensor of any dtype: to bfloat16 at random where there is noise, and not at all where skip is true."""
    if noise is not None and to.dtype == torch.bfloat16:
        x = rounded_at_random(x, noise)
    to.copy_(x if skip is None else torch.where(skip, to, x))
