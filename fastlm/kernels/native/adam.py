"""Adam in C++: csrc/cpu/optimizer.cpp, csrc/cuda/optimizer.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import FLOATS, as_laid_out, flat
from fastlm.kernels.native._common import current_stream, on_gpu, readable, step_workspace


def _unsupported(params: Sequence[Tensor], *rest: object) -> str | None:
    for p in params:
        if p.dtype not in FLOATS:
            return f"does not take {p.dtype}"
        if p.dim() > 8:
            return f"does not take {p.dim()} dimensions"
    return None


def _unsupported_extras(params: Sequence[Tensor], *rest: object) -> str | None:
    exp_avgs, (l1, found_inf, masters, emas, _, scales, _) = rest[1], rest[-7:]
    if any(x.dtype == torch.float32 and p.dtype == torch.float16 for p, x in zip(params, exp_avgs, strict=True)):
        return "does not take states in float32 of parameters in float16"
    if l1 or found_inf is not None or masters or emas or scales:
        return "does not take l1, found_inf, masters, emas and states of 8 bits"
    return _unsupported(params)


def _unsupported_norm(grads: Sequence[Tensor]) -> str | None:
    return next((f"does not take {g.dtype}" for g in grads if g.dtype not in FLOATS), None)


def _norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32


def _dense(grads: Sequence[Tensor]) -> list[Tensor]:
    return [flat(g if torch.ops.aten.is_non_overlapping_and_dense(g) else g.contiguous()) for g in grads]


if _native.cpu is not None:
    _step = _native.cpu.adam_step

    @kernel("adam_", backend="native", device="cpu", supports=_unsupported_extras)
    def adam_(params, grads, exp_avgs, exp_avg_sqs, tops, steps, lr, *args) -> None:
        *args, scale, stochastic, device_lr, stochastic_params, seed, l1, _, masters, emas, ema_decay, of_m, of_v = args
        _step(
            params, grads, exp_avgs, exp_avg_sqs, tops, steps, lr if device_lr is None else device_lr.item(), *args,
            1.0 if scale is None else scale.item(), stochastic, stochastic_params, seed & 0xFFFFFFFF, l1, masters, emas,
            ema_decay, of_m, of_v, torch.get_num_threads(),
        )  # fmt: skip

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
        # Blocks of 8 bits go by memory, in which all else has to lie alike then.
        laid = [
            [as_laid_out(x, p) for x, p in zip(xs, params, strict=bool(xs))] if of_m else xs
            for xs in (grads, masters, emas)
        ]
        workspace = step_workspace("adam_", _cuda, params, steps, on_gpu(steps[0]))
        _cuda.adam_step(
            params, laid[0], exp_avgs, exp_avg_sqs, tops, steps, *args, readable(scale), stochastic,
            readable(device_lr), stochastic_params, seed & 0xFFFFFFFF, l1, readable(found_inf), laid[1], laid[2],
            ema_decay, of_m, of_v, workspace, current_stream(params[0]),
        )  # fmt: skip
        for to, copy in zip([*masters, *emas], [*laid[1], *laid[2]], strict=True):
            if to is not copy:
                to.copy_(copy)

    @kernel("grad_norm", backend="native", device="cuda", supports=_unsupported_norm)
    def grad_norm_cuda(grads: Sequence[Tensor]) -> Tensor:
        dense, device = _dense(grads), grads[0].device
        norm = torch.empty((), dtype=_norm_dtype(grads), device=device)
        partial = torch.empty(_cuda.grad_norm_chunks(dense), dtype=torch.float64, device=device)
        _cuda.grad_norm(dense, norm, partial, current_stream(norm))
        return norm
