"""The cases of fastlm/benchmarks/cases/relu.py under pytest-benchmark."""

import pytest
from conftest import listed


@pytest.mark.parametrize("case", listed("relu"))
def bench_relu(measure, case):
    assert measure(case) > 0
