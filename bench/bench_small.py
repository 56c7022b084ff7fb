"""The cases of fastlm/benchmarks/cases/small.py under pytest-benchmark."""

GROUP = "small"


def bench_small(measure, case):
    measure(case)
