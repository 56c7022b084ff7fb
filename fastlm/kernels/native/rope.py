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
        N, T, H, D = x.shape
        half = cos.shape[-1]
        if cos.shape not in ((1, T, half), (N, T, half)) or sin.shape != cos.shape or not 2 <= 2 * half <= D:
            raise ValueError(
                f"rope: cos and sin must be (1 or N, T, R/2) for x (N, T, H, D) = {tuple(x.shape)}, "
                f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (matrix(t.to(wide).contiguous()) for t in (cos, sin))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            _native.cpu.rope(matrix(x.contiguous()), cos, sin, matrix(y), H, torch.get_num_threads())
        return y
