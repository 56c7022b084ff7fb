"""cross_entropy over rows of logits, and with the linear layer before it, forward and backward.

On a GPU also what they are to reach there, the one in memory traffic, the other beside its bare products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import (
    DTYPES,
    add_bare_products,
    eager_compiled_ours,
    forward_backward,
    leaf,
    outputs_of,
)
from fastlm.benchmarks.harness import Built, Case, Variant

GOAL, LINEAR_GOAL = (16384, 50304), (16384, 4096, 131072)  # rows, classes; rows, columns, classes; in bf16


def classes_of(shape: tuple[int, int], device: str) -> Tensor:
    return torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(9)).to(device)


def build(dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    target = classes_of(shape, device)
    x, dy = leaf(shape, dtype, device, 0), torch.ones((), dtype=dtype, device=device)
    return eager_compiled_ours(
        lambda x: F.cross_entropy(x, target), lambda x: fastlm.cross_entropy(x, target), [x], dy, quick
    )


def operands(dtype: torch.dtype, R: int, D: int, C: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and target."""
    weight = (leaf((C, D), dtype, device, 1).detach() / D**0.5).requires_grad_()
    return leaf((R, D), dtype, device, 0), weight, classes_of((R, C), device)


def build_linear(x: Tensor, weight: Tensor, target: Tensor, quick: bool) -> Built:
    return eager_compiled_ours(
        lambda x, w: F.cross_entropy(F.linear(x, w), target),
        lambda x, w: fastlm.linear_cross_entropy(x, w, target),
        [x, weight],
        torch.ones((), dtype=x.dtype, device=x.device),
        quick,
    )


def exact_linear(x: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """In float64, some rows at a time: all logits at once would be too large."""
    wide, loss, dx = weight.detach().double(), 0.0, []
    dweight = torch.zeros_like(wide)
    for some, classes in zip(x.detach().double().split(1024), target.split(1024), strict=True):
        logits = some @ wide.t()
        loss = loss + F.cross_entropy(logits, classes, reduction="sum") / len(x)
        dlogits = logits.softmax(1)
        dlogits[torch.arange(len(classes)), classes] -= 1
        dlogits /= len(x)
        dx.append(dlogits @ wide)
        dweight += dlogits.t() @ some
    return {"output": loss, "gradient 0": torch.cat(dx), "gradient 1": dweight}


def build_linear_case(dtype: torch.dtype, R: int, D: int, C: int, device: str, quick: bool) -> Built:
    return build_linear(*operands(dtype, R, D, C, device), quick)


def build_linear_goal(dtype: torch.dtype, R: int, D: int, C: int, device: str, quick: bool) -> Built:
    x, weight, target = operands(dtype, R, D, C, device)
    built = build_linear(x, weight, target, quick)
    add_bare_products(built, x, weight, {"three products": 1, "four products": 2})
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        built.missing["Liger"] = "liger-kernel is not installed"
    else:
        theirs, dy = LigerFusedLinearCrossEntropyLoss(), torch.ones((), dtype=dtype, device=device)
        call = lambda x, weight: theirs(weight, x, target)  # noqa: E731
        run, outputs = forward_backward(call, [x, weight], dy), outputs_of(call, [x, weight], dy)
        built.variants["Liger"] = Variant(run, outputs, proven=False)
    built.exact = partial(exact_linear, x, weight, target)
    return built


def case_of(name: str, shape: tuple[int, int], device: str, quick: bool, target: str = "") -> Case:
    # Forward reads the logits, backward reads them again and writes their gradient.
    size = 3 * shape[0] * shape[1] * DTYPES[name].itemsize
    work = partial(build, DTYPES[name], shape, device, quick)
    return Case("cross_entropy", f"{shape[0]}x{shape[1]} {name}", work, bytes=size, device=device, target=target)


def linear_case_of(
    build: Callable, name: str, sizes: tuple[int, int, int], device: str, quick: bool, target: str = ""
) -> Case:
    R, D, C = sizes
    work, kind = partial(build, DTYPES[name], R, D, C, device, quick), str(DTYPES[name]).removeprefix("torch.")
    label, flops = f"linear {R}x{D} to {C} {name}", 6.0 * R * D * C
    return Case("cross_entropy", label, work, dtype=kind, flops=flops, device=device, target=target)


def goals(
    device: str,
    quick: bool,
    shape: tuple[int, int] = GOAL,
    sizes: tuple[int, int, int] = LINEAR_GOAL,
    name: str = "bf16",
) -> list[Case]:
    R, D, C = sizes
    least = (2 * R * D + 2 * C * D + 4 * C * D) / 1e9  # GB: both gradients, and the sum of one of them in float32
    target = (
        f"0.87x three products with {least + 0.6:.2f} GB, or 0.93x four products with {least + 1:.2f} GB; 1.1x Liger"
    )
    return [
        case_of(name, shape, device, quick, "85 % of the limit, 0.98x torch.compile"),
        linear_case_of(build_linear_goal, name, sizes, device, quick, f"{target}; 1.1x Liger"),
    ]


def cases(device: str, quick: bool) -> list[Case]:
    made = goals(device, quick) if device == "cuda" else []
    sizes = (64, 64, 512) if quick else (2048, 768, 32768)
    for name in DTYPES:
        shapes = [(64, 512)] if quick else [(1024, 50304), (2048, 2048), (4096, 65)]
        made += [case_of(name, shape, device, quick) for shape in shapes]
        made.append(linear_case_of(build_linear_case, name, sizes, device, quick))
    return made
