"""act(x weight' + bias): products of products.py, activations of csrc/cpu/activation.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._activations import SAVE_OUTPUT
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype

if _native.cpu is not None:
    from fastlm.kernels.native.activation import ACTS, gradient
    from fastlm.kernels.native.products import input_gradient, linear, weight_gradient

    @kernel("linear_act", backend="native", device="cpu", supports=unsupported_dtype)
    def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, keep: bool) -> tuple[Tensor, Tensor]:
        u = linear(x, weight, bias)
        keep = keep and act not in SAVE_OUTPUT
        y = torch.empty_like(u) if keep else u
        if act != "none":
            _native.cpu.act_forward(u, y, ACTS[act], torch.get_num_threads())
        return y, u if keep else u.new_empty(0)

    @kernel("linear_act_backward", backend="native", device="cpu", supports=unsupported_dtype)
    def linear_act_backward(
        dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, act: str, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy = dy.contiguous()
        if act == "none":
            du, dbias = dy, dy.sum(0) if wanted[2] else dy.new_empty(0)
        elif wanted[2]:
            du = torch.empty_like(dy)
            sums = dy.new_empty(dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
            _native.cpu.bias_act_backward(
                dy, saved.contiguous(), None, du, sums, ACTS[act], torch.get_num_threads()
            )  # no bias: it is in `saved` already
            dbias = sums.to(dy.dtype)
        else:
            du, dbias = gradient(dy, saved.contiguous(), ACTS[act]), dy.new_empty(0)
        dx = input_gradient(du, weight) if wanted[0] else dy.new_empty(0)
        dweight = weight_gradient(du, x) if wanted[1] else dy.new_empty(0)
        return dx, dweight, dbias
