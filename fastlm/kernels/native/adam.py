"""Adam in C++: csrc/cpu/adam.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastlm._library import kernel
from fastlm.kernels.native._common import FLOATS
from torch import Tensor

from fastlm import _native


def _unsupported(params: Sequence[Tensor], *rest: object) -> str | None:
    for p in params:
        if p.dtype not in FLOATS:
            return f"does not take {p.dtype}"
        if p.dim() > 8:
            return f"does not take {p.dim()} dimensions"
    return None


if _native.cpu is not None:
    _step = _native.cpu.adam_step

    @kernel("adam_", backend="native", device="cpu", supports=_unsupported)
    def adam_(*args) -> None:
        _step(*args, torch.get_num_threads())
