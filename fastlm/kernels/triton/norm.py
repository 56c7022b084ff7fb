"""layer_norm and rms_norm in Triton: a tile of rows stays in registers from its one reading to its writing. Rows too
long for that are read as often as they are needed, from a cache if it holds them.

The gradients of weight and bias are summed in two stages, without atomics: float32 over the rows of a program, whose
number is a matter of sizes, float64 across programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.triton._common import (
    launch,
    loop_bound,
    rows_and_columns,
    triton_kernel,
    unsupported_in_float32,
    widen,
)
from fastlm.kernels.triton._tuning import Configuration, bucket, pick

# The longest rows that are kept: in the forward by elements, 32 a thread; in the backward, which keeps the sums too, by
# bytes: twice as many spill registers.
_KEPT_FORWARD, _KEPT_BACKWARD = 16384, 16384
_LONG = 4096  # columns of longer rows at a time
# The backward's programs: so many warps in all fill a GPU, and what they leave to be added up is little.
_WARPS, _LEAST_PROGRAMS = 2048, 256
# The tile in which those of long rows are summed, and the rows of one partial sum.
_BT, _BD, _ROWS = 8, 128, 64


# --- device code ------------------------------------------------------------------------------------------------------
@triton.jit
def load_summed(p_x, p_residual, o_td, m_td):
    """[BT, BD]: x, with the residual if there is one, rounded to the dtype of both; 0 outside."""
    b_s = widen(tl.load(p_x + o_td, mask=m_td, other=0.0))
    if p_residual is not None:
        b_s += widen(tl.load(p_residual + o_td, mask=m_td, other=0.0))
        b_s = widen(b_s.to(p_x.dtype.element_ty))
    return b_s


@triton.jit
def normalised(b_s, b_mean, b_inverse, p_weight, p_bias, o_d, m_d):
    """[BT, BD]: y, before it is rounded."""
    b_y = (b_s - b_mean) * b_inverse
    if p_weight is not None:
        # [1, BD]
        b_y *= widen(tl.load(p_weight + o_d, mask=m_d, other=0.0))
    if p_bias is not None:
        # [1, BD]
        b_y += widen(tl.load(p_bias + o_d, mask=m_d, other=0.0))
    return b_y


@triton.jit
def load_gradient(p_dy, p_weight, o_td, m_td, o_d, m_d):
    """[BT, BD] each: the gradients of y, and of what the weight multiplies; 0 outside."""
    b_dy = widen(tl.load(p_dy + o_td, mask=m_td, other=0.0))
    b_g = b_dy
    if p_weight is not None:
        # [1, BD]
        b_g *= widen(tl.load(p_weight + o_d, mask=m_d, other=0.0))
    return b_dy, b_g


@triton.jit
def store_dx(p_dx, p_dsum, b_g, b_unit, b_inverse, b_along, b_level, o_td, m_td):
    """b_along, b_level [BT, 1]: the means of g * unit and of g."""
    b_dx = b_inverse * (b_g - b_level - b_unit * b_along)
    if p_dsum is not None:
        # [BT, BD]
        b_dx += widen(tl.load(p_dsum + o_td, mask=m_td, other=0.0))
    tl.store(p_dx + o_td, b_dx.to(p_dx.dtype.element_ty), mask=m_td)


@triton.jit
def norm_fwd_kernel(
    p_x, p_residual, p_weight, p_bias, p_y, p_sum, T, D, eps, CENTRED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    o_t, o_d = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None], tl.arange(0, BD)[None, :]
    m_d = o_d < D
    o_td, m_td = o_t * D + o_d, (o_t < T) & m_d
    b_s = load_summed(p_x, p_residual, o_td, m_td)
    if p_residual is not None:
        tl.store(p_sum + o_td, b_s.to(p_sum.dtype.element_ty), mask=m_td)
    b_mean = tl.zeros([BT, 1], dtype=tl.float32)
    if CENTRED:
        b_mean = tl.sum(b_s, axis=1, keep_dims=True) / D
    b_off = tl.where(m_d, b_s - b_mean, 0.0)
    b_inverse = tl.rsqrt(tl.sum(b_off * b_off, axis=1, keep_dims=True) / D + eps)
    b_y = normalised(b_s, b_mean, b_inverse, p_weight, p_bias, o_d, m_d)
    tl.store(p_y + o_td, b_y.to(p_y.dtype.element_ty), mask=m_td)


@triton.jit
def norm_fwd_long_kernel(
    p_x, p_residual, p_weight, p_bias, p_y, p_sum, D, eps, CENTRED: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """One row a program. The sum is computed three times: written and read again, it would have to pass a barrier."""
    i_t = tl.program_id(0).to(tl.int64) * D
    mean = 0.0
    if CENTRED:
        b_sums = tl.zeros([1, BD], dtype=tl.float32)
        for i_d in range(0, loop_bound(D), BD):
            o_d = i_d + tl.arange(0, BD)[None, :]
            b_sums += load_summed(p_x, p_residual, i_t + o_d, o_d < D)
        mean = tl.sum(b_sums) / D
    b_squares = tl.zeros([1, BD], dtype=tl.float32)
    for i_d in range(0, loop_bound(D), BD):
        o_d = i_d + tl.arange(0, BD)[None, :]
        b_off = tl.where(o_d < D, load_summed(p_x, p_residual, i_t + o_d, o_d < D) - mean, 0.0)
        b_squares += b_off * b_off
    inverse = tl.rsqrt(tl.sum(b_squares) / D + eps)
    for i_d in range(0, loop_bound(D), BD):
        o_d = i_d + tl.arange(0, BD)[None, :]
        b_s = load_summed(p_x, p_residual, i_t + o_d, o_d < D)
        if p_residual is not None:
            tl.store(p_sum + i_t + o_d, b_s.to(p_sum.dtype.element_ty), mask=o_d < D)
        b_y = normalised(b_s, mean, inverse, p_weight, p_bias, o_d, o_d < D)
        tl.store(p_y + i_t + o_d, b_y.to(p_y.dtype.element_ty), mask=o_d < D)


@triton.jit
def norm_bwd_kernel(
    p_dy, p_dsum, p_s, p_weight, p_dx, p_dweight, p_dbias, T, D, rows, eps,
    CENTRED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program has `rows` rows, and leaves the sums over them in its own row of the partial sums."""
    i_program = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)[None, :]
    m_d = o_d < D
    b_dweight, b_dbias = tl.zeros([BT, BD], dtype=tl.float32), tl.zeros([BT, BD], dtype=tl.float32)
    for i_t in range(0, loop_bound(rows), BT):
        o_t = i_program * rows + i_t + tl.arange(0, BT)[:, None]
        o_td, m_td = o_t * D + o_d, (o_t < T) & m_d
        # [BT, BD]
        b_s = widen(tl.load(p_s + o_td, mask=m_td, other=0.0))
        b_dy, b_g = load_gradient(p_dy, p_weight, o_td, m_td, o_d, m_d)
        b_level = tl.zeros([BT, 1], dtype=tl.float32)
        if CENTRED:
            b_s = tl.where(m_d, b_s - tl.sum(b_s, axis=1, keep_dims=True) / D, 0.0)
            b_level = tl.sum(b_g, axis=1, keep_dims=True) / D
        b_inverse = tl.rsqrt(tl.sum(b_s * b_s, axis=1, keep_dims=True) / D + eps)
        b_unit = b_s * b_inverse
        b_dweight += tl.where(m_td, b_dy * b_unit, 0.0)  # with eps = 0 a row that is not there may be NaN
        b_dbias += b_dy  # the last use of dy: so it keeps no registers through the sum below
        b_along = tl.sum(b_g * b_unit, axis=1, keep_dims=True) / D
        store_dx(p_dx, p_dsum, b_g, b_unit, b_inverse, b_along, b_level, o_td, m_td)
    if p_dweight is not None:
        tl.store(p_dweight + i_program * D + o_d, tl.sum(b_dweight, axis=0, keep_dims=True), mask=m_d)
    if p_dbias is not None:
        tl.store(p_dbias + i_program * D + o_d, tl.sum(b_dbias, axis=0, keep_dims=True), mask=m_d)


