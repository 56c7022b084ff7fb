"""The cases of fastlm/benchmarks/cases/bias_act.py under pytest-benchmark."""

import pytest
from conftest import listed


@pytest.mark.parametrize("case", listed("bias_act"))
def bench_bias_act(measure, case):
    assert measure(case) > 0
