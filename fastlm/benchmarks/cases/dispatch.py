"""What a call costs beyond its arithmetic: relu of 64 elements, which fastlm.relu leaves to torch and the op does not.

On the CPU in processor time of the calling thread, which does all the work. Beside other programs the clock would count
their time slices too: a turn is longer than many of them, so that no round escapes and the median is theirs as well.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial

import torch

import fastlm
from fastlm.benchmarks.harness import Built, Case, Variant


def build(function: str, context, gradient: bool, device: str) -> Built:
    x = torch.randn(64, device=device, requires_grad=gradient)
    dy = torch.ones_like(x)
    ours = {"fastlm.relu": fastlm.relu, "torch.ops.fastlm.relu": torch.ops.fastlm.relu}[function]
    variants = {}
    for name, op in {"torch": torch.relu, "fastlm": ours}.items():
        run = partial(_both_ways, op, x, dy) if gradient else partial(op, x)
        outputs = partial(_named, op, x) if not gradient else None
        variants[name] = Variant(run, outputs, context, time.thread_time)
    return Built(variants, lambda: {"output": torch.relu(x.detach().double())})


def _both_ways(op, x, dy):
    return torch.autograd.grad(op(x), x, dy)


def _named(op, x):
    return {"output": op(x)}


def cases(device: str, quick: bool) -> list[Case]:
    ours, op, ordinary = "fastlm.relu", "torch.ops.fastlm.relu", contextlib.nullcontext
    listed = [
        (f"{ours}, no gradient wanted", ours, ordinary, False, "1.7 µs"),
        (f"{op}, inference mode", op, torch.inference_mode, False, "2.2 µs"),
        (f"{op}, no gradient wanted", op, ordinary, False, "4 µs"),
        (f"{ours}, forward and backward", ours, ordinary, True, "2 x torch's"),
        (f"{op}, forward and backward", op, ordinary, True, ""),
    ]
    made = []
    for name, *how, target in listed:
        target = target if device == "cpu" else ""
        made.append(
            Case("dispatch", name, partial(build, *how, device), device=device, allocators=False, target=target)
        )
    return made
