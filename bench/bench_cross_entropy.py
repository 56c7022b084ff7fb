"""The cases of fastlm/benchmarks/cases/cross_entropy.py under pytest-benchmark."""

GROUP = "cross_entropy"


def bench_cross_entropy(measure, case):
    measure(case)
