"""embedding(input, weight) = weight[input]: input int64 of any shape, weight (V, N), floating point.

The gradient of a row of the weight is the sum over the places that name it, in a fixed order, in float32 (float64 for
float64) also where the weight has 16 bits. Saved: the indices, by reference, and the number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm._checks import ArgumentError, DTypeError, check_device, check_floating_point, check_tensor
from fastlm._library import define_op, left_to_torch, small

# Elements of the weight, and of the result, up to which torch is as fast. In 16 bits it sums in 16 bits.
_SMALL = small(1 << 17, 0)


def embedding_reference(weight: Tensor, index: Tensor, padding: int) -> Tensor:
    return F.embedding(index, weight, None if padding < 0 else padding)


def embedding_backward_reference(dy: Tensor, index: Tensor, rows: int, padding: int) -> Tensor:
    wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
    return torch.ops.aten.embedding_dense_backward(wide, index, rows, padding, False).to(dy.dtype)


def _samples(device: str) -> list[tuple]:
    index = torch.arange(200, device=device) % 7
    ramp = torch.linspace(-2, 2, 9 * 65, device=device).view(9, 65)
    return [(ramp.to(dtype), index, padding) for dtype in (torch.float32, torch.bfloat16) for padding in (-1, 3)]


def _samples_backward(device: str) -> list[tuple]:
    return [(weight[index], index, len(weight), padding) for weight, index, padding in _samples(device)]


def _backward_of_backward(ops, saved, wanted, ddweight):
    index, padding = saved
    ddy = ops.embedding(ddweight, index, padding)
    if padding >= 0:
        ddy = torch.where((index == padding)[:, None], 0, ddy)
    return (ddy, None, None, None)


define_op(
    "embedding_backward(Tensor dy, Tensor index, int rows, int padding) -> Tensor",
    reference=embedding_backward_reference,
    fake=lambda dy, index, rows, padding: dy.new_empty(rows, dy.shape[1]),
    samples=_samples_backward,
    save=lambda args, dweight: (args[1], args[3]),
    backward=_backward_of_backward,
    sharding="in, i -> Vn+i",
)


def _save(args, y):
    weight, index, padding = args
    return (index, weight.shape[0], padding)


def _backward(ops, saved, wanted, dy):
    index, rows, padding = saved
    return (ops.embedding_backward(dy, index, rows, padding), None, None)


def _arguments(input: Tensor, weight: Tensor, padding_idx: int | None = None) -> tuple[Tensor, Tensor, int]:
    op = "fastlm.embedding"
    check_tensor(op, "input", input)
    check_floating_point(op, "weight", weight)
    if input.dtype not in (torch.int32, torch.int64):
        raise DTypeError(f"{op}: input must be int32 or int64, got {input.dtype}")
    if weight.dim() != 2:
        raise ArgumentError(f"{op}: weight must be (V, N), got {tuple(weight.shape)}")
    check_device(op, "weight", weight, "input", input)
    V = weight.shape[0]
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ArgumentError(f"{op}: padding_idx must be a row of weight, {-V} to {V - 1}, or None, got {padding_idx}")
    return weight, input.reshape(-1).long(), -1 if padding_idx is None else padding_idx % V


_embedding = define_op(
    "embedding(Tensor weight, Tensor index, int padding) -> Tensor",
    reference=embedding_reference,
    fake=lambda weight, index, padding: weight.new_empty(index.shape[0], weight.shape[1]),
    samples=_samples,
    save=_save,
    backward=_backward,
    arguments=_arguments,
    sharding="Vn, i -> in",
)


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """``torch.nn.functional.embedding``, with a gradient that kernels sum in float32, in a fixed order.

    Args:
        input: any shape, int32 or int64, rows of weight.
        weight: (V, N), floating point.
        padding_idx: a row whose gradient stays 0; negative: from the end.

    Returns:
        (*input.shape, N), of weight's dtype.

    Raises:
        ValueError: sizes or devices that do not fit. TypeError: dtypes that do not fit. IndexError: an index that is no
        row, on the CPU. On a GPU, where that would wait for it, its row is NaN and the gradient leaves it out; where
        the reference runs torch's device-side assertion fails.
    """
    try:
        if left_to_torch(weight, _SMALL) and input.is_cpu and input.numel() * weight.shape[1] < _SMALL[weight.dtype]:
            return F.embedding(input, weight, padding_idx)
    except Exception:
        pass  # is said below
    y = _embedding(*_arguments(input, weight, padding_idx))
    return y.view(*input.shape, weight.shape[1])
