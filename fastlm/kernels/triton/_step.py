"""What the Triton kernels of optimizers share: how programs find their work, and what stands around the rule of a step.

Programs find their work in small tables: chunks (which tensor, from which element), which depends on the sizes only and
is kept, and addresses and what follows from the count of steps, which are made anew at each step, as gradients move.
Flat loops need the tensors of one parameter dense and laid out alike; where they are not, the step runs on copies that
are written back. States of 8 bits come in rows of 256 elements, a scale for each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._eight_bit import BLOCK as _ROW
from fastlm._rounding import noise_of, noise_of_param
from fastlm.kernels._common import as_laid_out, capturing
from fastlm.kernels.triton._common import INTERPRETED, launch, widen

BLOCK = 1024
# Elements of one program: enough to pay for finding them, few enough that small parameters do not wait for large ones.
CHUNK = 8 * BLOCK
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}
# The tensors of one parameter, by their place in its row of the table of addresses; 0 where there is none.
_TENSORS = 9
PARAM, GRAD, FIRST, SECOND, TOP, MASTER, EMA, FIRST_SCALES, SECOND_SCALES = map(tl.constexpr, range(_TENSORS))
ROW = tl.constexpr(_ROW)
_IN_ROW = tl.constexpr(_TENSORS)
_CUT, _RANDOM_OF_MEAN = tl.constexpr(20), tl.constexpr(0xFFFF0)  # as in fastlm._eight_bit


# --- in kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def chunk_of_program(p_chunks, p_found, ALIGNED: tl.constexpr):
    """Which tensor, from which element, how many of them: none where a step is skipped."""
    i_chunk = tl.program_id(0).to(tl.int64) * 3
    n = tl.load(p_chunks + i_chunk + 2).to(tl.int32)
    if p_found is not None:
        n = tl.where(widen(tl.load(p_found)) == 0, n, 0)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    return tl.load(p_chunks + i_chunk), tl.load(p_chunks + i_chunk + 1), n


@triton.jit
def at_address(p_addresses, i, i_first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p_x = tl.load(p_addresses + i).to(tl.pointer_type(TYPE)) + i_first
    if ALIGNED:  # in bytes, and unknown to the compiler otherwise, which then would load element by element
        p_x = tl.multiple_of(p_x, 16)
    return p_x


@triton.jit
def tensor_at(p_addresses, i_param, PLACE: tl.constexpr, i_first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    return at_address(p_addresses, i_param * _IN_ROW + PLACE, i_first, TYPE, ALIGNED)


@triton.jit
def lerp(b_from, b_to, weight):
    """From the nearer end, as torch's: weight 1 gives the other one however large this one is."""
    b_way = b_to - b_from
    return tl.where(weight < 0.5, b_from + weight * b_way, b_to + (weight - 1) * b_way)


@triton.jit
def seen_gradient(
    b_grad, b_param, p_scale, l2, l1, HAS_L2: tl.constexpr, HAS_L1: tl.constexpr, MAXIMIZE: tl.constexpr
):  # fmt: skip
    """The gradient as the rule of the step takes it."""
    if p_scale is not None:
        b_grad *= tl.load(p_scale).to(tl.float32)
    if MAXIMIZE:
        b_grad = -b_grad
    if HAS_L2:
        b_grad += l2 * b_param
    if HAS_L1:
        b_grad += tl.where(b_param > 0, l1, tl.where(b_param < 0, -l1, 0.0))
    return b_grad


@triton.jit
def store_param(
    p_param, p_master, p_ema, i_first, o_n, m_n, b_param, p_noise, ema_weight, TYPE: tl.constexpr,
    HAS_MASTERS: tl.constexpr, HAS_EMAS: tl.constexpr, STOCHASTIC_PARAMS: tl.constexpr,
):  # fmt: skip
    """The new parameter, its master and the average over steps."""
    if HAS_EMAS:
        b_ema = tl.load(p_ema + o_n, mask=m_n)
        tl.store(p_ema + o_n, lerp(b_ema, b_param, ema_weight), mask=m_n)
    if HAS_MASTERS:
        tl.store(p_master + o_n, b_param, mask=m_n)
    if STOCHASTIC_PARAMS:
        b_param = round_at_random(b_param, i_first, o_n, tl.load(p_noise))
    tl.store(p_param + o_n, b_param.to(TYPE), mask=m_n)


