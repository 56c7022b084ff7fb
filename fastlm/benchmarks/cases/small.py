"""Calls so small that what an op costs by itself is felt.

Where torch takes 20 µs or more, fastlm should take 5 % more at most; below, 0.7 µs more forward and 12 µs more forward
and backward.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, forward_alone, forward_backward, in_float64, leaf, outputs_of
from fastlm.benchmarks.cases.linear_act import away_from_kinks
from fastlm.benchmarks.harness import Built, Case, Variant


def _norm(run, x, *parameters):
    return run(x, x.shape[-1:], *parameters, eps=1e-5)


# Name -> torch's, fastlm's, how many vectors of parameters after x, whether there is a square weight.
OPS = {
    "relu": (torch.relu, fastlm.relu, 0, False),
    "gelu": (F.gelu, fastlm.gelu, 0, False),
    "silu": (F.silu, fastlm.silu, 0, False),
    "bias_act": (lambda x, b: torch.relu(x + b), fastlm.bias_act, 1, False),
    "layer_norm": (partial(_norm, F.layer_norm), partial(_norm, fastlm.layer_norm), 2, False),
    "rms_norm": (partial(_norm, F.rms_norm), partial(_norm, fastlm.rms_norm), 1, False),
    "cross_entropy": (F.cross_entropy, fastlm.cross_entropy, 0, False),
    "linear_act": (lambda x, w, b: torch.relu(F.linear(x, w, b)), fastlm.linear_act, 1, True),
    "linear_cross_entropy": (
        lambda x, w, t: F.cross_entropy(F.linear(x, w), t), fastlm.linear_cross_entropy, 0, True,
    ),
}  # fmt: skip
SIZES = [(8, 64), (64, 384), (512, 1024)]


def build(op: str, rows: int, cols: int, dtype: torch.dtype, device: str, gradient: bool) -> Built:
    stock, ours, vectors, square = OPS[op]
    inputs = [leaf((rows, cols), dtype, device, seed=0)]
    inputs += [leaf((cols, cols), dtype, device, seed=1)] if square else []
    inputs += [leaf((cols,), dtype, device, seed=2 + i) for i in range(vectors)]
    if "cross_entropy" in op:
        target = torch.arange(rows, device=device) % cols
        stock, ours = (lambda *given, run=run: run(*given, target) for run in (stock, ours))
    if op == "bias_act":
        away_from_kinks(inputs[0], torch.eye(cols, dtype=dtype, device=device), inputs[1])
    elif op == "linear_act":
        away_from_kinks(*inputs)
    dy = torch.ones_like(stock(*inputs)).detach()
    if not gradient:
        return forward_alone(stock, ours, inputs, dy)
    variants = {
        name: Variant(forward_backward(run, inputs, dy), outputs_of(run, inputs, dy))
        for name, run in {"torch": stock, "fastlm": ours}.items()
    }
    return Built(variants, in_float64(stock, inputs, dy))


def cases(device: str, quick: bool) -> list[Case]:
    made = []
    for op in OPS:
        for rows, cols in SIZES[:1] if quick else SIZES:
            for name, dtype in DTYPES.items():
                for gradient in (False, True):
                    label = f"{op} {rows}x{cols} {name} {'fwd+bwd' if gradient else 'forward'}"
                    work = partial(build, op, rows, cols, dtype, device, gradient)
                    made.append(Case("small", label, work, device=device, allocators=False))
    return made
