"""One AdamW step over the weights of a GPT-2 of 124 M parameters, with and without clipping the gradient first.

On a GPU also what it is to reach there, over 1.5 billion parameters.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks.cases._common import compiled, no_compiler
from fastlm.benchmarks.harness import Built, Case, Variant

GOAL = [(5120, 1024)] * 300  # 1.57 billion
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


def variant(make, parameters: list[nn.Parameter], clip: bool, device: str) -> Variant:
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
    variants = {name: variant(make, weights(sizes, device), clip, device) for name, make in makers.items()}
    return Built(variants, partial(exact, device), missing)


def build_goal(sizes: list[tuple[int, ...]], clip: bool, device: str, quick: bool) -> Built:
    """Both step the same weights, each with averages of its own: 25 GB, and 13 for each."""
    parameters = weights(sizes, device)
    makers = {"torch": partial(torch.optim.AdamW, fused=True), "fastlm": fastlm.optim.AdamW}
    return Built(
        {name: variant(make, parameters, clip, device) for name, make in makers.items()}, partial(exact, device)
    )


def case_of(build, sizes: list[tuple[int, ...]], clip: bool, device: str, quick: bool, target: str = "") -> Case:
    count = sum(torch.Size(size).numel() for size in sizes)
    # Reads weight, gradient and both moments, writes all but the gradient; the norm reads the gradient once more.
    size = count * 4 * (8 if clip else 7)
    label = f"AdamW {count / 1e6:.3g} M fp32" + (" and clipping" if clip else "")
    work = partial(build, sizes, clip, device, quick)
    return Case("adam", label, work, bytes=size, device=device, allocators=False, target=target)


def goals(device: str, quick: bool, sizes: list[tuple[int, ...]] = GOAL) -> list[Case]:
    target = "90 % of the limit, or 1.1x torch"
    return [case_of(build_goal, sizes, clip, device, quick, target) for clip in (False, True)]


def cases(device: str, quick: bool) -> list[Case]:
    sizes = shapes(2, 256, 1024) if quick else shapes(12, 768, 50304)
    made = goals(device, quick) if device == "cuda" else []
    return made + [case_of(build, sizes, clip, device, quick) for clip in (False, True)]
