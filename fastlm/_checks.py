"""Checks of arguments that ops share. `op` begins the message: "fastlm.attention"."""

from __future__ import annotations

import torch
from torch import Tensor


class ArgumentError(ValueError, RuntimeError):
    """A ValueError, and also what torch itself raises: code around its functions catches either."""


class DTypeError(TypeError, RuntimeError):
    """A TypeError, and also what torch itself raises where dtypes do not fit."""


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise DTypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_floating_point(op: str, name: str, value: object) -> None:
    check_tensor(op, name, value)
    if not value.is_floating_point():
        raise DTypeError(f"{op}: {name} must be floating point, got {value.dtype}")


def check_number(op: str, name: str, value: object) -> None:
    """A tensor is none: made a float, it would lose its gradient without a word."""
    # The first question is for torch.compile, whose symbolic numbers cannot be asked the last.
    if not isinstance(value, (int, float)) and (isinstance(value, Tensor) or not hasattr(value, "__float__")):
        raise DTypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_dropout(op: str, dropout_p: object, name: str = "dropout_p") -> None:
    check_number(op, name, dropout_p)
    if not 0 <= dropout_p < 1:
        raise ArgumentError(f"{op}: {name} must be in [0, 1), got {dropout_p}")


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
    raise DTypeError(f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}")


def check_device(op: str, name: str, t: Tensor | None, first_name: str, first: Tensor) -> None:
    if t is None or (t.is_cpu and first.is_cpu):  # asking for a device makes an object of it
        return
    if t.device != first.device:
        raise ArgumentError(f"{op}: {name} must be on the device of {first_name}, {first.device}, got {t.device}")


# --- of attention -----------------------------------------------------------------------------------------------------
def checked_window(op: str, window: object, name: str = "window") -> tuple[int, int]:
    """(left, right), -1 for what is open."""
    pair = (-1, -1) if window is None else tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    if len(pair) != 2 or not all(type(n) is int and n >= -1 for n in pair):
        raise ArgumentError(f"{op}: {name} must be an int or (left, right), -1 or more each, got {window!r}")
    return pair


def check_softcap(op: str, softcap: object) -> None:
    if softcap is None:
        return
    check_number(op, "softcap", softcap)
    if not 1e-30 <= softcap <= 1e30:  # neither c log2(e) nor 1 / c may overflow in float32
        raise ArgumentError(f"{op}: softcap must be from 1e-30 to 1e30, or None, got {softcap}")


def check_per_head(op: str, q: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    B, Hq = q.shape[:2]
    if alibi_slopes is not None:
        check_floating_point(op, "alibi_slopes", alibi_slopes)
        if alibi_slopes.shape != (Hq,) and alibi_slopes.shape != (B, Hq):  # `in` fails in dynamic graphs
            raise ArgumentError(
                f"{op}: alibi_slopes must be (Hq,) = ({Hq},) or (B, Hq) = ({B}, {Hq}), got {tuple(alibi_slopes.shape)}"
            )
    if sinks is not None:
        check_floating_point(op, "sinks", sinks)
        if sinks.shape != (Hq,):
            raise ArgumentError(f"{op}: sinks must be (Hq,) = ({Hq},), got {tuple(sinks.shape)}")
