"""Steps of optimizers over the weights of a GPT-2 of 124 M parameters: AdamW, with and without clipping the gradient
first, with states of 8 bits, with masters of bfloat16 weights, and over many small weights; SGD with momentum.

On a GPU also what it is to reach there, over 1.5 billion parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks.cases._common import compiled, no_compiler
from fastlm.benchmarks.harness import Built, Case, Variant

GOAL = [(5120, 1024)] * 300  # 1.57 billion
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
SGD_HYPER = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}
# What the gate steps, and how often: the first step hides a wrong second moment. With states of 8 bits it alone is
# exact, and only weights that are not so small have them.
GATE, EIGHT_BIT_GATE = ([(33, 7), (65,)], 2), ([(64, 65), (4099,)], 1)

Sizes = list[tuple[int, ...]]
Maker = Callable[[list[nn.Parameter]], Any]


class Masters:
    """What stock torch has for 16-bit weights: a fused step of float32 copies, into which gradients are copied before,
    and from which the weights are copied after."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.masters = [nn.Parameter(p.detach().float()) for p in parameters]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.grads = [master.grad for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, fused=True, **HYPER)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_(self.grads, [p.grad for p in self.parameters])
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)

    def held(self) -> list[Tensor]:
        return [*held(self.optimizer), *self.masters, *self.grads]


def shapes(n_layer: int, n_embd: int, vocab_size: int) -> Sizes:
    """Of the weights of a GPT, as an optimizer sees them: a few large and many small."""
    C = n_embd
    block = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,), (3 * C,), (4 * C,)]
    return [(vocab_size, C), *block * n_layer]


