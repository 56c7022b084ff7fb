"""SGD in Triton: one launch for all tensors that share their dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton import _step
from fastlm.kernels.triton._common import loop_bound, triton_kernel, widen


@triton.jit
def sgd_kernel(
    p_chunks, p_addresses, p_steps, p_noises, p_scale, p_found, momentum, one_minus_dampening, l2, l1, ema_weight,
    TYPE: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    HAS_L2: tl.constexpr, HAS_L1: tl.constexpr, MAXIMIZE: tl.constexpr, HAS_MASTERS: tl.constexpr,
    HAS_EMAS: tl.constexpr, STOCHASTIC_PARAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_param, i_first, n = _step.chunk_of_program(p_chunks, p_found, ALIGNED)
    lr = tl.load(p_steps + i_param * 2)
    is_first = tl.load(p_steps + i_param * 2 + 1) != 0
    p_noise = p_noises + i_param * 2
    p_param = _step.tensor_at(p_addresses, i_param, _step.PARAM, i_first, TYPE, ALIGNED)
    p_grad = _step.tensor_at(p_addresses, i_param, _step.GRAD, i_first, TYPE, ALIGNED)
    p_buffer = _step.tensor_at(p_addresses, i_param, _step.FIRST, i_first, STATE, ALIGNED)
    p_master = _step.tensor_at(p_addresses, i_param, _step.MASTER, i_first, tl.float32, ALIGNED)
    p_ema = _step.tensor_at(p_addresses, i_param, _step.EMA, i_first, tl.float32, ALIGNED)
    for i_n in range(0, loop_bound(n), BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < n
        # [BLOCK] each
        b_param = widen(tl.load((p_master if HAS_MASTERS else p_param) + o_n, mask=m_n))
        b_grad = widen(tl.load(p_grad + o_n, mask=m_n))
        b_grad = _step.seen_gradient(b_grad, b_param, p_scale, l2, l1, HAS_L2, HAS_L1, MAXIMIZE)
        if HAS_MOMENTUM:
            b_buffer = widen(tl.load(p_buffer + o_n, mask=m_n))
            # Selected, not multiplied by 0: before the first step it may hold anything.
            b_buffer = tl.where(is_first, b_grad, momentum * b_buffer + one_minus_dampening * b_grad)
            b_grad = b_grad + momentum * b_buffer if NESTEROV else b_buffer
            tl.store(p_buffer + o_n, b_buffer.to(STATE), mask=m_n)
        _step.store_param(
            p_param, p_master, p_ema, i_first, o_n, m_n, b_param - lr * b_grad, p_noise + 1, ema_weight, TYPE,
            HAS_MASTERS, HAS_EMAS, STOCHASTIC_PARAMS,
        )  # fmt: skip


@triton_kernel("sgd_", _step.unsupported)
def sgd_(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], steps: Sequence[Tensor],
    lr: float, momentum: float, dampening: float, weight_decay: float, l1: float, nesterov: bool, maximize: bool,
    scale: Tensor | None, device_lr: Tensor | None, found_inf: Tensor | None, masters: Sequence[Tensor],
    emas: Sequence[Tensor], ema_decay: float, stochastic_params: bool, seed: int,
) -> None:  # fmt: skip
    if not params:
        return
    device = params[0].device
    _step.refuse_capture("sgd_", params[0])
    launches, copies = _step.work_on((params, grads, momentum_buffers, (), (), masters, emas))
    rate = lr if device_lr is None else device_lr.double().reshape(())
    for work in launches:
        if steps:
            t = _step.counted(steps, work.places)
        else:  # which nothing depends on
            t = torch.zeros(len(work.places), dtype=torch.float64, device=getattr(rate, "device", "cpu"))
        scalars = torch.stack([rate + torch.zeros_like(t), (t == 1).double()], 1).float()
        at_random = stochastic_params and work.dtype == torch.bfloat16
        noises = _step.noises_of(t, work.places, seed, device) if at_random else work.addresses  # not read
        _step.launch_on(
            work, sgd_kernel, _step.on(device, scalars), noises, scale, found_inf, momentum, 1 - dampening,
            weight_decay, l1, 1 - ema_decay, HAS_MOMENTUM=momentum != 0, NESTEROV=nesterov, HAS_L2=weight_decay != 0,
            HAS_L1=l1 != 0, MAXIMIZE=maximize, HAS_MASTERS=bool(masters), HAS_EMAS=bool(emas),
            STOCHASTIC_PARAMS=at_random,
        )  # fmt: skip
    _step.write_back(copies)
    _step.count(steps, found_inf)
