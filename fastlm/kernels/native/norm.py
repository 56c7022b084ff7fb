"""layer_norm and rms_norm in C++: csrc/cpu/norm.cpp, csrc/cuda/norm.cu."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.native._common import current_stream


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous()


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register(device: str, run_forward: Callable[..., None], run_backward: Callable[..., None]) -> None:
    """Both run on contiguous tensors, with weights and sums of _sum_dtype."""

    def forward(x, residual, weight, bias, eps, centred):
        y, s = _empty_like(x), None if residual is None else _empty_like(x)
        dtype, wide = x.dtype, _sum_dtype(x)
        run_forward(
            _dense(x, dtype), _dense(residual, dtype), _dense(weight, wide), _dense(bias, wide), y, s, eps, centred
        )  # fmt: skip
        return y, s

    @kernel("layer_norm", backend="native", device=device, supports=unsupported_dtype)
    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return forward(x, None, weight, bias, eps, True)[0]

    @kernel("rms_norm", backend="native", device=device, supports=unsupported_dtype)
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return forward(x, None, weight, None, eps, False)[0]

    @kernel("add_layer_norm", backend="native", device=device, supports=unsupported_dtype)
    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        return forward(x, residual, weight, bias, eps, True)

    @kernel("add_rms_norm", backend="native", device=device, supports=unsupported_dtype)
    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float):
        return forward(x, residual, weight, None, eps, False)

    @kernel("norm_backward", backend="native", device=device, supports=unsupported_dtype)
    def norm_backward(
        dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, eps: float, centred: bool,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dtype, wide = s.dtype, _sum_dtype(s)
        dx = _empty_like(s)
        dweight, dbias = (s.new_empty(s.shape[-1] if w else 0, dtype=wide) for w in wanted)
        run_backward(
            _dense(dy, dtype), _dense(dsum, dtype), _dense(s, dtype), _dense(weight, wide), dx,
            dweight if wanted[0] else None, dbias if wanted[1] else None, eps, centred,
        )  # fmt: skip
        return dx, dweight, dbias


if _native.cpu is not None:
    _register(
        "cpu",
        lambda *args: _native.cpu.norm_forward(*args, torch.get_num_threads()),
        lambda *args: _native.cpu.norm_backward(*args, torch.get_num_threads()),
    )

if _native.cuda is not None:
    _cuda = _native.cuda

    def _backward_cuda(dy, dsum, s, weight, dx, dweight, dbias, eps, centred):
        sums = (dweight is not None) + (dbias is not None)
        numel = sums * _cuda.norm_slices(s) * s.shape[-1] if sums else 0
        partial = s.new_empty(numel, dtype=_sum_dtype(s))
        _cuda.norm_backward(dy, dsum, s, weight, dx, dweight, dbias, partial, eps, centred, current_stream(s))

    _register("cuda", lambda x, *args: _cuda.norm_forward(x, *args, current_stream(x)), _backward_cuda)
