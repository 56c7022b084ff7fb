"""The cases of fastlm/benchmarks/cases/dispatch.py under pytest-benchmark."""

import pytest
from conftest import listed


@pytest.mark.parametrize("case", listed("dispatch"))
def bench_dispatch(measure, case):
    assert measure(case) > 0
