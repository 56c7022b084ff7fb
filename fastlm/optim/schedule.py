"""Learning rates that rise, and then fall by one of three curves."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SHAPES = ("cosine", "linear", "wsd")


def schedule_factor(
    step: int, steps: int, *, warmup: int, shape: str = "cosine", final: float = 0.0, decay: int | None = None
) -> float:
    """The learning rate of step `step` from 0, as a share of the highest one; arguments as in ``warmup_schedule``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    first = warmup  # where it is highest for the last time
    if shape == "wsd":
        first = max(warmup, steps - 1 - (decay if decay is not None else round(0.2 * steps)))
    done = min(1.0, max(0, step - first) / max(1, steps - 1 - first))
    fallen = {"cosine": 0.5 * (1 - math.cos(math.pi * done)), "linear": done, "wsd": math.sqrt(done)}[shape]
    return final + (1 - final) * (1 - fallen)


def warmup_schedule(
    optimizer: Optimizer,
    steps: int,
    *,
    warmup: int = 0,
    shape: str = "cosine",
    final: float = 0.0,
    decay: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """A torch scheduler for the whole of training: call its ``step`` after each of the optimizer's.

    The learning rate rises linearly over `warmup` steps to that which each group has, then falls to a share of it,
    which the last step has, where there is one left to fall in, and all that come after it.

    Args:
        steps: of the whole training.
        warmup: steps below the highest learning rate.
        shape: "cosine", half a wave (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983); "linear", a
            straight line; "wsd", warmup, stable, decay: nothing until the last `decay` steps, then by the square root
            of their share that is done (Hu et al. 2024, https://arxiv.org/abs/2404.06395; the curve of Hägele et al.
            2024, https://arxiv.org/abs/2405.18392).
        final: last learning rate as a share of the highest.
        decay: steps in which it falls, for "wsd" alone; a fifth of all where not given.
        last_epoch: as torch's schedulers, the number of the last step where training resumes.

    Raises:
        ValueError: a value outside its range, or decay with another shape.
    """
    name = "fastlm.optim.warmup_schedule"
    if shape not in SHAPES:
        raise ValueError(f"{name}: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if not 0 <= warmup < steps:
        raise ValueError(f"{name}: warmup must be at least 0 and below steps, {steps}, got {warmup}")
    if not 0 <= final <= 1:
        raise ValueError(f"{name}: final must be in [0, 1], got {final}")
    if decay is not None and shape != "wsd":
        raise ValueError(f"{name}: decay is for the shape 'wsd', got {decay} with {shape!r}")
    if decay is not None and not 0 <= decay <= steps - warmup:
        raise ValueError(f"{name}: decay must be at least 0 and at most steps - warmup, {steps - warmup}, got {decay}")

    def factor(step: int) -> float:
        return schedule_factor(step, steps, warmup=warmup, shape=shape, final=final, decay=decay)

    return LambdaLR(optimizer, factor, last_epoch)
