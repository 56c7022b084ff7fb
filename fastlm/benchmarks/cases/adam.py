"""One AdamW step over the weights of a GPT-2 of 124 M parameters, with and without clipping the gradient first."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks.cases._common import compiled, no_compiler
from fastlm.benchmarks.harness import Built, Case, Variant

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def shapes(n_layer: int, n_embd: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Of the weights of a GPT, as an optimizer sees them: a few large and many small."""
    C = n_embd
    block = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,), (3 * C,), (4 * C,)]
    return [(vocab_size, C), *block * n_layer]


def weights(sizes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in sizes:
        parameter = nn.Parameter(torch.randn(size, generator=generator).to(device))
        parameter.grad = torch.randn(size, generator=generator).to(device) / 100
        made.append(parameter)
    return made


def variant(make, sizes: list[tuple[int, ...]], clip: bool, device: str) -> Variant:
    parameters = weights(sizes, device)
    ours = make is fastlm.optim.AdamW
    optimizer = make(parameters, **HYPER, **({"max_norm": 1.0} if clip and ours else {}))

    def run() -> None:
        if clip and not ours:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    # The gate compares two steps on small weights: the first hides a wrong second moment.
    def outputs() -> dict[str, Tensor]:
        small = weights([(33, 7), (65,)], device)
        stepper = make(small, **HYPER)
        for _ in range(2):
            stepper.step()
        return {f"weight {i}": p.detach() for i, p in enumerate(small)}

    return Variant(run, outputs)


def compiled_adamw(parameters: list[nn.Parameter], **hyper) -> torch.optim.Optimizer:
    """The whole step in one graph; foreach, whose operations over all tensors are what torch.compile fuses."""
    optimizer = torch.optim.AdamW(parameters, foreach=True, **hyper)
    optimizer.step = compiled(optimizer.step)
    return optimizer


def exact(device: str) -> dict[str, Tensor]:
    small = [nn.Parameter(p.detach().double()) for p in weights([(33, 7), (65,)], device)]
    for p, source in zip(small, weights([(33, 7), (65,)], device), strict=True):
        p.grad = source.grad.double()
    optimizer = torch.optim.AdamW(small, **HYPER)
    for _ in range(2):
        optimizer.step()
    return {f"weight {i}": p.detach() for i, p in enumerate(small)}


def build(sizes: list[tuple[int, ...]], clip: bool, device: str, quick: bool) -> Built:
    makers = {
        "torch": partial(torch.optim.AdamW, fused=True),
        "torch default": torch.optim.AdamW,
        "fastlm": fastlm.optim.AdamW,
    }
    missing = {}
    if (reason := no_compiler(quick)) is None:
        makers["torch.compile"] = compiled_adamw
    else:
        missing["torch.compile"] = reason
    variants = {name: variant(make, sizes, clip, device) for name, make in makers.items()}
    return Built(variants, partial(exact, device), missing)


def cases(device: str, quick: bool) -> list[Case]:
    sizes = shapes(2, 256, 1024) if quick else shapes(12, 768, 50304)
    count = sum(torch.Size(size).numel() for size in sizes)
    made = []
    for clip in (False, True):
        # Reads weight, gradient and both moments, writes all but the gradient; the norm reads the gradient once more.
        size = count * 4 * (8 if clip else 7)
        label = f"AdamW {count / 1e6:.3g} M fp32" + (" and clipping" if clip else "")
        build_case = partial(build, sizes, clip, device, quick)
        made.append(Case("adam", label, build_case, bytes=size, device=device, allocators=False))
    return made
