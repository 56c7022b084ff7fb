"""The cases of fastlm/benchmarks/cases/attention.py under pytest-benchmark."""

import pytest
from conftest import listed


@pytest.mark.parametrize("case", listed("attention"))
def bench_attention(measure, case):
    assert measure(case) > 0
