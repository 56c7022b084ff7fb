"""The cases of fastlm/benchmarks/cases/adam.py under pytest-benchmark."""

import pytest
from conftest import listed


@pytest.mark.parametrize("case", listed("adam"))
def bench_adam(measure, case):
    assert measure(case) > 0
