"""The cases of fastlm/benchmarks/cases/embedding.py under pytest-benchmark."""

GROUP = "embedding"


def bench_embedding(measure, case):
    measure(case)
