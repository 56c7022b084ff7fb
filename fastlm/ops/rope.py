"""rope(x, cos, sin): x (N, T, H, D) with pairs of each row turned by its position's angle; cos, sin (1 or N, T, R/2).

Saved, by reference: everything, though dx needs the tables alone. The gradient of the tables is the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._checks import ArgumentError, DTypeError, check_device, check_floating_point
from fastlm._library import define_op


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    R = 2 * cos.shape[-1]
    c, s = (t.to(wide).unsqueeze(-2) for t in (cos, sin))  # (1 or N, T, 1, R/2)
    turned = x[..., :R].to(wide)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)  # (N, T, H, R/2)
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., R:]), dim=-1)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


def _backward(ops, saved, wanted, dy):
    _, cos, sin, interleaved = saved
    if wanted[1] or wanted[2]:
        return None
    return (ops.rope(dy, cos, -sin, interleaved), None, None, None)


def _samples(device: str) -> list[tuple]:
    x = torch.linspace(-2, 2, 2 * 5 * 3 * 40, device=device).view(2, 5, 3, 40)
    angle = torch.linspace(0, 6, 5 * 16, device=device).view(1, 5, 16)
    return [(x.to(dtype), angle.cos(), angle.sin(), False) for dtype in (torch.float32, torch.bfloat16)]


def _arguments(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, bool]:
    op = "fastlm.rope"
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        check_floating_point(op, name, t)
    if x.dim() < 3:
        raise ArgumentError(f"{op}: x must be (..., T, H, D), got {tuple(x.shape)}")
    *lead, T, _, D = x.shape
    half = cos.shape[-1] if cos.dim() else 0
    if cos.dim() != 2 or cos.shape != sin.shape or not 1 <= 2 * half <= D:
        raise ArgumentError(
            f"{op}: cos and sin must be (positions, R/2) with R from 2 to D = {D}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for name, t in (("cos", cos), ("sin", sin), ("positions", positions)):
        check_device(op, name, t, "x", x)
    if positions is None:
        if cos.shape[0] < T:
            raise ArgumentError(f"{op}: cos and sin must have at least T = {T} rows, got {cos.shape[0]}")
        cos, sin = cos[:T], sin[:T]
    else:
        if positions.dtype not in (torch.int32, torch.int64):
            raise DTypeError(f"{op}: positions must be int32 or int64, got {positions.dtype}")
        if positions.shape != (T,) and positions.shape != (*lead, T):  # `in` fails in dynamic graphs
            raise ArgumentError(
                f"{op}: positions must be (T,) = ({T},) or (..., T) = {(*lead, T)}, got {tuple(positions.shape)}"
            )
        cos, sin = cos[positions], sin[positions]
    N = x.shape[:-3].numel()
    cos, sin = (t.reshape(N if t.dim() > 2 else 1, T, half) for t in (cos, sin))
    return x.reshape(N, *x.shape[-3:]), cos, sin, bool(interleaved)


_rope = define_op(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    reference=rope_reference,
    fake=_fake,
    samples=_samples,
    backward=_backward,
    arguments=_arguments,
    sharding=lambda x, cos, *_: "bthD, {0}tR, {0}tR -> bthD".format("." if cos.shape[0] < x.shape[0] else "b"),
)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864): turn pairs of x by an angle.

    Args:
        x: (..., T, H, D), floating point. Turned in float32, or float64 for float64.
        cos: (P, R/2), cosines of the angles of P >= T positions, 2 <= R <= D; elements from R on stay as they are.
        sin: the sines, likewise.
        interleaved: the pairs are (x[2i], x[2i + 1]), as in GPT-J; else (x[i], x[i + R/2]), as in GPT-NeoX and Llama.
        positions: (T,) or (..., T), int, the rows of cos and sin; 0 to T - 1 where not given.

    Returns:
        A contiguous tensor of x's shape and dtype. All three tensors have gradients.

    Raises:
        ValueError: sizes or devices that do not fit. TypeError: dtypes that do not fit.
    """
    args = _arguments(x, cos, sin, interleaved, positions)
    y = _rope.pointwise(*args)
    return y if x.dim() == 4 else y.view(x.shape)


def rope_tables(
    length: int,
    dim: int,
    base: float = 10_000.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The tables for `rope`: cosines and sines of the angles t base^(-2i / dim) of positions t < length, i < dim / 2.

    Args:
        length: how many positions, from 0.
        dim: R, how many elements of a head are turned; even.
        base: above 1; the longest wavelength is about 2π base positions.
        dtype: of the tables. The angles are computed in float64, since in float32 those of far positions are off.

    Returns:
        cos, sin: (length, dim / 2) each.

    Raises:
        ValueError: a length below 0, a dim that is odd or below 2, a base that is not above 1.
    """
    op = "fastlm.rope_tables"
    if length < 0:
        raise ArgumentError(f"{op}: length must be at least 0, got {length}")
    if dim < 2 or dim % 2:
        raise ArgumentError(f"{op}: dim must be even and at least 2, got {dim}")
    if not base > 1:
        raise ArgumentError(f"{op}: base must be above 1, got {base}")
    half = dim // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)
