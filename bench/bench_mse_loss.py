"""The cases of fastlm/benchmarks/cases/mse_loss.py under pytest-benchmark."""

GROUP = "mse_loss"


def bench_mse_loss(measure, case):
    measure(case)
