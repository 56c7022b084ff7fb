"""The cases of fastlm/benchmarks/cases/glu.py under pytest-benchmark."""

GROUP = "glu"


def bench_glu(measure, case):
    measure(case)
