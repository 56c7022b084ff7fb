"""Adam in Triton, and the norm of gradients: one launch for all tensors that share their dtypes.

Programs find their work in small tables: chunks (which tensor, from which element), which depends on the sizes only and
is kept, and addresses and what follows from the count of steps, which are made anew at each step, as gradients move.
Flat loops need the tensors of one parameter dense and laid out alike; where they are not, the step runs on copies that
are written back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._rounding import noise_of, noise_of_param
from fastlm.kernels._common import as_laid_out, capturing, flat
from fastlm.kernels.triton._common import INTERPRETED, launch, triton_kernel, widen

_BLOCK = 1024
# Elements of one program: enough to pay for finding them, few enough that small parameters do not wait for large ones.
_CHUNK = 8 * _BLOCK
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def at_address(p_addresses, i, i_first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p_x = tl.load(p_addresses + i).to(tl.pointer_type(TYPE)) + i_first
    if ALIGNED:  # in bytes, and unknown to the compiler otherwise, which then would load element by element
        p_x = tl.multiple_of(p_x, 16)
    return p_x


@triton.jit
def round_at_random(b_x, i_first, o_n, noise):
    """As fastlm._rounding.rounded_at_random: a float32 that a bfloat16 holds exactly."""
    o_at = i_first + o_n
    b_random = (o_at & 0xFFFFFFFF).to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32) + (o_at >> 32).to(tl.uint32)
    b_random += noise.to(tl.uint32)
    b_random = ((b_random ^ (b_random >> 15)) * tl.full((), 0x846CA68B, tl.uint32)) >> 16
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_cut = ((b_bits + b_random) & tl.full((), 0xFFFF0000, tl.uint32)).to(tl.float32, bitcast=True)
    finite = (b_bits & tl.full((), 0x7F800000, tl.uint32)) != tl.full((), 0x7F800000, tl.uint32)
    return tl.where(finite, b_cut, b_x)


@triton.jit
def adam_kernel(
    p_chunks, p_addresses, p_steps, p_noises, p_scale, beta2, one_minus_beta1, one_minus_beta2, eps, l2,
    TYPE: tl.constexpr, STATE: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr, HAS_L2: tl.constexpr,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr,
    STOCHASTIC_PARAMS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Addresses are N for each tensor: param, grad, exp_avg, exp_avg_sq and, with AMSGRAD, max_exp_avg_sq."""
    i_chunk = tl.program_id(0).to(tl.int64) * 3
    i_param = tl.load(p_chunks + i_chunk)
    i_tensor = i_param * N
    i_first = tl.load(p_chunks + i_chunk + 1)
    n = tl.load(p_chunks + i_chunk + 2)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    step_size = tl.load(p_steps + i_param * 3)
    inverse_root = tl.load(p_steps + i_param * 3 + 1)
    decay = tl.load(p_steps + i_param * 3 + 2)
    p_param = at_address(p_addresses, i_tensor, i_first, TYPE, ALIGNED)
    p_grad = at_address(p_addresses, i_tensor + 1, i_first, TYPE, ALIGNED)
    p_exp_avg = at_address(p_addresses, i_tensor + 2, i_first, STATE, ALIGNED)
    p_exp_avg_sq = at_address(p_addresses, i_tensor + 3, i_first, STATE, ALIGNED)
    for i_n in range(0, CHUNK, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < n
        # [BLOCK] each
        b_param = widen(tl.load(p_param + o_n, mask=m_n))
        b_grad = widen(tl.load(p_grad + o_n, mask=m_n))
        b_exp_avg = widen(tl.load(p_exp_avg + o_n, mask=m_n))
        b_exp_avg_sq = widen(tl.load(p_exp_avg_sq + o_n, mask=m_n))
        if SCALED:
            b_grad *= tl.load(p_scale).to(tl.float32)
        if MAXIMIZE:
            b_grad = -b_grad
        if HAS_L2:
            b_grad += l2 * b_param
        b_exp_avg += one_minus_beta1 * (b_grad - b_exp_avg)
        b_exp_avg_sq = beta2 * b_exp_avg_sq + one_minus_beta2 * b_grad * b_grad
        b_top = b_exp_avg_sq
        if AMSGRAD:
            p_max = at_address(p_addresses, i_tensor + 4, i_first, STATE, ALIGNED)
            # [BLOCK]
            b_top = widen(tl.load(p_max + o_n, mask=m_n))
            b_top = tl.where(b_top <= b_exp_avg_sq, b_exp_avg_sq, tl.where(b_exp_avg_sq <= b_top, b_top, float("nan")))
            tl.store(p_max + o_n, b_top.to(STATE), mask=m_n)
        b_update = tl.div_rn(b_exp_avg, tl.sqrt_rn(b_top) * inverse_root + eps)
        b_param = b_param * decay - step_size * b_update
        if STOCHASTIC_PARAMS:
            b_param = round_at_random(b_param, i_first, o_n, tl.load(p_noises + i_param * 2 + 1))
        if STOCHASTIC:
            b_exp_avg_sq = round_at_random(b_exp_avg_sq, i_first, o_n, tl.load(p_noises + i_param * 2))
        tl.store(p_param + o_n, b_param.to(TYPE), mask=m_n)
        tl.store(p_exp_avg + o_n, b_exp_avg.to(STATE), mask=m_n)
        tl.store(p_exp_avg_sq + o_n, b_exp_avg_sq.to(STATE), mask=m_n)


@triton.jit
def grad_norm_kernel(
    p_chunks, p_addresses, p_sums, TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of squares of each chunk: in float32 by thread, in float64 across them."""
    i_chunk = tl.program_id(0).to(tl.int64)
    i_first = tl.load(p_chunks + i_chunk * 3 + 1)
    n = tl.load(p_chunks + i_chunk * 3 + 2)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    p_x = at_address(p_addresses, tl.load(p_chunks + i_chunk * 3), i_first, TYPE, ALIGNED)
    b_sums = tl.zeros([BLOCK], dtype=tl.float32)
    for i_n in range(0, CHUNK, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        # [BLOCK]
        b_x = widen(tl.load(p_x + o_n, mask=o_n < n, other=0.0))
        b_sums += b_x * b_x
    tl.store(p_sums + i_chunk, tl.sum(b_sums.to(tl.float64), axis=0))


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(chunks, 3) int64: tensor, first element, number of elements."""
    rows = [(i, first, min(_CHUNK, n - first)) for i, n in enumerate(sizes) for first in range(0, n, _CHUNK)]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), 3).to(device)


