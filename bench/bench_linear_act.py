"""The cases of fastlm/benchmarks/cases/linear_act.py under pytest-benchmark."""

GROUP = "linear_act"


def bench_linear_act(measure, case):
    measure(case)
