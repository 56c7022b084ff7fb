"""Adam in C++: csrc/cpu/adam.cpp, csrc/cuda/adam.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import FLOATS
from fastlm.kernels.native._common import current_stream


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


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("adam_", backend="native", device="cuda", supports=_unsupported)
    def adam_cuda(params: Sequence[Tensor], *args) -> None:
        if params:
            _cuda.adam_step(params, *args, current_stream(params[0]))
