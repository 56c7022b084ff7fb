"""The products of a linear layer on a GPU, under the names of products.py: torch's, through cuBLAS. In float32 they use
TF32 where torch.backends.cuda.matmul allows it, which it does not until somebody says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

linear = F.linear  # the bias is added where the product is written


def by_conversion(x: Tensor) -> bool:
    return False


def input_gradient(du: Tensor, weight: Tensor) -> Tensor:
    """du (M, N), weight (N, K) -> du weight (M, K)."""
    return du @ weight


def weight_gradient(du: Tensor, x: Tensor) -> Tensor:
    """du (M, N), x (M, K) -> du' x (N, K)."""
    return du.t() @ x


def unsupported_sum(x: Tensor) -> str | None:
    """Why add_product cannot take factors like x here."""
    if x.element_size() == 2 and not hasattr(torch.ops.aten.baddbmm, "dtype_out"):
        return "needs torch 2.8 to sum products of 16 bits in float32"
    return None


def add_product(a: Tensor, b: Tensor, c: Tensor, *, add: bool = True) -> Tensor:
    """c += a b, or c = a b: a (M, K) and b (K, N) of one dtype, c (M, N) of it or, if it has 16 bits, float32."""
    if a.dtype == c.dtype:
        return c.addmm_(a, b, beta=int(add))
    # Not addmm, which came with 2.8 as well but at first wanted the sum in the factors' dtype.
    batch = c[None]
    torch.ops.aten.baddbmm.dtype_out(batch, a[None], b[None], c.dtype, beta=int(add), out=batch)
    return c
