"""dropout(x, p, seed): x / (1 - p) or, with probability p, 0; a function of the seed and an element's number alone.

x of any shape, floating point. It is linear in x, so its gradient is itself: saved is the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._checks import check_dropout, check_floating_point
from fastlm._dropout import check_seed, draw_seed, keep_mask
from fastlm._library import define_op


def dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.where(keep_mask(tuple(x.shape), p, seed), x / (1 - p), 0).contiguous()


def _samples(device: str) -> list[tuple]:
    x, seed = torch.linspace(-2, 2, 1001, device=device), torch.tensor(2**40 + 5, device=device)
    return [(x.to(dtype), 0.3, seed) for dtype in (torch.float32, torch.bfloat16)]


_dropout = define_op(
    "dropout(Tensor x, float p, Tensor seed) -> Tensor",
    reference=dropout_reference,
    fake=lambda x, p, seed: torch.empty_like(x, memory_format=torch.contiguous_format),
    samples=_samples,
    save=lambda args, y: args[1:],
    backward=lambda ops, saved, wanted, dy: (ops.dropout(dy, *saved), None, None),
    sharding=lambda *_: None,  # what is dropped depends on an element's number in the whole
)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, *, seed: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.dropout``, out of place, with a seed.

    Args:
        x: of any shape, floating point.
        p: probability in [0, 1) of setting an element to 0; the others are divided by 1 - p.
        training: False gives a copy of x.
        seed: 0-d int64 tensor that decides what is dropped; drawn from torch's generator where not given.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: a p outside [0, 1), a seed on another device. TypeError: dtypes that do not fit.
    """
    op = "fastlm.dropout"
    check_floating_point(op, "x", x)
    check_dropout(op, p, "p")
    check_seed(op, seed, x.device)
    if not training or p == 0:
        return x.clone(memory_format=torch.contiguous_format)
    return _dropout.pointwise(x, float(p), draw_seed(op, x) if seed is None else seed)
