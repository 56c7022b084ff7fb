"""rope in C++: csrc/cpu/rope.cpp, csrc/cuda/rope.cu."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import check_rope_tables, matrix, unsupported_dtype
from fastlm.kernels.native._common import current_stream


def _unsupported(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    if interleaved:
        return "does not take interleaved pairs"
    return unsupported_dtype(x)


def _register(device: str, run: Callable[..., None]) -> None:
    """run(x, cos, sin, y, heads) on contiguous matrices."""

    @kernel("rope", backend="native", device=device, supports=_unsupported)
    def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        check_rope_tables(x, cos, sin)
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (matrix(t.to(wide).contiguous()) for t in (cos, sin))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            run(matrix(x.contiguous()), cos, sin, matrix(y), x.shape[2])
        return y


if _native.cpu is not None:
    _register("cpu", lambda *args: _native.cpu.rope(*args, torch.get_num_threads()))

if _native.cuda is not None:
    _cuda = _native.cuda
    _register("cuda", lambda x, *args: _cuda.rope(x, *args, current_stream(x)))
