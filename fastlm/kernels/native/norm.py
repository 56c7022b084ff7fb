"""layer_norm and rms_norm in C++: csrc/cpu/norm.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import matrix, unsupported_dtype

if _native.cpu is not None:

    def _wide(t: Tensor | None, like: Tensor) -> Tensor | None:
        return None if t is None else t.to(_sum_dtype(like)).contiguous()

    def _sum_dtype(x: Tensor) -> torch.dtype:
        return torch.float64 if x.dtype == torch.float64 else torch.float32

    def _rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else matrix(x.contiguous())

    def _empty_like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def _forward(x, residual, weight, bias, eps, centred):
        y, s = _empty_like(x), None if residual is None else _empty_like(x)
        _native.cpu.norm_forward(
            _rows(x), _rows(residual), _wide(weight, x), _wide(bias, x), matrix(y), _rows(s),
            eps, centred, torch.get_num_threads(),
        )  # fmt: skip
        return y, s

    @kernel("layer_norm", backend="native", device="cpu", supports=unsupported_dtype)
    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return _forward(x, None, weight, bias, eps, True)[0]

    @kernel("rms_norm", backend="native", device="cpu", supports=unsupported_dtype)
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return _forward(x, None, weight, None, eps, False)[0]

    @kernel("add_layer_norm", backend="native", device="cpu", supports=unsupported_dtype)
    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        return _forward(x, residual, weight, bias, eps, True)

    @kernel("add_rms_norm", backend="native", device="cpu", supports=unsupported_dtype)
    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float):
        return _forward(x, residual, weight, None, eps, False)

    @kernel("norm_backward", backend="native", device="cpu", supports=unsupported_dtype)
    def norm_backward(
        dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, eps: float, centred: bool,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dx = _empty_like(s)
        count = 2 if wanted[1] else 1 if wanted[0] else 0
        sums = torch.empty(count, s.shape[-1], dtype=_sum_dtype(s)) if count else None
        _native.cpu.norm_backward(
            _rows(dy), _rows(dsum), _rows(s), _wide(weight, s), matrix(dx), sums, eps, centred, torch.get_num_threads()
        )
        # Copies: an op's outputs must not share memory.
        dweight, dbias = (sums[i].clone() if w else torch.empty(0, dtype=_sum_dtype(s)) for i, w in enumerate(wanted))
        return dx, dweight, dbias
