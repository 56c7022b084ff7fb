"""What is measured: one module per group, each with ``cases(device, quick) -> list[Case]``."""

from __future__ import annotations

import importlib

from fastlm.benchmarks.harness import Case

GROUPS = (
    "import_time", "dispatch", "small", "relu", "activation", "bias_act", "glu", "norm", "rope", "embedding",
    "mse_loss", "cross_entropy", "linear_act", "linear_sweep", "attention", "attention_options", "adam", "train",
)  # fmt: skip


def cases(group: str, device: str = "cpu", quick: bool = False) -> list[Case]:
    """A group's cases; quick: few and small ones, to see that all works."""
    if group not in GROUPS:
        raise ValueError(f"fastlm.benchmarks: a case must be one of {', '.join(GROUPS)}, got {group!r}")
    return importlib.import_module(f"fastlm.benchmarks.cases.{group}").cases(device, quick)


def case(group: str, name: str, device: str, quick: bool) -> Case:
    """One case by its name."""
    return next(c for c in cases(group, device, quick) if c.name == name)
