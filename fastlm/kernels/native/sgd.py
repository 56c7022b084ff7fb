"""SGD in C++: csrc/cpu/optimizer.cpp, csrc/cuda/optimizer.cu."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import number
from fastlm.kernels.native._common import current_stream, on_gpu, readable, step_workspace
from fastlm.kernels.native.adam import _unsupported

if _native.cpu is not None:
    _step = _native.cpu.sgd_step

    @kernel("sgd_", backend="native", device="cpu", supports=_unsupported, checks=True)
    def sgd_(params, grads, momentum_buffers, steps, lr, *args) -> None:
        *args, scale, device_lr, found_inf, masters, emas, ema_decay, stochastic_params, seed = args
        if number(found_inf, 0.0) != 0:
            return
        if masters and stochastic_params:
            raise ValueError("fastlm: parameters that have masters are not rounded at random")
        _step(
            params, grads, momentum_buffers, steps, number(device_lr, lr), *args, number(scale, 1.0), masters, emas,
            ema_decay, stochastic_params, seed & 0xFFFFFFFF, torch.get_num_threads(),
        )  # fmt: skip


if _native.cuda is not None:
    _cuda = _native.cuda

    @kernel("sgd_", backend="native", device="cuda", supports=_unsupported)
    def sgd_cuda(params, grads, momentum_buffers, steps, *args) -> None:
        *args, scale, device_lr, found_inf, masters, emas, ema_decay, stochastic_params, seed = args
        if not params:
            return
        workspace = step_workspace("sgd_", _cuda, params, steps, bool(steps) and on_gpu(steps[0]))
        _cuda.sgd_step(
            params, grads, momentum_buffers, steps, *args, readable(scale), readable(device_lr), readable(found_inf),
            masters, emas, ema_decay, stochastic_params, seed & 0xFFFFFFFF, workspace, current_stream(params[0]),
        )  # fmt: skip
