"""layer_norm(x) = (x - mean) / sqrt(variance + eps) * weight + bias, rms_norm(x) = x / sqrt(mean x^2 + eps) * weight.

Over the last dimensions; with a residual, of x + residual, which is returned beside. x (..., N) and residual of one
floating-point dtype, weight and bias (N,) of that or float32. Saved: what was normalised, by reference, and the weight;
mean and deviation are computed again, from rows that the backward reads anyway. 16-bit values are computed with in
float32. Under autocast all keep their dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm._checks import ArgumentError, DTypeError, check_device, check_floating_point, check_number
from fastlm._library import define_op, left_to_torch, small

_SMALL_LAYER_NORM = small(1 << 19, 1 << 18)  # elements up to which torch's is as fast

_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}  # rms_norm's, where not given


def _wide(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # which asks three times as long


def _normalised(s: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """Of unit deviation, and the inverse of the one it had."""
    wide = _wide(s, s)
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _norm(x, residual, weight, bias, eps, centred):
    s = x if residual is None else x + residual
    y, _ = _normalised(s, eps, centred)
    if weight is not None:
        y = y * _wide(weight, x)
    if bias is not None:
        y = y + _wide(bias, x)
    return y.to(x.dtype).contiguous(), s.contiguous()


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _norm(x, None, weight, bias, eps, True)[0]


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _norm(x, None, weight, None, eps, False)[0]


def add_layer_norm_reference(x, residual, weight, bias, eps):
    return _norm(x, residual, weight, bias, eps, True)


def add_rms_norm_reference(x, residual, weight, eps):
    return _norm(x, residual, weight, None, eps, False)


def norm_backward_reference(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, eps: float, centred: bool, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    unit, inverse = _normalised(s, eps, centred)
    g = wide_dy = _wide(dy, s)
    if weight is not None:
        g = g * _wide(weight, s)
    dx = g - unit * (g * unit).mean(-1, keepdim=True)
    if centred:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * inverse
    if dsum is not None:
        dx = dx + dsum
    rows = tuple(range(s.dim() - 1))
    sums = (wide_dy * unit, wide_dy)
    # An empty tuple of dimensions would mean all of them.
    dweight, dbias = ((t.sum(rows) if rows else t) if w else t.new_empty(0) for t, w in zip(sums, wanted, strict=True))
    return dx.to(s.dtype).contiguous(), dweight.contiguous(), dbias.contiguous()


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(dy, dsum, s, weight, eps, centred, wanted):
    wide = torch.float64 if s.dtype == torch.float64 else torch.float32
    return _contiguous_like(s), *(s.new_empty(s.shape[-1:] if w else (0,), dtype=wide) for w in wanted)


def _samples(device: str, residual: bool, bias: bool) -> list[tuple]:
    made = []
    for rows, cols in ((7, 143), (2, 1024), (2, 3072)):  # longer rows run other code on a GPU
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.linspace(-2, 3, rows * cols, device=device).sin().to(dtype).view(rows, cols)
            extras = [torch.linspace(0.5, 1.5, cols, device=device)] * (2 if bias else 1)
            made.append((x, *([x.flip(0)] if residual else []), *extras, 1e-5))
    return made


def _samples_backward(device: str) -> list[tuple]:
    return [
        (x.flip(1), residual, x, weight, eps, centred, [True, centred])
        for x, residual, weight, eps in _samples(device, True, False)
        for centred in (True, False)
    ]


define_op(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, float eps, bool centred, bool[] wanted) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=norm_backward_reference,
    fake=_fake_backward,
    samples=_samples_backward,
    sharding=lambda *args: "*N, *N, *N, N -> *N, {}, {}".format(*("N+*" if w else "" for w in args[-1])),
)


def _gradients(ops, dy, dsum, s, weight, bias_dtype, eps, centred, wanted):
    """dx, dweight and dbias, of the dtypes of x, weight and bias; the last two None where not wanted."""
    if dy is None:
        dy = torch.zeros_like(s)
    dx, dweight, dbias = ops.norm_backward(dy, dsum, s, weight, eps, centred, wanted)
    return dx, _to(dweight, weight.dtype) if wanted[0] else None, _to(dbias, bias_dtype) if wanted[1] else None


def _rms_eps(x: Tensor, eps: float | None) -> float:
    if eps is None:
        check_floating_point("fastlm.rms_norm", "x", x)
        return _EPS.get(x.dtype, _EPS[torch.float32])
    return eps


def _define(name: str, centred: bool, residual: bool, reference):
    tensors = ["Tensor x", *(["Tensor residual"] if residual else []), "Tensor? weight"]
    tensors += ["Tensor? bias"] if centred else []
    first = 2 if residual else 1  # where the weight stands

    def save(args, outputs):
        bias = args[first + 1] if centred else None
        return (outputs[1] if residual else args[0], args[first], None if bias is None else bias.dtype, args[-1])

    def backward(ops, saved, wanted, dy, dsum=None):
        s, weight, bias_dtype, eps = saved
        mine = [wanted[first], centred and wanted[first + 1]]
        dx, dweight, dbias = _gradients(ops, dy, dsum, s, weight, bias_dtype, eps, centred, mine)
        return (*[dx] * first, dweight, *([dbias] if centred else []), None)

    def fake(x, *_):
        return (_contiguous_like(x), _contiguous_like(x)) if residual else _contiguous_like(x)

    def arguments(x, normalized_shape, parameters, eps, given):
        public = name.removeprefix("add_")
        rows, other, *extras = _checked(public, x, normalized_shape, parameters, eps, given)
        if residual != (given is not None):
            raise TypeError(f"fastlm.backends: add_{public} is what runs with a residual, and {public} without")
        return (rows, *([other] if residual else []), *extras, float(eps))

    def layer_arguments(x, normalized_shape, weight=None, bias=None, eps=1e-5, residual=None):
        return arguments(x, normalized_shape, {"weight": weight, "bias": bias}, eps, residual)

    def rms_arguments(x, normalized_shape, weight=None, eps=None, residual=None):
        return arguments(x, normalized_shape, {"weight": weight}, _rms_eps(x, eps), residual)

    return define_op(
        f"{name}({', '.join(tensors)}, float eps) -> {'(Tensor y, Tensor sum)' if residual else 'Tensor'}",
        reference=reference,
        fake=fake,
        samples=lambda device: _samples(device, residual, centred),
        save=save,
        backward=backward,
        arguments=layer_arguments if centred else rms_arguments,
        sharding=f"{'*N, ' * first}{'N, N' if centred else 'N'} -> {', '.join(['*N'] * first)}",
    )


_layer_norm = _define("layer_norm", True, False, layer_norm_reference)
_rms_norm = _define("rms_norm", False, False, rms_norm_reference)
_add_layer_norm = _define("add_layer_norm", True, True, add_layer_norm_reference)
_add_rms_norm = _define("add_rms_norm", False, True, add_rms_norm_reference)


def _checked(op: str, x, normalized_shape, parameters: dict, eps: float, residual) -> tuple:
    """x, residual and the parameters, checked, of the dtypes that the op takes and with the last dimensions as one."""
    op = f"fastlm.{op}"
    check_floating_point(op, "x", x)
    check_number(op, "eps", eps)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ArgumentError(f"{op}: normalized_shape must be the last sizes of x, {tuple(x.shape)}, got {shape}")
    for name, t in parameters.items():
        if t is not None:
            check_floating_point(op, name, t)
            if t.shape != shape:
                raise ArgumentError(f"{op}: {name} must be of normalized_shape {shape}, got {tuple(t.shape)}")
            if t.dtype not in (x.dtype, torch.float32):
                raise DTypeError(f"{op}: {name} must be float32 or of the dtype of x, {x.dtype}, got {t.dtype}")
            check_device(op, name, t, "x", x)
    if residual is not None:
        check_floating_point(op, "residual", residual)
        if residual.shape != x.shape:
            raise ArgumentError(f"{op}: residual must be of x's shape, {tuple(x.shape)}, got {tuple(residual.shape)}")
        check_device(op, "residual", residual, "x", x)
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if len(shape) == 1:
        return x, residual, *parameters.values()
    return tuple(t if t is None else t.flatten(-len(shape)) for t in (x, residual, *parameters.values()))


def _run(op: str, plain, added, x, normalized_shape, parameters: dict, eps: float, residual):
    rows, added_rows, *extras = _checked(op, x, normalized_shape, parameters, eps, residual)
    if added_rows is None:
        y = plain(rows, *extras, float(eps))
        return y if rows.dim() == x.dim() else y.view(x.shape)
    y, s = added(rows, added_rows, *extras, float(eps))
    return (y, s) if rows.dim() == x.dim() else (y.view(x.shape), s.view(x.shape))


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450), in one pass over memory.

    Args:
        x: (..., *normalized_shape), floating point.
        normalized_shape: the last sizes of x, over which mean and variance are taken.
        weight, bias: of normalized_shape, float32 or of x's dtype.
        eps: added to the variance.
        residual: of x's shape; added to x first, in the dtype that x + residual has.

    Returns:
        y, contiguous, of x's shape and dtype; with residual (y, x + residual), of that one's.

    Raises:
        ValueError: sizes or devices that do not fit. TypeError: dtypes that do not fit.
    """
    # Not where a graph may be wanted: torch sums 16-bit gradients of weight and bias in 16 bits, and its third
    # derivative is wrong.
    if residual is None and not torch.is_grad_enabled() and left_to_torch(x, _SMALL_LAYER_NORM):
        try:
            if type(eps) is float and all(t is None or (t.dtype == x.dtype and t.is_cpu) for t in (weight, bias)):
                shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
                return torch.layer_norm(x, shape, weight, bias, eps)
        except Exception:
            pass  # is said below
    extras = {"weight": weight, "bias": bias}
    return _run("layer_norm", _layer_norm, _add_layer_norm, x, normalized_shape, extras, eps, residual)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), in one pass over memory.

    Args:
        x: (..., *normalized_shape), floating point.
        normalized_shape: the last sizes of x, over which the mean square is taken.
        weight: of normalized_shape, float32 or of x's dtype.
        eps: added to the mean square; where not given, the spacing at 1 of the dtype that is computed in, float32 for
            16-bit x, as in torch.
        residual: of x's shape; added to x first, in the dtype that x + residual has.

    Returns:
        y, contiguous, of x's shape and dtype; with residual (y, x + residual), of that one's.

    Raises:
        ValueError: sizes or devices that do not fit. TypeError: dtypes that do not fit.
    """
    parameters = {"weight": weight}
    return _run("rms_norm", _rms_norm, _add_rms_norm, x, normalized_shape, parameters, _rms_eps(x, eps), residual)