def weights(sizes: Sizes, device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in sizes:
        parameter = nn.Parameter(torch.randn(size, generator=generator).to(device, dtype))
        parameter.grad = (torch.randn(size, generator=generator) / 100).to(device, dtype)
        made.append(parameter)
    return made


def held(optimizer: Any) -> list[Tensor]:
    """The tensors that an optimizer keeps, but for the counts of steps."""
    if isinstance(optimizer, Masters):
        return optimizer.held()
    kept = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    return [x for x in kept if isinstance(x, Tensor)]


def stepped(make: Maker, parameters: list[nn.Parameter], steps: int) -> dict[str, Tensor]:
    optimizer = make(parameters)
    for _ in range(steps):
        optimizer.step()
    return {f"weight {i}": p.detach() for i, p in enumerate(parameters)}


def variant(
    make: Maker, parameters: list[nn.Parameter], clip: bool, device: str, gate: tuple[Sizes, int] = GATE
) -> Variant:
    optimizer, dtype = make(parameters), parameters[0].dtype
    count = sum(p.numel() for p in parameters)

    def run() -> None:
        if clip:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def remark() -> str:
        size = sum(x.numel() * x.element_size() for x in held(optimizer))
        return f"{size / count:.2f} bytes a parameter"

    sizes, steps = gate
    return Variant(run, lambda: stepped(make, weights(sizes, device, dtype), steps), remark=remark)


def exact(
    make: Maker, device: str, gate: tuple[Sizes, int] = GATE, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    sizes, steps = gate
    sources = weights(sizes, device, dtype)
    wide = [nn.Parameter(p.detach().double()) for p in sources]
    for p, source in zip(wide, sources, strict=True):
        p.grad = source.grad.double()
    return stepped(make, wide, steps)


STOCK, FUSED = partial(torch.optim.AdamW, **HYPER), partial(torch.optim.AdamW, fused=True, **HYPER)
OURS = partial(fastlm.optim.AdamW, **HYPER)


def compiled_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The whole step in one graph; foreach, whose operations over all tensors are what torch.compile fuses."""
    optimizer = torch.optim.AdamW(parameters, foreach=True, **HYPER)
    optimizer.step = compiled(optimizer.step)
    return optimizer


def build(sizes: Sizes, clip: bool, device: str, quick: bool) -> Built:
    makers = {"torch": FUSED, "torch default": STOCK, "fastlm": partial(OURS, max_norm=1.0 if clip else None)}
    missing = {}
    if (reason := no_compiler(quick)) is None:
        makers["torch.compile"] = compiled_adamw
    else:
        missing["torch.compile"] = reason
    variants = {
        name: variant(make, weights(sizes, device), clip and name != "fastlm", device) for name, make in makers.items()
    }
    return Built(variants, partial(exact, STOCK, device), missing)


def build_goal(sizes: Sizes, clip: bool, device: str, quick: bool) -> Built:
    """Both step the same weights, each with averages of its own: 25 GB, and 13 for each."""
    parameters = weights(sizes, device)
    ours = variant(partial(OURS, max_norm=1.0 if clip else None), parameters, False, device)
    return Built({"torch": variant(FUSED, parameters, clip, device), "fastlm": ours}, partial(exact, STOCK, device))


def build_other(
    makers: dict[str, Maker], sizes: Sizes, stock: Maker, gate: tuple[Sizes, int], dtype: torch.dtype, device: str
) -> Built:
    """All step the same weights, each with states of its own."""
    parameters = weights(sizes, device, dtype)
    variants = {name: variant(make, parameters, False, device, gate) for name, make in makers.items()}
    return Built(variants, partial(exact, stock, device, gate, dtype))


def case_of(build, sizes: Sizes, clip: bool, device: str, quick: bool, target: str = "") -> Case:
    # Reads weight, gradient and both moments, writes all but the gradient; the norm reads the gradient once more.
    label = f"AdamW {millions(sizes)} fp32" + (" and clipping" if clip else "")
    work = partial(build, sizes, clip, device, quick)
    size = count_of(sizes) * 4 * (8 if clip else 7)
    return Case("adam", label, work, bytes=size, device=device, allocators=False, target=target)


def count_of(sizes: Sizes) -> int:
    return sum(torch.Size(size).numel() for size in sizes)


def millions(sizes: Sizes) -> str:
    return f"{count_of(sizes) / 1e6:.3g} M"


def other_case(
    label: str, makers: dict[str, Maker], sizes: Sizes, moved: float, device: str, *, stock: Maker = STOCK,
    gate: tuple[Sizes, int] = GATE, dtype: torch.dtype = torch.float32, target: str = "",
) -> Case:  # fmt: skip
    """`moved` bytes a parameter, by the variant that moves least."""
    work = partial(build_other, makers, sizes, stock, gate, dtype, device)
    target = target if device == "cpu" else ""
    return Case("adam", label, work, bytes=moved * count_of(sizes), device=device, allocators=False, target=target)


def others(sizes: Sizes, small: Sizes, device: str) -> list[Case]:
    sgd, full = partial(torch.optim.SGD, **SGD_HYPER), millions(sizes)
    plain = {"torch": FUSED, "torch default": STOCK, "fastlm": OURS}
    packed = {"torch": FUSED, "fastlm fp32 states": OURS, "fastlm": partial(OURS, state_dtype=torch.uint8)}
    masters = {"torch": Masters, "fastlm": partial(OURS, master_weights=True)}
    momentum = {
        "torch": partial(sgd, fused=True),
        "torch default": sgd,
        "fastlm": partial(fastlm.optim.SGD, **SGD_HYPER),
    }
    return [
        other_case(f"AdamW {len(small):,} weights of {small[0][0]:,}", plain, small, 28, device, target="1x torch"),
        other_case(
            f"AdamW {full} fp32, states of 8 bits", packed, sizes, 12 + 4 * (1 + 4 / 256), device, gate=EIGHT_BIT_GATE,
            target="1.11x fp32 states, 2.05 bytes",
        ),
        other_case(f"AdamW {full} bf16, masters of fp32", masters, sizes, 28, device, dtype=torch.bfloat16),
        other_case(f"SGD with momentum {full} fp32", momentum, sizes, 20, device, stock=sgd),
    ]  # fmt: skip


def goals(device: str, quick: bool, sizes: Sizes = GOAL) -> list[Case]:
    target = "90 % of the limit, or 1.1x torch"
    return [case_of(build_goal, sizes, clip, device, quick, target) for clip in (False, True)]


def cases(device: str, quick: bool) -> list[Case]:
    sizes = shapes(2, 256, 1024) if quick else shapes(12, 768, 50304)
    made = goals(device, quick) if device == "cuda" else []
    for clip, target in ((False, "0.97x torch, 5.5x its default"), (True, "1.35x torch")):
        made.append(case_of(build, sizes, clip, device, quick, target if device == "cpu" else ""))
    return made + others(sizes, [(1000,)] * (20 if quick else 2000), device)
