"""The cases of fastlm/benchmarks/cases/attention_options.py under pytest-benchmark."""

GROUP = "attention_options"


def bench_attention_options(measure, case):
    measure(case)
