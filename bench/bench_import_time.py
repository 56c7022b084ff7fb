"""The cases of fastlm/benchmarks/cases/import_time.py under pytest-benchmark."""

GROUP = "import_time"


def bench_import_time(measure, case):
    measure(case)
