"""The cases of fastlm/benchmarks/cases/activation.py under pytest-benchmark."""

GROUP = "activation"


def bench_activation(measure, case):
    measure(case)
