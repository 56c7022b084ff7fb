"""The cases of fastlm/benchmarks/cases/bias_act.py under pytest-benchmark."""

GROUP = "bias_act"


def bench_bias_act(measure, case):
    measure(case)
