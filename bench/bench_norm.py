"""The cases of fastlm/benchmarks/cases/norm.py under pytest-benchmark."""

GROUP = "norm"


def bench_norm(measure, case):
    measure(case)
