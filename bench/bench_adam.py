"""The cases of fastlm/benchmarks/cases/adam.py under pytest-benchmark."""

GROUP = "adam"


def bench_adam(measure, case):
    measure(case)
