"""The cases of fastlm/benchmarks/cases/relu.py under pytest-benchmark."""

GROUP = "relu"


def bench_relu(measure, case):
    measure(case)