# --- random numbers and 8 bits ----------------------------------------------------------------------------------------
@triton.jit
def random_words(i_first, o_n, noise):
    """As fastlm._rounding.random_words, uint32. No chunk crosses a multiple of 2^32, so the high word of an
    element's number is that of the chunk's first one."""
    b_low = o_n.to(tl.uint32) + (i_first & 0xFFFFFFFF).to(tl.uint32)
    b_random = b_low * tl.full((), 0x9E3779B9, tl.uint32) + ((i_first >> 32) + noise).to(tl.uint32)
    return (b_random ^ (b_random >> 15)) * tl.full((), 0x846CA68B, tl.uint32)


@triton.jit
def round_at_random(b_x, i_first, o_n, noise):
    """As fastlm._rounding.rounded_at_random: a float32 that a bfloat16 holds exactly."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_random = random_words(i_first, o_n, noise) >> 16
    b_cut = ((b_bits + b_random) & tl.full((), 0xFFFF0000, tl.uint32)).to(tl.float32, bitcast=True)
    finite = (b_bits & tl.full((), 0x7F800000, tl.uint32)) != tl.full((), 0x7F800000, tl.uint32)
    return tl.where(finite, b_cut, b_x)


@triton.jit
def scales_of(p_scales, i_n, n, BLOCK: tl.constexpr):
    """Where the scales of this block's rows stand, [BLOCK / ROW, 1], and which there are."""
    o_row = tl.arange(0, BLOCK // ROW)[:, None]
    return p_scales + i_n // ROW + o_row, i_n + o_row * ROW < n


@triton.jit
def unpack(b_codes, b_scales, SIGNED: tl.constexpr):
    """As fastlm._eight_bit.dequantized."""
    CODES: tl.constexpr = 127 if SIGNED else 255
    b_codes = b_codes.to(tl.int32)
    b_steps = b_codes & CODES
    b_parts = ((b_steps + ((127 << 3) - CODES)) << _CUT).to(tl.float32, bitcast=True)
    return tl.where(b_steps > 0, b_parts, 0.0) * tl.where(b_codes > CODES, -b_scales, b_scales)


@triton.jit
def pack(b_x, b_random, SIGNED: tl.constexpr):
    """As fastlm._eight_bit.quantized and random_of: codes, and the scale of each row."""
    CODES: tl.constexpr = 127 if SIGNED else 255
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_sizes = b_bits & 0x7FFFFFFF
    b_largest = tl.max(b_sizes, 1, keep_dims=True)  # as integers, among which NaN is the largest
    b_scales = b_largest.to(tl.float32, bitcast=True)
    small = b_scales < 1e-30
    b_parts = b_sizes.to(tl.float32, bitcast=True) * tl.where(small, 0.0, tl.div_rn(1.0, b_scales))
    b_random = b_random & _RANDOM_OF_MEAN if SIGNED else b_random >> (32 - _CUT)
    b_steps = (b_parts.to(tl.int32, bitcast=True) + b_random.to(tl.int32)) >> _CUT
    b_codes = tl.minimum(tl.maximum(b_steps - ((127 << 3) - CODES), 0 if SIGNED else 1), CODES)
    b_codes = tl.where((b_steps > 0) & (b_parts == b_parts), b_codes, 0)
    if SIGNED:
        b_codes |= (b_bits >> 24) & 128
    b_scales = tl.where(small, 0.0, tl.where(b_largest < 0x7F800000, b_scales, float("nan")))
    return b_codes.to(tl.uint8), b_scales


# --- on the host ------------------------------------------------------------------------------------------------------
class Work(NamedTuple):
    """What one launch steps: tensors that share their dtypes."""

    dtype: torch.dtype
    state_dtype: torch.dtype
    aligned: bool
    places: tuple[int, ...]  # in the list of parameters
    chunks: Tensor
    addresses: Tensor


def work_on(
    lists: Sequence[Sequence[Tensor]], scales: Sequence[Sequence[Tensor]] = ((), ())
) -> tuple[list[Work], list[tuple[Tensor, Tensor, bool]]]:
    """Launches, and for `write_back` after them the copies they run on.

    Args:
        lists: PARAM to EMA, one tensor a parameter, or empty.
        scales: FIRST_SCALES and SECOND_SCALES.
    """
    device, count = lists[0][0].device, len(lists[0])
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[int, list[int], int]]] = {}
    copies = []  # of gradients too, to be kept until the launches: freed memory would go to the next copy
    rows = zip(*(x or [None] * count for x in (*lists, *scales)), strict=True)
    for place, row in enumerate(rows):
        there = [i for i, x in enumerate(row[: len(lists)]) if x is not None]
        laid_out = _alike([row[i] for i in there])
        addresses = [0 if x is None else x.data_ptr() for x in row]
        for i, y in zip(there, laid_out, strict=True):
            addresses[i] = y.data_ptr()
            if y is not row[i]:
                copies.append((row[i], y, i != GRAD.value))
        aligned = row[0].numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in laid_out)
        state_dtype = row[0].dtype if row[FIRST.value] is None else row[FIRST.value].dtype
        groups.setdefault((row[0].dtype, state_dtype, aligned), []).append((place, addresses, row[0].numel()))
    work = []
    for dtypes, members in groups.items():
        places, addresses, sizes = zip(*members, strict=True)
        addresses = on(device, torch.tensor(addresses, dtype=torch.int64))
        work.append(Work(*dtypes, places, chunks_of(sizes, device), addresses))
    return work, copies


