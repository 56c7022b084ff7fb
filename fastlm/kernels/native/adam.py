"""Adam in C++: csrc/cpu/adam.cpp, csrc/cuda/adam.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import FLOATS, flat, unsupported_adam_on_gpu
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
        *args, scale, stochastic = args
        _step(*args, 1.0 if scale is None else scale.item(), stochastic, torch.get_num_threads())

    def _unsupported_norm(grads: Sequence[Tensor]) -> str | None:
        return next((f"does not take {g.dtype}" for g in grads if g.dtype not in FLOATS), None)

    @kernel("grad_norm", backend="native", device="cpu", supports=_unsupported_norm)
    def grad_norm(grads: Sequence[Tensor]) -> Tensor:
        dense = [flat(g if torch.ops.aten.is_non_overlapping_and_dense(g) else g.contiguous()) for g in grads]
        total = _native.cpu.sum_of_squares(dense, torch.get_num_threads()) ** 0.5
        wide = any(g.dtype == torch.float64 for g in grads)
        return torch.tensor(total, dtype=torch.float64 if wide else torch.float32, device="cpu")


if _native.cuda is not None:
    _cuda = _native.cuda

    def _unsupported_on_gpu(*args) -> str | None:
        return unsupported_adam_on_gpu(*args) or _unsupported(*args)

    @kernel("adam_", backend="native", device="cuda", supports=_unsupported_on_gpu)
    def adam_cuda(params: Sequence[Tensor], *args) -> None:
        *args, _scale, _stochastic = args
        if params:
            _cuda.adam_step(params, *args, current_stream(params[0]))
