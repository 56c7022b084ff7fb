"""The cases of fastlm/benchmarks/cases/dispatch.py under pytest-benchmark."""

GROUP = "dispatch"


def bench_dispatch(measure, case):
    measure(case)
