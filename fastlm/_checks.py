"""Checks of arguments that ops share. `op` begins the message: "fastlm.attention"."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_floating_point(op: str, name: str, value: object) -> None:
    check_tensor(op, name, value)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")


def check_number(op: str, name: str, value: object) -> None:
    """A tensor is none: made a float, it would lose its gradient without a word."""
    if isinstance(value, Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_dropout(op: str, dropout_p: object) -> None:
    check_number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")


def autocast_on(device: torch.device) -> bool:
    return (
        torch._C._is_any_autocast_enabled()  # the cheapest to ask, and mostly False
        and torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
    )


def check_same_dtype(op: str, name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    """Where autocast is on, it will make one dtype of all but float64, which it leaves."""
    if t.dtype == first.dtype or (autocast_on(first.device) and torch.float64 not in (t.dtype, first.dtype)):
        return
    raise TypeError(f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}")


def check_device(op: str, name: str, t: Tensor | None, first_name: str, first: Tensor) -> None:
    if t is None or (t.is_cpu and first.is_cpu):  # asking for a device makes an object of it
        return
    if t.device != first.device:
        raise ValueError(f"{op}: {name} must be on the device of {first_name}, {first.device}, got {t.device}")
