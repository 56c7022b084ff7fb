"""The cases of fastlm/benchmarks/cases/attention.py under pytest-benchmark."""

GROUP = "attention"


def bench_attention(measure, case):
    measure(case)
