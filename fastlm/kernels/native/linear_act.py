"""act(x weight' + bias): products of products.py, activations of csrc/cpu/activation.cpp; on a GPU products_gpu.py and
csrc/cuda/activation.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastlm import _native
from fastlm._activations import SAVE_OUTPUT
from fastlm._library import kernel
from fastlm.kernels import products_gpu
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.native._common import act_backward_on_gpu, bias_act_backward_on_gpu, current_stream


def _register(
    device: str,
    products: ModuleType,
    forward: Callable[[Tensor, Tensor, str], None],
    gradient: Callable[[Tensor, Tensor, str], Tensor],
    gradient_and_sums: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]],
) -> None:
    """forward(u, y, act) writes y, which may be u; gradient(dy, saved, act), alone and with its sums over the rows. All
    of contiguous tensors.
    """

    @kernel("linear_act", backend="native", device=device, supports=unsupported_dtype)
    def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, keep: bool) -> tuple[Tensor, Tensor]:
        u = products.linear(x, weight, bias)
        keep = keep and act not in SAVE_OUTPUT
        y = torch.empty_like(u) if keep else u
        if act != "none":
            forward(u, y, act)
        return y, u if keep else u.new_empty(0)

    @kernel("linear_act_backward", backend="native", device=device, supports=unsupported_dtype)
    def linear_act_backward(
        dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, act: str, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy, saved = dy.contiguous(), saved.contiguous()
        dbias = dy.new_empty(0)
        if act == "none":
            du, dbias = dy, dy.sum(0) if wanted[2] else dbias
        elif wanted[2]:
            du, sums = gradient_and_sums(dy, saved, act)  # no bias: it is in `saved` already
            dbias = sums.to(dy.dtype)
        else:
            du = gradient(dy, saved, act)
        dx = products.input_gradient(du, weight) if wanted[0] else dy.new_empty(0)
        dweight = products.weight_gradient(du, x) if wanted[1] else dy.new_empty(0)
        return dx, dweight, dbias


if _native.cpu is not None:
    from fastlm.kernels.native import products
    from fastlm.kernels.native.activation import ACTS, gradient

    def _forward(u: Tensor, y: Tensor, act: str) -> None:
        _native.cpu.act_forward(u, y, ACTS[act], torch.get_num_threads())

    def _gradient_and_sums(dy: Tensor, saved: Tensor, act: str) -> tuple[Tensor, Tensor]:
        du = torch.empty_like(dy)
        sums = dy.new_empty(dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
        _native.cpu.bias_act_backward(dy, saved, None, du, sums, ACTS[act], torch.get_num_threads())
        return du, sums

    _register("cpu", products, _forward, lambda dy, at, act: gradient(dy, at, ACTS[act]), _gradient_and_sums)

if _native.cuda is not None:
    _cuda = _native.cuda
    _CUDA_ACTS = {name: i for i, name in enumerate(_cuda.acts)}
    _register(
        "cuda",
        products_gpu,
        lambda u, y, act: _cuda.act_forward(u, y, _CUDA_ACTS[act], current_stream(u)),
        lambda dy, saved, act: act_backward_on_gpu(_cuda, current_stream(dy), dy, saved, _CUDA_ACTS[act]),
        lambda dy, saved, act: bias_act_backward_on_gpu(_cuda, current_stream(dy), dy, saved, None, _CUDA_ACTS[act]),
    )
