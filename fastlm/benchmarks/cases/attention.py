"""Causal attention, forward and backward and forward alone, in the shapes of small to middling language models.

On a GPU also what it is to reach there: forward alone and backward alone in long sequences of bf16, beside torch's
backends.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm import _native
from fastlm.benchmarks.cases._common import (
    DTYPES,
    copies_beyond_the_cache,
    eager_compiled_ours,
    forward_alone,
    forward_in_turn,
    leaf,
    outputs_of,
)
from fastlm.benchmarks.harness import Built, Case, Variant

SHAPES = {  # (B, H, T, D)
    "cpu": [(16, 6, 256, 64), (8, 8, 512, 64), (4, 12, 1024, 64), (1, 16, 4096, 128)],
    "cuda": [(16, 12, 1024, 64), (8, 16, 2048, 128), (2, 16, 8192, 128)],
}
QUICK = [(2, 4, 256, 64)]
BACKENDS = {
    "torch": contextlib.nullcontext,  # what torch chooses
    "torch flash": partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
}


class Goal(NamedTuple):
    """What bf16 is to reach on one H200."""

    shape: tuple[int, int, int, int]  # (B, H, T, D)
    causal: bool
    backward: bool  # alone, or forward alone
    target: str


GOALS = [
    Goal((4, 16, 4096, 128), True, False, "480 TFLOP/s, 1.5x torch flash, 1.0x torch cuDNN"),
    Goal((2, 16, 8192, 128), True, False, "560 TFLOP/s, 1.5x torch flash, 1.0x torch cuDNN"),
    Goal((1, 16, 16384, 128), True, False, "600 TFLOP/s, 1.5x torch flash, 1.0x torch cuDNN"),
    Goal((2, 16, 8192, 64), True, False, "400 TFLOP/s"),
    Goal((1, 16, 16384, 128), False, False, "640 TFLOP/s"),
    Goal((2, 16, 8192, 128), True, True, "360 TFLOP/s; deterministic=False 450 TFLOP/s, 1.0x torch cuDNN"),
]


def flops(B: int, H: int, T: int, D: int, products: int = 7) -> float:
    """Of forward and backward: 2 and 5 products of (T, T) with D, of which the mask leaves half."""
    return products * 2 * B * H * T * T * D / 2


def build(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, quick: bool, forward: bool = False
) -> Built:
    inputs = [leaf(shape, dtype, device, seed) for seed in range(3)]
    dy = leaf(shape, dtype, device, seed=3).detach()
    stock, ours = partial(F.scaled_dot_product_attention, is_causal=True), partial(fastlm.attention, causal=True)
    # Forward alone without torch.compile, which makes the same call of it.
    built = forward_alone(stock, ours, inputs, dy) if forward else eager_compiled_ours(stock, ours, inputs, dy, quick)
    built.exact = partial(by_head, partial(outputs_of, stock), inputs, dy)
    return built


def by_head(
    outputs: Callable[..., Callable[[], dict[str, Tensor]]], inputs: Sequence[Tensor], dy: Tensor
) -> dict[str, Tensor]:
    """outputs(inputs, dy)() in float64, one head at a time: plain torch keeps several matrices of scores, 2 GiB each
    at 16k positions. Everything has dy's shape.
    """
    found = []
    for b, h in itertools.product(*map(range, dy.shape[:2])):
        q, k, v, do = (x.detach()[b : b + 1, h : h + 1].double() for x in (*inputs, dy))
        found.append(outputs([x.requires_grad_(y.requires_grad) for x, y in zip((q, k, v), inputs, strict=True)], do)())
    return {name: torch.cat([each[name].detach() for each in found]).view(dy.shape) for name in found[0]}


# --- what a GPU is to reach -------------------------------------------------------------------------------------------
def build_goal(goal: Goal, device: str) -> Built:
    generator = torch.Generator(device).manual_seed(0)  # drawn where they stay: they are many
    drawn = [torch.randn(goal.shape, generator=generator, device=device).bfloat16() for _ in range(4)]
    *inputs, do = (x.requires_grad_(goal.backward and i < 3) for i, x in enumerate(drawn))
    copies = copies_beyond_the_cache([*inputs, do] if goal.backward else inputs)
    stock = partial(F.scaled_dot_product_attention, is_causal=goal.causal)
    ours = partial(fastlm.attention, causal=goal.causal)
    ways = {name: (stock, context) for name, context in BACKENDS.items()}
    # sm90 is not what fastlm chooses: these kernels had not run on a GPU when the choice was made.
    for name, context in (("fastlm", contextlib.nullcontext), ("fastlm sm90", partial(family, "sm90"))):
        ways[name] = ours, context
        if goal.backward and name == "fastlm sm90":  # for the others it is the same kernel
            ways[f"{name} deterministic=False"] = partial(ours, deterministic=False), context

    make, variants, missing = backward_in_turn if goal.backward else forward_in_turn, {}, {}
    for name, (function, context) in ways.items():
        with warnings.catch_warnings(record=True) as said, context():
            warnings.simplefilter("always")  # in which a backend of torch tells why it refuses
            try:
                if name.startswith("fastlm sm90"):
                    need_capability_9(device)
                variant = make(function, copies)
                variant.run()
                if name.startswith("fastlm sm90") and (taken := families_of(variant.run)) != {"sm90"}:
                    raise Refused(f"fastlm._cuda took other kernels: {', '.join(taken) or 'none'}")
            except Refused as error:
                missing[name] = str(error)
            except RuntimeError as error:
                if name not in ("torch flash", "torch cuDNN") and not name.startswith("fastlm sm90"):
                    raise
                missing[name] = "; ".join(str(each).splitlines()[0] for each in [error, *(w.message for w in said)])
            else:
                variants[name] = replace(variant, context=context, proven=not name.startswith("fastlm sm90"))
        for warning in said if name.startswith("fastlm") else ():  # such as that no kernel takes this: it comes once
            warnings.warn(warning.message, stacklevel=2)

    def output_alone(inputs: Sequence[Tensor], dy: Tensor) -> Callable[[], dict[str, Tensor]]:
        return lambda: {"output": stock(*inputs)}

    outputs = partial(outputs_of, stock) if goal.backward else output_alone
    return Built(variants, partial(by_head, outputs, inputs, do), missing)


def backward_in_turn(function: Callable[..., Tensor], copies: Sequence[Sequence[Tensor]]) -> Variant:
    """The backward alone, each run through the next of the graphs: one for each copy of the inputs and of do."""
    graphs = [(function(*inputs), inputs, do) for *inputs, do in copies]
    turns = itertools.cycle(graphs)

    def run() -> tuple[Tensor, ...]:
        return gradients(*next(turns))

    def outputs() -> dict[str, Tensor]:
        return {"output": graphs[0][0]} | {f"gradient {i}": g for i, g in enumerate(gradients(*graphs[0]))}

    return Variant(run, outputs)


def gradients(o: Tensor, inputs: Sequence[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(o, inputs, do, retain_graph=True)


class Refused(RuntimeError):
    """Why kernels are not measured here."""


def need_capability_9(device: str) -> None:
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise Refused("needs a GPU of compute capability 9.0")


@contextlib.contextmanager
def family(name: str) -> Iterator[None]:
    """The CUDA kernels of attention, chosen at each call: sm80 or sm90."""
    before = os.environ.get("FASTLM_CUDA_FAMILY")
    os.environ["FASTLM_CUDA_FAMILY"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTLM_CUDA_FAMILY"]
        else:
            os.environ["FASTLM_CUDA_FAMILY"] = before


def families_of(run: Callable[[], object]) -> set[str]:
    """Those that `run` took, from what the module's functions say."""
    taken: set[str] = set()
    module = _native.cuda
    names = ("attention_forward", "attention_backward")
    before = {name: getattr(module, name) for name in names if module is not None}

    def listened(function: Callable[..., str]) -> Callable[..., str]:
        def call(*args: object) -> str:
            family = function(*args)
            if isinstance(family, str):  # else it was only asked
                taken.add(family)
            return family

        return call

    try:
        for name, function in before.items():
            setattr(module, name, listened(function))
        run()
    finally:
        for name, function in before.items():
            setattr(module, name, function)
    return taken