@functools.lru_cache(maxsize=64)
def _places(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


def _unsupported(tensors: Sequence[Tensor], *rest: object) -> str | None:
    """Of parameters or gradients."""
    if INTERPRETED and tensors and tensors[0].is_cuda:
        return "is interpreted on the host, which cannot follow addresses of CUDA memory"
    return next((f"does not take {t.dtype}" for t in tensors if t.dtype not in _TYPES), None)


def _unsupported_extras(params: Sequence[Tensor], *rest: object) -> str | None:
    exp_avgs, (l1, found_inf, masters, emas, _, scales, _) = rest[1], rest[-7:]
    if any(x.dtype == torch.float32 and p.dtype == torch.float16 for p, x in zip(params, exp_avgs, strict=True)):
        return "does not take states in float32 of parameters in float16"
    if l1 or found_inf is not None or masters or emas or scales:
        return "does not take l1, found_inf, masters, emas and states of 8 bits"
    return _unsupported(params)


def _refuse_capture(op: str, x: Tensor) -> None:
    if capturing(x):
        raise RuntimeError(
            f"fastlm.{op} in Triton sends addresses from the host, which a CUDA graph would not do again"
        )


@triton_kernel("adam_", _unsupported_extras)
def adam_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, amsgrad: bool, maximize: bool, scale: Tensor | None, stochastic: bool,
    device_lr: Tensor | None, stochastic_params: bool, seed: int, *extras: object,
) -> None:  # fmt: skip
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else [])]
    if not params:
        return
    device = params[0].device
    _refuse_capture("adam_", params[0])
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[int, list[Tensor]]]] = {}
    copies = []  # kept until the kernels are launched: freed memory would go to the next copy
    for place, tensors in enumerate(zip(*lists, strict=True)):
        laid_out = _alike(list(tensors))
        copies += [(x, y, i != 1) for i, (x, y) in enumerate(zip(tensors, laid_out, strict=True)) if x is not y]
        aligned = tensors[0].numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in laid_out)
        groups.setdefault((tensors[0].dtype, tensors[2].dtype, aligned), []).append((place, laid_out))
    rate = lr if device_lr is None else device_lr.double().reshape(())
    for (dtype, state_dtype, aligned), members in groups.items():
        addresses = torch.tensor([x.data_ptr() for _, laid_out in members for x in laid_out], dtype=torch.int64)
        chunks = _chunks(tuple(laid_out[0].numel() for _, laid_out in members), device)
        t = torch.stack([steps[place].reshape(()) for place, _ in members]).double() + 1  # (parameters,)
        scalars = (rate / (1 - beta1**t), (1 - beta2**t) ** -0.5, 1 - rate * weight_decay if decoupled else 1.0)
        scalars = torch.stack([x + torch.zeros_like(t) for x in scalars], 1).float()
        at_random = stochastic and state_dtype == torch.bfloat16, stochastic_params and dtype == torch.bfloat16
        noises = None
        if any(at_random):
            noise = noise_of(t, _places(tuple(place for place, _ in members), t.device), seed)
            noises = _on(device, torch.stack([noise, noise_of_param(noise)], 1))
        launch(
            adam_kernel, len(chunks), chunks, _on(device, addresses), _on(device, scalars), noises, scale,
            beta2, 1 - beta1, 1 - beta2, eps, weight_decay,
            TYPE=_TYPES[dtype], STATE=_TYPES[state_dtype], N=len(lists), ALIGNED=aligned,
            HAS_L2=weight_decay != 0 and not decoupled, AMSGRAD=amsgrad, MAXIMIZE=maximize, SCALED=scale is not None,
            STOCHASTIC=at_random[0], STOCHASTIC_PARAMS=at_random[1], CHUNK=_CHUNK, BLOCK=_BLOCK,
        )  # fmt: skip
    for x, y, written in copies:  # all but the gradient, which is lists[1]
        if written:
            x.copy_(y)
    torch._foreach_add_(list(steps), 1)  # after the launches, any of which may fail


