"""relu(x weight' + bias), forward alone and with backward, and a ReLU MLP of two such layers.

On a GPU also what a layer is to reach there, beside its bare products.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, add_bare_products, eager_compiled_ours, forward_alone, leaf
from fastlm.benchmarks.harness import Built, Case

GOAL = (16384, 4096, 16384)  # M, K, N, in bf16
LAYERS = [(768, 3072), (3072, 768), (384, 1536)]  # (K, N)
# Rows of x in the sweep, and layers: those of small models, heads of few and many classes, sizes that fit no tile.
SWEEP_ROWS = (32, 512, 1000, 4096)
SWEEP = [(64, 64), (65, 255), (128, 512), (384, 65), (384, 1152), (512, 8192), (768, 768), (1000, 333), (1536, 384),
         (2048, 2048)]  # fmt: skip


def stock_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(x, weight, bias))


def stock_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)), down)


def our_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return fastlm.linear_act(fastlm.linear_act(x, up), down, act="none")


def away_from_kinks(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """x with other rows in place of those that bring a ReLU near its kink: which side of 0 a sum rounds to is nobody's
    error, and yet decides a gradient."""
    with torch.no_grad():
        u = x.double() @ weight.double().t() + bias
        near = (u.abs() < 1e-5).any(dim=1)
        x[near] = x[int((~near).nonzero()[0])].clone()
    return x


def weight_of(N: int, K: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return (leaf((N, K), dtype, device, seed).detach() / K**0.5).requires_grad_()


def operands(M: int, K: int, N: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    inputs = [leaf((M, K), dtype, device, 0), weight_of(N, K, dtype, device, 1), leaf((N,), dtype, device, 2)]
    away_from_kinks(*inputs)
    return inputs


def build(M: int, K: int, N: int, dtype: torch.dtype, device: str, quick: bool, forward: bool) -> Built:
    inputs = operands(M, K, N, dtype, device)
    dy = leaf((M, N), dtype, device, 3).detach()
    if forward:
        return forward_alone(stock_layer, fastlm.linear_act, inputs, dy)
    return eager_compiled_ours(stock_layer, fastlm.linear_act, inputs, dy, quick)


def build_mlp(M: int, C: int, dtype: torch.dtype, device: str, quick: bool) -> Built:
    inputs = [
        leaf((M, C), dtype, device, 0),
        weight_of(4 * C, C, dtype, device, 1),
        weight_of(C, 4 * C, dtype, device, 2),
    ]
    away_from_kinks(*inputs[:2])
    return eager_compiled_ours(stock_mlp, our_mlp, inputs, leaf((M, C), dtype, device, 3).detach(), quick)


def build_goal(M: int, K: int, N: int, dtype: torch.dtype, device: str, quick: bool) -> Built:
    inputs = operands(M, K, N, dtype, device)
    built = eager_compiled_ours(stock_layer, fastlm.linear_act, inputs, leaf((M, N), dtype, device, 3).detach(), quick)
    add_bare_products(built, *inputs[:2], {"three products": 1})
    return built


def goals(device: str, quick: bool, sizes: tuple[int, int, int] = GOAL, name: str = "bf16") -> list[Case]:
    """The activation and its gradient: five passes over (M, N), 7 % of the products' time at 4.3 TB/s and K = 4096."""
    M, K, N = sizes
    work, kind = partial(build_goal, *sizes, DTYPES[name], device, quick), str(DTYPES[name]).removeprefix("torch.")
    label, flops, target = f"{M}x{K} to {N} {name} fwd+bwd", 6.0 * M * K * N, "0.90x three products, 1.0x torch.compile"
    return [Case("linear_act", label, work, dtype=kind, flops=flops, device=device, target=target)]


def layer_case(group: str, M: int, K: int, N: int, dtype: str, device: str, quick: bool, forward: bool) -> Case:
    label = f"{M}x{K} to {N} {dtype} {'forward' if forward else 'fwd+bwd'}"
    work = partial(build, M, K, N, DTYPES[dtype], device, quick, forward)
    flops = (1 if forward else 3) * 2.0 * M * K * N
    return Case(group, label, work, dtype=str(DTYPES[dtype]).removeprefix("torch."), flops=flops, device=device)


def cases(device: str, quick: bool) -> list[Case]:
    made = goals(device, quick) if device == "cuda" else []
    for dtype in DTYPES:
        for K, N in LAYERS[:1] if quick else LAYERS:
            for M in (64,) if quick else (512, 2048, 8192):
                made += [layer_case("linear_act", M, K, N, dtype, device, quick, forward) for forward in (True, False)]
        M, C = (64, 768) if quick else (4096, 768)
        work = partial(build_mlp, M, C, DTYPES[dtype], device, quick)
        label = f"MLP {M}x{C}x{4 * C} {dtype} fwd+bwd"
        flops = 6 * 2.0 * M * C * 4 * C
        name = str(DTYPES[dtype]).removeprefix("torch.")
        made.append(Case("linear_act", label, work, dtype=name, flops=flops, device=device))
    return made
