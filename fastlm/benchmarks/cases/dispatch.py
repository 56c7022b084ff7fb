"""What a call costs beyond its arithmetic: relu of 64 elements."""

from __future__ import annotations

import contextlib
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
        variants[name] = Variant(run, outputs, context)
    return Built(variants, lambda: {"output": torch.relu(x.detach().double())})


def _both_ways(op, x, dy):
    return torch.autograd.grad(op(x), x, dy)


def _named(op, x):
    return {"output": op(x)}


def cases(device: str, quick: bool) -> list[Case]:
    listed = [
        ("fastlm.relu, no gradient wanted", "fastlm.relu", contextlib.nullcontext, False),
        ("torch.ops.fastlm.relu, inference mode", "torch.ops.fastlm.relu", torch.inference_mode, False),
        ("torch.ops.fastlm.relu, no gradient wanted", "torch.ops.fastlm.relu", contextlib.nullcontext, False),
        ("fastlm.relu, forward and backward", "fastlm.relu", contextlib.nullcontext, True),
    ]
    return [
        Case("dispatch", name, partial(build, function, context, gradient, device), device=device, allocators=False)
        for name, function, context, gradient in listed
    ]