@triton_kernel("grad_norm", _unsupported)
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    device = grads[0].device
    _refuse_capture("grad_norm", grads[0])
    groups: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for g in grads:
        dense = flat(g if torch.ops.aten.is_non_overlapping_and_dense(g) else g.contiguous())
        groups.setdefault((g.dtype, g.numel() % 16 == 0 and dense.data_ptr() % 16 == 0), []).append(dense)
    found = []
    for (dtype, aligned), members in groups.items():
        addresses = torch.tensor([x.data_ptr() for x in members], dtype=torch.int64)
        chunks = _chunks(tuple(x.numel() for x in members), device)
        found.append(torch.empty(len(chunks), dtype=torch.float64, device=device))
        launch(
            grad_norm_kernel, len(chunks), chunks, _on(device, addresses), found[-1],
            TYPE=_TYPES[dtype], ALIGNED=aligned, CHUNK=_CHUNK, BLOCK=_BLOCK,
        )  # fmt: skip
    return torch.cat(found).sum().sqrt().float()


def _on(device: torch.device, x: Tensor) -> Tensor:
    """From pinned memory, so that the host does not wait for the GPU to finish the backward."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of one parameter in one dense layout: themselves where they are, else copies."""
    if all(x.is_contiguous() for x in tensors):
        return tensors
    like = torch.empty_like(tensors[0])
    return [as_laid_out(x, torch.empty_like(like, dtype=x.dtype)) for x in tensors]