def goals(device: str) -> list[Case]:
    made = []
    for goal in GOALS:
        products = 5 if goal.backward else 2
        name = f"{goal.shape} bf16 {'causal ' if goal.causal else ''}{'backward' if goal.backward else 'forward'} alone"
        made.append(
            Case(
                "attention",
                name,
                partial(build_goal, goal, device),
                dtype="bfloat16",
                flops=flops(*goal.shape, products) * (1 if goal.causal else 2),
                bytes=(8 if goal.backward else 4) * 2 * math.prod(goal.shape),  # q, k, v, o; do and the gradients
                device=device,
                target=goal.target,
            )
        )
    return made


def cases(device: str, quick: bool) -> list[Case]:
    made = goals(device) if device == "cuda" else []
    for forward in (False, True):
        for shape in QUICK if quick else SHAPES[device]:
            for name, dtype in DTYPES.items():
                made.append(
                    Case(
                        "attention",
                        f"{shape} {name}" + (" forward" if forward else ""),
                        partial(build, shape, dtype, device, quick, forward),
                        dtype=str(dtype).removeprefix("torch."),
                        flops=flops(*shape, products=2 if forward else 7),
                        # q, k, v, o; backward these once more, do, and the three gradients
                        bytes=(4 if forward else 12) * math.prod(shape) * dtype.itemsize,
                        device=device,
                    )
                )
    return made
