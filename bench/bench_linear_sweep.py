"""The cases of fastlm/benchmarks/cases/linear_sweep.py under pytest-benchmark."""

GROUP = "linear_sweep"


def bench_linear_sweep(measure, case):
    measure(case)
