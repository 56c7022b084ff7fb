"""The cases of fastlm/benchmarks/cases/rope.py under pytest-benchmark."""

GROUP = "rope"


def bench_rope(measure, case):
    measure(case)
