"""Adam in C++: csrc/cpu/optimizer.cpp, csrc/cuda/optimizer.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import FLOATS, as_laid_out, flat, number
from fastlm.kernels.native._common import current_stream, on_gpu, readable, step_workspace


def _unsupported(params: Sequence[Tensor], *rest: object) -> str | None:
    for p in params:
        if p.dtype not in FLOATS:
            return f"does not take {p.dtype}"
        if p.dim() > 8:
            return f"does not take {p.dim()} dimensions"
    return None


def _unsupported_norm(grads: Sequence[Tensor]) -> str | None:
    return next((f"does not take {g.dtype}" for g in grads if g.dtype not in FLOATS), None)


def _norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32


def _dense(grads: Sequence[Tensor]) -> list[Tensor]:
    return [flat(g if torch.ops.aten.is_non_overlapping_and_dense(g) else g.contiguous()) for g in grads]


def _laid_out(params: Sequence[Tensor], *lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Blocks of 8 bits go by memory, in which all else has to lie alike then."""
    return [[as_laid_out(x, p) for x, p in zip(xs, params, strict=bool(xs))] for xs in lists]


def _put_back(laid: Sequence[Sequence[Tensor]], lists: Sequence[Sequence[Tensor]]) -> None:
    for copies, tensors in zip(laid, lists, strict=True):
        for copy, to in zip(copies, tensors, strict=True):
            if to is not copy:
                to.copy_(copy)


if _native.cpu is not None:
    _step = _native.cpu.adam_step

    @kernel("adam_", backend="native", device="cpu", supports=_unsupported, checks=True)
    def adam_(params, grads, exp_avgs, exp_avg_sqs, tops, steps, lr, *args) -> None:
        *args, scale, stochastic, device_lr, random, seed, l1, found_inf, masters, emas, ema_decay, of_m, of_v = args
        if number(found_inf, 0.0) != 0:
            return
        if masters and random:
            raise ValueError("fastlm: parameters that have masters are not rounded at random")
        laid = _laid_out(params, grads, masters, emas) if of_m else (grads, masters, emas)
        _step(
            params, laid[0], exp_avgs, exp_avg_sqs, tops, steps, number(device_lr, lr), *args, number(scale, 1.0),
            stochastic, random, seed & 0xFFFFFFFF, l1, laid[1], laid[2], ema_decay, of_m, of_v,
            torch.get_num_threads(),
        )  # fmt: skip
        _put_back(laid[1:], (masters, emas))

    @kernel("grad_norm", backend="native", device="cpu", supports=_unsupported_norm)
    def grad_norm(grads: Sequence[Tensor]) -> Tensor:
        total = _native.cpu.sum_of_squares(_dense(grads), torch.get_num_threads()) ** 0.5
        return torch.tensor(total, dtype=_norm_dtype(grads), device="cpu")


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("adam_", backend="native", device="cuda", supports=_unsupported)
    def adam_cuda(params, grads, exp_avgs, exp_avg_sqs, tops, steps, *args) -> None:
        if not params:
            return
        *args, masters, emas, ema_decay, of_m, of_v = args
        *args, scale, stochastic, device_lr, stochastic_params, seed, l1, found_inf = args
        laid = _laid_out(params, grads, masters, emas) if of_m else (grads, masters, emas)
        workspace = step_workspace("adam_", _cuda, params, steps, on_gpu(steps[0]))
        _cuda.adam_step(
            params, laid[0], exp_avgs, exp_avg_sqs, tops, steps, *args, readable(scale), stochastic,
            readable(device_lr), stochastic_params, seed & 0xFFFFFFFF, l1, readable(found_inf), laid[1], laid[2],
            ema_decay, of_m, of_v, workspace, current_stream(params[0]),
        )  # fmt: skip
        _put_back(laid[1:], (masters, emas))

    @kernel("grad_norm", backend="native", device="cuda", supports=_unsupported_norm)
    def grad_norm_cuda(grads: Sequence[Tensor]) -> Tensor:
        dense, device = _dense(grads), grads[0].device
        norm = torch.empty((), dtype=_norm_dtype(grads), device=device)
        partial = torch.empty(_cuda.grad_norm_chunks(dense), dtype=torch.float64, device=device)
        _cuda.grad_norm(dense, norm, partial, current_stream(norm))
        return norm