def launch_on(work: Work, kernel: Any, *args: Any, **constants: Any) -> None:
    # Rows whose elements are loaded one by one span all warps of a program, and two at a time do not spill.
    spread = work.state_dtype == torch.uint8 and not work.aligned
    launch(
        kernel, len(work.chunks), work.chunks, work.addresses, *args, TYPE=TYPES[work.dtype],
        STATE=TYPES[work.state_dtype], ALIGNED=work.aligned, BLOCK=BLOCK // 2 if spread else BLOCK,
        **constants,
    )  # fmt: skip


def write_back(copies: list[tuple[Tensor, Tensor, bool]]) -> None:
    for x, y, written in copies:
        if written:
            x.copy_(y)


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of one parameter in one dense layout: themselves where they are, else copies."""
    if all(x.is_contiguous() for x in tensors):
        return tensors
    like = torch.empty_like(tensors[0])
    return [as_laid_out(x, torch.empty_like(like, dtype=x.dtype)) for x in tensors]


@functools.lru_cache(maxsize=64)
def chunks_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(chunks, 3) int64: tensor, first element, number of elements."""
    rows = [(i, first, min(CHUNK, n - first)) for i, n in enumerate(sizes) for first in range(0, n, CHUNK)]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), 3).to(device)


def counted(steps: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """(places,) float64: which step this is."""
    return torch.stack([steps[place].reshape(()) for place in places]).double() + 1


def count(steps: Sequence[Tensor], found_inf: Tensor | None) -> None:
    """This step; after the launches, any of which may fail."""
    if steps:
        torch._foreach_add_(list(steps), 1 if found_inf is None else (found_inf.reshape(()) == 0).float())


def noises_of(t: Tensor, places: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """(places, 2) int64: what the random numbers follow from for the averages and for the parameter."""
    noise = noise_of(t, _places(places, t.device), seed)
    return on(device, torch.stack([noise, noise_of_param(noise)], 1))


@functools.lru_cache(maxsize=64)
def _places(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


def on(device: torch.device, x: Tensor) -> Tensor:
    """From pinned memory, so that the host does not wait for the GPU to finish the backward."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)


def unsupported(tensors: Sequence[Tensor], *rest: object) -> str | None:
    """Of parameters or gradients."""
    if INTERPRETED and tensors and tensors[0].is_cuda:
        return "is interpreted on the host, which cannot follow addresses of CUDA memory"
    return next((f"does not take {t.dtype}" for t in tensors if t.dtype not in TYPES), None)


def refuse_capture(op: str, x: Tensor) -> None:
    if capturing(x):
        raise RuntimeError(
            f"fastlm.{op} in Triton sends addresses from the host, which a CUDA graph would not do again"
        )
