"""The cases of fastlm/benchmarks/cases/train.py under pytest-benchmark."""

GROUP = "train"


def bench_train_step(measure, case):
    measure(case)
