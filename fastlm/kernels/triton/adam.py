"""Adam in Triton: one launch for all parameters that share a dtype and a step count.

Programs find their work in two small tables: chunks (which tensor, from which element), which depends on the sizes only
and is kept, and addresses, which is made anew at each step, as gradients move. Flat loops need the tensors of one
parameter dense and laid out alike; where they are not, the step runs on copies that are written back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels._common import as_laid_out, unsupported_adam_on_gpu
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
def adam_kernel(
    p_chunks, p_addresses, step_size, inverse_root, beta2, one_minus_beta1, one_minus_beta2, eps, decay, l2,
    TYPE: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr, HAS_L2: tl.constexpr, AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Addresses are N for each tensor: param, grad, exp_avg, exp_avg_sq and, with AMSGRAD, max_exp_avg_sq."""
    i_chunk = tl.program_id(0).to(tl.int64) * 3
    i_tensor = tl.load(p_chunks + i_chunk) * N
    i_first = tl.load(p_chunks + i_chunk + 1)
    n = tl.load(p_chunks + i_chunk + 2)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    p_param = at_address(p_addresses, i_tensor, i_first, TYPE, ALIGNED)
    p_grad = at_address(p_addresses, i_tensor + 1, i_first, TYPE, ALIGNED)
    p_exp_avg = at_address(p_addresses, i_tensor + 2, i_first, TYPE, ALIGNED)
    p_exp_avg_sq = at_address(p_addresses, i_tensor + 3, i_first, TYPE, ALIGNED)
    for i_n in range(0, CHUNK, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < n
        # [BLOCK] each
        b_param = widen(tl.load(p_param + o_n, mask=m_n))
        b_grad = widen(tl.load(p_grad + o_n, mask=m_n))
        b_exp_avg = widen(tl.load(p_exp_avg + o_n, mask=m_n))
        b_exp_avg_sq = widen(tl.load(p_exp_avg_sq + o_n, mask=m_n))
        if MAXIMIZE:
            b_grad = -b_grad
        if HAS_L2:
            b_grad += l2 * b_param
        b_exp_avg += one_minus_beta1 * (b_grad - b_exp_avg)
        b_exp_avg_sq = beta2 * b_exp_avg_sq + one_minus_beta2 * b_grad * b_grad
        b_top = b_exp_avg_sq
        if AMSGRAD:
            p_max = at_address(p_addresses, i_tensor + 4, i_first, TYPE, ALIGNED)
            # [BLOCK]
            b_top = widen(tl.load(p_max + o_n, mask=m_n))
            b_top = tl.where(b_top <= b_exp_avg_sq, b_exp_avg_sq, tl.where(b_exp_avg_sq <= b_top, b_top, float("nan")))
            tl.store(p_max + o_n, b_top.to(TYPE), mask=m_n)
        b_update = tl.div_rn(b_exp_avg, tl.sqrt_rn(b_top) * inverse_root + eps)
        tl.store(p_param + o_n, (b_param * decay - step_size * b_update).to(TYPE), mask=m_n)
        tl.store(p_exp_avg + o_n, b_exp_avg.to(TYPE), mask=m_n)
        tl.store(p_exp_avg_sq + o_n, b_exp_avg_sq.to(TYPE), mask=m_n)


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(chunks, 3) int64: tensor, first element, number of elements."""
    rows = [(i, first, min(_CHUNK, n - first)) for i, n in enumerate(sizes) for first in range(0, n, _CHUNK)]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), 3).to(device)


def _unsupported(params: Sequence[Tensor], *rest: object) -> str | None:
    if (problem := unsupported_adam_on_gpu(params, *rest)) is not None:
        return problem
    if INTERPRETED and params and params[0].is_cuda:
        return "is interpreted on the host, which cannot follow addresses of CUDA memory"
    return next((f"does not take {p.dtype}" for p in params if p.dtype not in _TYPES), None)


@triton_kernel("adam_", _unsupported)
def adam_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, amsgrad: bool, maximize: bool,
    scale: None, stochastic: bool,
) -> None:  # fmt: skip
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else [])]
    if not params:
        return
    device = params[0].device
    groups: dict[tuple[torch.dtype, float, bool], tuple[list[int], list[int]]] = {}
    copies = []  # kept until the kernels are launched: freed memory would go to the next copy
    for step, *tensors in zip(steps, *lists, strict=True):
        laid_out = _alike(tensors)
        copies += [(x, y, i != 1) for i, (x, y) in enumerate(zip(tensors, laid_out, strict=True)) if x is not y]
        n, here = tensors[0].numel(), [x.data_ptr() for x in laid_out]
        aligned = n % 16 == 0 and all(a % 16 == 0 for a in here)
        sizes, addresses = groups.setdefault((tensors[0].dtype, step.item() + 1, aligned), ([], []))
        sizes.append(n)
        addresses += here
    for (dtype, t, aligned), (sizes, addresses) in groups.items():
        # From pinned memory, so that the host does not wait for the GPU to finish the backward.
        table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
        chunks = _chunks(tuple(sizes), device)
        launch(
            adam_kernel, len(chunks), chunks, table.to(device, non_blocking=True),
            lr / (1 - beta1**t), (1 - beta2**t) ** -0.5, beta2, 1 - beta1, 1 - beta2, eps,
            1 - lr * weight_decay if decoupled else 1.0, weight_decay,
            TYPE=_TYPES[dtype], N=len(lists), ALIGNED=aligned,
            HAS_L2=weight_decay != 0 and not decoupled, AMSGRAD=amsgrad, MAXIMIZE=maximize, CHUNK=_CHUNK, BLOCK=_BLOCK,
        )  # fmt: skip
    for x, y, written in copies:  # all but the gradient, which is lists[1]
        if written:
            x.copy_(y)
    torch._foreach_add_(list(steps), 1)  # after the launches, any of which may fail


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of one parameter in one dense layout: themselves where they are, else copies."""
    if all(x.is_contiguous() for x in tensors):
        return tensors
    like = torch.empty_like(tensors[0])
    return [as_laid_out(x, like) for x in tensors]
