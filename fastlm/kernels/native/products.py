"""The products of a linear layer on the CPU, each by whatever does it fastest. Measured figures: bench/LOG.md.

float32 on AVX-512: torch calls MKL, which on AMD leaves the wide registers unused. The oneDNN inside torch does not;
csrc/cpu/matmul.cpp is faster where it has to turn a factor: for weight gradients, and for the input gradients of layers
with many outputs. On AVX2 MKL is at the machine's limit, but for some hundred rows times a large weight. In 16 bits
torch's product is at the limit where the CPU has instructions for it. Where it has not, torch takes five to a hundred
times as long as in float32, to which operands are converted then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import _native
from fastlm._library import torch_multiplies

_DEEP = 3072  # outputs of a layer, from which on our own product takes the input gradient
_CONVERTED_ROWS = 512  # at a time: products are as fast as of all rows, and the copies small beside what training keeps


@functools.cache
def _onednn() -> bool:
    """Whether this torch has the op that torch.compile uses for linear layers, and it works."""
    try:
        x, weight = torch.ones(2, 3), torch.ones(4, 3)
        y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return bool((y == 3).all()) and y.shape == (2, 4)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return _wide(x) and x.numel() > 0 and weight.numel() > 0 and torch.backends.mkldnn.enabled and _onednn()


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and 96 <= x.shape[0] <= 512 and weight.shape[0] >= 1024 and weight.shape[1] >= 128


def _wide(x: Tensor) -> bool:
    """Float32 where AVX-512 is in use."""
    return x.dtype == torch.float32 and _native.cpu.active_isa() in ("amx", "avx512bf16", "avx512")


def by_conversion(x: Tensor) -> bool:
    """Whether products of x are faster in float32, conversions and all."""
    return x.dtype in (torch.bfloat16, torch.float16) and not torch_multiplies(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K), weight (N, K) -> x weight' + bias (M, N). Without an activation: oneDNN's ReLU makes 0 of NaN."""
    if by_conversion(x):
        wide = weight.float(), None if bias is None else bias.float()
        return _by_parts(lambda part: linear(part, *wide), x, weight.shape[0])
    if _by_onednn(x, weight):
        # oneDNN reads a bias as if it were contiguous, whatever its strides, and says nothing.
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if _few_rows(x, weight) and bias is None:
        return add_product(x, weight.t(), x.new_empty(x.shape[0], weight.shape[0]), add=False)
    return F.linear(x, weight, bias)


def input_gradient(du: Tensor, weight: Tensor) -> Tensor:
    """du (M, N), weight (N, K) -> du weight (M, K)."""
    if by_conversion(du):
        wide = weight.float()
        return _by_parts(lambda part: input_gradient(part, wide), du, weight.shape[1])
    if _wide(du) and du.shape[1] >= _DEEP:
        return add_product(du, weight, du.new_empty(du.shape[0], weight.shape[1]), add=False)
    if _by_onednn(du, weight):
        return torch.ops.mkldnn._linear_pointwise(du, weight.t(), None, "none", [], "")
    return du @ weight


def weight_gradient(du: Tensor, x: Tensor) -> Tensor:
    """du (M, N), x (M, K) -> du' x (N, K)."""
    if by_conversion(du):
        sums = du.new_zeros(du.shape[1], x.shape[1], dtype=torch.float32)
        for du_part, x_part in zip(du.split(_CONVERTED_ROWS), x.split(_CONVERTED_ROWS), strict=True):
            sums.addmm_(du_part.float().t(), x_part.float())
        return sums.to(du.dtype)
    if _wide(du):
        return add_product(du.t(), x, du.new_empty(du.shape[1], x.shape[1]), add=False)
    return du.t() @ x


def _by_parts(product: Callable[[Tensor], Tensor], x: Tensor, columns: int) -> Tensor:
    """product(x.float()), of so many columns and in the dtype of x, some rows at a time."""
    y = x.new_empty(x.shape[0], columns)
    for x_part, y_part in zip(x.split(_CONVERTED_ROWS), y.split(_CONVERTED_ROWS), strict=True):
        y_part.copy_(product(x_part.float()))
    return y


def add_product(a: Tensor, b: Tensor, c: Tensor, *, add: bool = True) -> Tensor:
    """c += a b, or c = a b: a (M, K) and b (K, N) of one dtype, c (M, N) float32, and float64 for float64."""
    if a.dtype == torch.float64:
        return c.addmm_(a, b, beta=int(add))
    _native.cpu.matmul(_along_one(a), _along_one(b), c, add, torch.get_num_threads())
    return c


def _along_one(x: Tensor) -> Tensor:
    return x if 1 in x.stride() else x.contiguous()
