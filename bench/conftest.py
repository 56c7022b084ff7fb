"""Timing under pytest-benchmark: `pytest bench --benchmark-only`, FASTLM_BENCH=full for the sizes of `fastlm bench`."""

import os
from statistics import median

import pytest
import torch

from fastlm.benchmarks import cases
from fastlm.benchmarks.harness import Case, Local

QUICK = os.environ.get("FASTLM_BENCH") != "full"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def built():
    """A case with its variants, checked against float64. Built once, and only the last one is kept in memory."""
    last: dict[Case, Local] = {}

    def build(case: Case) -> Local:
        if case not in last:
            last.clear()
            last[case] = Local(case)
        return last[case]

    return build


@pytest.fixture
def measure(benchmark, built):
    """Times a case's variants in turns; what each takes and fastlm's ratio to the baseline go into extra_info."""

    def run(case: Case) -> None:
        host = built(case)
        names = host.names()[0]
        counts = {name: host.prepare(name, 0.01) for name in names}
        taken: dict[str, list[float]] = {name: [] for name in names}

        def one_round():
            for name in names:
                taken[name].append(host.time(name, counts[name]) / counts[name])

        benchmark.pedantic(one_round, rounds=5, warmup_rounds=1)
        ratios = [a / b for a, b in zip(taken[case.baseline], taken["fastlm"], strict=True)]
        benchmark.extra_info.update(
            case=case.name,
            seconds={name: median(times) for name, times in taken.items()},
            times_faster=median(ratios),
        )

    return run


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        found = cases.cases(metafunc.module.GROUP, DEVICE, QUICK)
        metafunc.parametrize("case", found, ids=[case.name for case in found])
