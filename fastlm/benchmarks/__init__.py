"""Measuring fastlm beside torch, on the machine at hand: ``fastlm bench``."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.benchmarks.limits import measure_bandwidth, measure_peak

__all__ = ["main", "measure_bandwidth", "measure_peak"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command `fastlm bench`; returns the exit code."""
    from fastlm.benchmarks.command import run

    return run(argv)
