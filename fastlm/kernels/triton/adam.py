"""Adam in Triton, and the norm of gradients: one launch for all tensors that share their dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._common import flat
from fastlm.kernels.triton import _step
from fastlm.kernels.triton._common import launch, loop_bound, triton_kernel, widen


@triton.jit
def adam_kernel(
    p_chunks, p_addresses, p_steps, p_noises, p_scale, p_found, beta2, one_minus_beta1, one_minus_beta2, eps, l2, l1,
    ema_weight, TYPE: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, EIGHT_BIT: tl.constexpr,
    HAS_L2: tl.constexpr, HAS_L1: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    HAS_MASTERS: tl.constexpr, HAS_EMAS: tl.constexpr, STOCHASTIC: tl.constexpr, STOCHASTIC_PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_param, i_first, n = _step.chunk_of_program(p_chunks, p_found, ALIGNED)
    step_size = tl.load(p_steps + i_param * 3)
    inverse_root = tl.load(p_steps + i_param * 3 + 1)
    decay = tl.load(p_steps + i_param * 3 + 2)
    p_noise = p_noises + i_param * 2
    p_param = _step.tensor_at(p_addresses, i_param, _step.PARAM, i_first, TYPE, ALIGNED)
    p_grad = _step.tensor_at(p_addresses, i_param, _step.GRAD, i_first, TYPE, ALIGNED)
    p_exp_avg = _step.tensor_at(p_addresses, i_param, _step.FIRST, i_first, STATE, ALIGNED)
    p_exp_avg_sq = _step.tensor_at(p_addresses, i_param, _step.SECOND, i_first, STATE, ALIGNED)
    p_top = _step.tensor_at(p_addresses, i_param, _step.TOP, i_first, STATE, ALIGNED)
    p_master = _step.tensor_at(p_addresses, i_param, _step.MASTER, i_first, tl.float32, ALIGNED)
    p_ema = _step.tensor_at(p_addresses, i_param, _step.EMA, i_first, tl.float32, ALIGNED)
    p_scales = _step.tensor_at(p_addresses, i_param, _step.FIRST_SCALES, i_first // _step.ROW, tl.float32, False)
    p_sq_scales = _step.tensor_at(p_addresses, i_param, _step.SECOND_SCALES, i_first // _step.ROW, tl.float32, False)
    for i_n in range(0, loop_bound(n), BLOCK):
        if EIGHT_BIT:
            o_n = i_n + tl.arange(0, BLOCK // _step.ROW)[:, None] * _step.ROW + tl.arange(0, _step.ROW)[None, :]
        else:
            o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < n
        # [BLOCK] each, or [BLOCK / ROW, ROW]
        b_param = widen(tl.load((p_master if HAS_MASTERS else p_param) + o_n, mask=m_n))
        b_grad = widen(tl.load(p_grad + o_n, mask=m_n))
        b_exp_avg = tl.load(p_exp_avg + o_n, mask=m_n)
        b_exp_avg_sq = tl.load(p_exp_avg_sq + o_n, mask=m_n)
        if EIGHT_BIT:
            # [BLOCK / ROW, 1]
            p_row, m_row = _step.scales_of(p_scales, i_n, n, BLOCK)
            p_sq_row, _ = _step.scales_of(p_sq_scales, i_n, n, BLOCK)
            b_exp_avg = _step.unpack(b_exp_avg, tl.load(p_row, mask=m_row), True)
            b_exp_avg_sq = _step.unpack(b_exp_avg_sq, tl.load(p_sq_row, mask=m_row), False)
        b_grad = _step.seen_gradient(b_grad, b_param, p_scale, l2, l1, HAS_L2, HAS_L1, MAXIMIZE)
        b_exp_avg = _step.lerp(widen(b_exp_avg), b_grad, one_minus_beta1)
        b_exp_avg_sq = beta2 * widen(b_exp_avg_sq) + one_minus_beta2 * b_grad * b_grad
        b_top = b_exp_avg_sq
        if AMSGRAD:
            b_top = widen(tl.load(p_top + o_n, mask=m_n))
            b_top = tl.where(b_top <= b_exp_avg_sq, b_exp_avg_sq, tl.where(b_exp_avg_sq <= b_top, b_top, float("nan")))
            tl.store(p_top + o_n, b_top.to(STATE), mask=m_n)
        b_update = tl.div_rn(b_exp_avg, tl.sqrt_rn(b_top) * inverse_root + eps)
        b_param = b_param * decay - step_size * b_update
        _step.store_param(
            p_param, p_master, p_ema, i_first, o_n, m_n, b_param, p_noise + 1, ema_weight, TYPE, HAS_MASTERS, HAS_EMAS,
            STOCHASTIC_PARAMS,
        )  # fmt: skip
        if EIGHT_BIT:  # what is past the end takes no part in the scales
            b_random = _step.random_words(i_first, o_n, tl.load(p_noise))
            b_exp_avg, b_scales = _step.pack(tl.where(m_n, b_exp_avg, 0.0), b_random, True)
            b_exp_avg_sq, b_sq_scales = _step.pack(tl.where(m_n, b_exp_avg_sq, 0.0), b_random, False)
            tl.store(p_row, b_scales, mask=m_row)
            tl.store(p_sq_row, b_sq_scales, mask=m_row)
        if STOCHASTIC:
            b_exp_avg_sq = _step.round_at_random(b_exp_avg_sq, i_first, o_n, tl.load(p_noise))
        tl.store(p_exp_avg + o_n, b_exp_avg.to(STATE), mask=m_n)
        tl.store(p_exp_avg_sq + o_n, b_exp_avg_sq.to(STATE), mask=m_n)


@triton.jit
def grad_norm_kernel(
    p_chunks, p_addresses, p_sums, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of squares of each chunk: in float32 by thread, in float64 across them."""
    i_tensor, i_first, n = _step.chunk_of_program(p_chunks, None, ALIGNED)
    p_x = _step.at_address(p_addresses, i_tensor, i_first, TYPE, ALIGNED)
    b_sums = tl.zeros([BLOCK], dtype=tl.float32)
    for i_n in range(0, loop_bound(n), BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        # [BLOCK]
        b_x = widen(tl.load(p_x + o_n, mask=o_n < n, other=0.0))
        b_sums += b_x * b_x
    tl.store(p_sums + tl.program_id(0), tl.sum(b_sums.to(tl.float64), axis=0))


@triton_kernel("adam_", _step.unsupported)
def adam_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, amsgrad: bool, maximize: bool, scale: Tensor | None, stochastic: bool,
    device_lr: Tensor | None, stochastic_params: bool, seed: int, l1: float, found_inf: Tensor | None,
    masters: Sequence[Tensor], emas: Sequence[Tensor], ema_decay: float, exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
) -> None:  # fmt: skip
    if not params:
        return
    device = params[0].device
    _step.refuse_capture("adam_", params[0])
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas)
    launches, copies = _step.work_on(lists, (exp_avg_scales, exp_avg_sq_scales))
    rate = lr if device_lr is None else device_lr.double().reshape(())
    for work in launches:
        t = _step.counted(steps, work.places)
        scalars = (rate / (1 - beta1**t), (1 - beta2**t) ** -0.5, 1 - rate * weight_decay if decoupled else 1.0)
        scalars = torch.stack([x + torch.zeros_like(t) for x in scalars], 1).float()
        eight_bit = work.state_dtype == torch.uint8
        at_random = stochastic and work.state_dtype == torch.bfloat16
        params_at_random = stochastic_params and work.dtype == torch.bfloat16
        noises = work.addresses  # not read
        if eight_bit or at_random or params_at_random:
            noises = _step.noises_of(t, work.places, seed, device)
        _step.launch_on(
            work, adam_kernel, _step.on(device, scalars), noises, scale, found_inf, beta2, 1 - beta1, 1 - beta2, eps,
            weight_decay, l1, 1 - ema_decay, EIGHT_BIT=eight_bit, HAS_L2=weight_decay != 0 and not decoupled,
            HAS_L1=l1 != 0, AMSGRAD=amsgrad, MAXIMIZE=maximize, HAS_MASTERS=bool(masters), HAS_EMAS=bool(emas),
            STOCHASTIC=at_random, STOCHASTIC_PARAMS=params_at_random,
        )  # fmt: skip
    _step.write_back(copies)
    _step.count(steps, found_inf)


@triton_kernel("grad_norm", _step.unsupported)
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    device = grads[0].device
    _step.refuse_capture("grad_norm", grads[0])
    groups: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for g in grads:
        dense = flat(g if torch.ops.aten.is_non_overlapping_and_dense(g) else g.contiguous())
        groups.setdefault((g.dtype, g.numel() % 16 == 0 and dense.data_ptr() % 16 == 0), []).append(dense)
    found = []
    for (dtype, aligned), members in groups.items():
        addresses = torch.tensor([x.data_ptr() for x in members], dtype=torch.int64)
        chunks = _step.chunks_of(tuple(x.numel() for x in members), device)
        found.append(torch.empty(len(chunks), dtype=torch.float64, device=device))
        launch(
            grad_norm_kernel, len(chunks), chunks, _step.on(device, addresses), found[-1],
            TYPE=_step.TYPES[dtype], ALIGNED=aligned, BLOCK=_step.BLOCK,
        )  # fmt: skip
    return torch.cat(found).sum().sqrt().float()
