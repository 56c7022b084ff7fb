"""rope in C++: csrc/cpu/rope.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import matrix, unsupported_dtype

if _native.cpu is not None:

    def _unsupported(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
        if interleaved:
            return "does not take interleaved pairs"
        return unsupported_dtype(x)

    @kernel("rope", backend="native", device="cpu", supports=_unsupported)
    def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (matrix(t.to(wide).contiguous()) for t in (cos, sin))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            _native.cpu.rope(matrix(x.contiguous()), cos, sin, matrix(y), x.shape[-2], torch.get_num_threads())
        return y
