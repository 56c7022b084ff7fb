"""What the cases share."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastlm.benchmarks.harness import Built, Variant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# What memory-bound ops are to reach on a GPU, at 256 MiB a tensor in bf16: several times its caches.
LARGE, LARGE_TARGET = (16384, 8192), "90 % of the limit, 0.98x torch.compile"


def leaf(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal values that require a gradient, the same ones for a seed on every device; not if they are many, which are
    drawn where they stay.
    """
    drawn_on = device if math.prod(shape) > 1 << 24 else "cpu"
    values = torch.randn(*shape, generator=torch.Generator(drawn_on).manual_seed(seed), device=drawn_on)
    return values.to(device, dtype).requires_grad_()


def cache_bytes(device: torch.device) -> int:
    """Of a GPU's L2 cache; 0 on the CPU, whose cases are as large as they are in use."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copies_beyond_the_cache(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The inputs and copies of them, together more than twice the L2 cache: runs that take them in turn read memory,
    not what the run before left in the cache.
    """
    size = sum(x.numel() * x.element_size() for x in inputs)
    more = range(2 * cache_bytes(inputs[0].device) // size)
    return [list(inputs), *([x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in more)]


def forward_in_turn(function: Callable[..., Tensor], copies: Sequence[Sequence[Tensor]]) -> Variant:
    """`function` without a graph, each run on the next of the copies of its inputs."""
    turns = itertools.cycle(copies)

    def run() -> None:
        with torch.no_grad():
            function(*next(turns))

    return Variant(run, lambda: {"output": function(*copies[0])})


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Callable[[], object]:
    """One forward and backward pass; the gradients are returned, not accumulated."""
    return lambda: torch.autograd.grad(function(*inputs), inputs, dy)


def outputs_of(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """The value and every gradient, by name."""

    def outputs() -> dict[str, Tensor]:
        y = function(*inputs)
        grads = torch.autograd.grad(y, inputs, dy)
        return {"output": y} | {f"gradient {i}": g for i, g in enumerate(grads)}

    return outputs


def in_float64(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """The same from float64 copies of the inputs."""

    def outputs() -> dict[str, Tensor]:
        exact = [x.detach().double().requires_grad_() for x in inputs]
        return outputs_of(function, exact, dy.double())()

    return outputs


def eager_compiled_ours(
    stock: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, quick: bool
) -> Built:
    """Forward and backward of torch's function, of the same under torch.compile, and of fastlm's."""
    functions, missing = {"torch": stock, "fastlm": ours}, {}
    if (reason := no_compiler(quick)) is None:
        functions["torch.compile"] = compiled(stock)
    else:
        missing["torch.compile"] = reason
    variants = {
        name: Variant(forward_backward(function, inputs, dy), outputs_of(function, inputs, dy))
        for name, function in functions.items()
    }
    return Built(variants, in_float64(stock, inputs, dy), missing)


def forward_alone(
    stock: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> Built:
    """torch's function and fastlm's without a graph; the gate still sees the gradients."""

    def variant(function: Callable[..., Tensor]) -> Variant:
        def run() -> None:
            with torch.no_grad():
                function(*inputs)

        return Variant(run, outputs_of(function, inputs, dy))

    return Built({"torch": variant(stock), "fastlm": variant(ours)}, in_float64(stock, inputs, dy))


def add_bare_products(built: Built, x: Tensor, weight: Tensor, variants: dict[str, int]) -> None:
    """What the products of a layer alone take: x weight', as often as a variant says, and as if that were a gradient
    those for x and for weight, the latter in float32. Other work than the case, so nothing is compared.
    """

    def run(times: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for _ in range(times):
                y = x @ weight.t()
            wide = {"out_dtype": torch.float32} if x.element_size() == 2 else {}
            return y @ weight, torch.mm(y.t(), x, **wide)

    for name, times in variants.items():
        if x.element_size() == 2 and not hasattr(torch.ops.aten.mm, "dtype"):
            built.missing[name] = "needs torch 2.8 for a float32 result of 16-bit factors"
        else:
            built.variants[name] = Variant(partial(run, times))


def compiled(function: Callable) -> Callable:
    """For the shapes of this case alone: after other cases in this process it would allow for any shape, or give up."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def no_compiler(quick: bool) -> str | None:
    """Why torch.compile has no variant here, or None."""
    if quick:
        return "left out of quick runs"
    if not torch._dynamo.is_dynamo_supported():
        return "torch.compile does not support this Python"
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "torch.compile needs a C++ compiler"
    return None