@triton.jit
def norm_bwd_long_kernel(
    p_dy, p_dsum, p_s, p_weight, p_dx, p_mean, p_inverse, D, eps, CENTRED: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """One row a program, which leaves its mean and the inverse of its deviation for norm_sums_kernel."""
    i_row = tl.program_id(0)
    i_t = i_row.to(tl.int64) * D
    mean = 0.0
    if CENTRED:
        b_sums = tl.zeros([1, BD], dtype=tl.float32)
        for i_d in range(0, loop_bound(D), BD):
            o_d = i_d + tl.arange(0, BD)[None, :]
            b_sums += load_summed(p_s, None, i_t + o_d, o_d < D)
        mean = tl.sum(b_sums) / D
    b_squares = tl.zeros([1, BD], dtype=tl.float32)
    b_along, b_level = tl.zeros([1, BD], dtype=tl.float32), tl.zeros([1, BD], dtype=tl.float32)
    for i_d in range(0, loop_bound(D), BD):
        o_d = i_d + tl.arange(0, BD)[None, :]
        m_d = o_d < D
        b_off = tl.where(m_d, load_summed(p_s, None, i_t + o_d, m_d) - mean, 0.0)
        _, b_g = load_gradient(p_dy, p_weight, i_t + o_d, m_d, o_d, m_d)
        b_squares += b_off * b_off
        b_along += b_g * b_off
        b_level += b_g
    inverse = tl.rsqrt(tl.sum(b_squares) / D + eps)
    along, level = tl.sum(b_along) * inverse / D, 0.0
    if CENTRED:
        level = tl.sum(b_level) / D
    for i_d in range(0, loop_bound(D), BD):
        o_d = i_d + tl.arange(0, BD)[None, :]
        m_d = o_d < D
        b_unit = (load_summed(p_s, None, i_t + o_d, m_d) - mean) * inverse
        _, b_g = load_gradient(p_dy, p_weight, i_t + o_d, m_d, o_d, m_d)
        store_dx(p_dx, p_dsum, b_g, b_unit, inverse, along, level, i_t + o_d, m_d)
    tl.store(p_mean + i_row, mean)
    tl.store(p_inverse + i_row, inverse)


@triton.jit
def norm_sums_kernel(
    p_dy, p_s, p_mean, p_inverse, p_dweight, p_dbias, T, D,
    ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The sums over a chunk of rows and a block of columns that rows too long to be kept give to weight and bias."""
    n_d = tl.cdiv(D, BD)
    i_chunk = (tl.program_id(0) // n_d).to(tl.int64)
    o_d = tl.program_id(0) % n_d * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < D
    b_dweight, b_dbias = tl.zeros([BT, BD], dtype=tl.float32), tl.zeros([BT, BD], dtype=tl.float32)
    for i_t in range(0, ROWS, BT):
        o_t = i_chunk * ROWS + i_t + tl.arange(0, BT)[:, None]
        m_td = (o_t < T) & m_d
        # [BT, BD]
        b_dy = widen(tl.load(p_dy + o_t * D + o_d, mask=m_td, other=0.0))
        # [BT, BD]
        b_s = widen(tl.load(p_s + o_t * D + o_d, mask=m_td, other=0.0))
        # [BT, 1] each
        b_mean = tl.load(p_mean + o_t, mask=o_t < T, other=0.0)
        b_inverse = tl.load(p_inverse + o_t, mask=o_t < T, other=0.0)
        b_dweight += b_dy * ((b_s - b_mean) * b_inverse)
        b_dbias += b_dy
    if p_dweight is not None:
        tl.store(p_dweight + i_chunk * D + o_d, tl.sum(b_dweight, axis=0, keep_dims=True), mask=m_d)
    if p_dbias is not None:
        tl.store(p_dbias + i_chunk * D + o_d, tl.sum(b_dbias, axis=0, keep_dims=True), mask=m_d)


# --- launch -----------------------------------------------------------------------------------------------------------
def configurations(D: int) -> list[Configuration]:
    """Tiles of rows that are kept: 8 elements a thread as long as 16 warps hold them, then twice as many. Of short rows
    there are several, of others one: more take registers and bring nothing."""
    BD = triton.next_power_of_2(D)
    BT = min(32, max(1, 1024 // BD))
    warps = max(1, min(16, BT * BD // 256))
    found = [{"BT": BT, "BD": BD, "num_warps": warps}]
    if warps > 1 and BD <= 4096:
        found.append(found[0] | {"num_warps": warps // 2})
    return found


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool):
    x, residual, weight, bias = map(_dense, (x, residual, weight, bias))
    y, s = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    T, D = rows_and_columns(x)
    tensors = (x, residual, weight, bias, y, s)
    if D > _KEPT_FORWARD:
        launch(norm_fwd_long_kernel, T, *tensors, D, eps, CENTRED=centred, BD=_LONG, num_warps=8)
    elif T:

        def run(c: Configuration) -> None:
            launch(norm_fwd_kernel, triton.cdiv(T, c["BT"]), *tensors, T, D, eps, CENTRED=centred, **c)

        candidates = configurations(D)
        given = tuple(t is not None for t in (residual, weight, bias))
        key = ("norm_fwd", str(x.dtype), candidates[0]["BD"], D % 16 == 0, centred, *given, bucket(T, 65536))
        run(pick(key, candidates, run, x.device))
    return y, s


@triton_kernel("layer_norm", unsupported_in_float32)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _forward(x, None, weight, bias, eps, True)[0]


@triton_kernel("rms_norm", unsupported_in_float32)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _forward(x, None, weight, None, eps, False)[0]


@triton_kernel("add_layer_norm", unsupported_in_float32)
def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    return _forward(x, residual, weight, bias, eps, True)


@triton_kernel("add_rms_norm", unsupported_in_float32)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float):
    return _forward(x, residual, weight, None, eps, False)


def _partial_sums(wanted: Sequence[bool], parts: int, s: Tensor) -> list[Tensor | None]:
    return [s.new_empty(parts, s.shape[-1], dtype=torch.float32) if w else None for w in wanted]


@triton_kernel("norm_backward", unsupported_in_float32)
def norm_backward(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, eps: float, centred: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dsum, s, weight = map(_dense, (dy, dsum, s, weight))
    dx = torch.empty_like(s)
    T, D = rows_and_columns(s)
    partial = _partial_sums(wanted, 0, s)
    if D * s.element_size() > _KEPT_BACKWARD:
        mean, inverse = (s.new_empty(T, dtype=torch.float32) for _ in range(2))
        launch(
            norm_bwd_long_kernel, T, dy, dsum, s, weight, dx, mean, inverse, D, eps,
            CENTRED=centred, BD=_LONG, num_warps=8,
        )  # fmt: skip
        if any(wanted):
            chunks = triton.cdiv(T, _ROWS)
            partial = _partial_sums(wanted, chunks, s)
            programs = chunks * triton.cdiv(D, _BD)
            launch(norm_sums_kernel, programs, dy, s, mean, inverse, *partial, T, D, ROWS=_ROWS, BT=_BT, BD=_BD)
    elif T:

        def run(c: Configuration) -> list[Tensor | None]:
            rows = triton.cdiv(T, max(_LEAST_PROGRAMS, _WARPS // c["num_warps"]) * c["BT"]) * c["BT"]
            programs = triton.cdiv(T, rows)
            sums = _partial_sums(wanted, programs, s)
            tensors = (dy, dsum, s, weight, dx, *sums)
            launch(norm_bwd_kernel, programs, *tensors, T, D, rows, eps, CENTRED=centred, **c)
            return sums

        candidates = configurations(D)
        given = tuple(t is not None for t in (dsum, weight))
        key = ("norm_bwd", str(s.dtype), candidates[0]["BD"], D % 16 == 0, centred, *given, *wanted, bucket(T, 65536))
        partial = run(pick(key, candidates, run, s.device))
    none = s.new_empty(0, dtype=torch.float32)
    return dx, *(none.clone() if p is None else p.sum(0, dtype=torch.float64).float() for p in partial)
