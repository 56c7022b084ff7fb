"""The cases of fastlm/benchmarks/cases/train.py under pytest-benchmark."""

import pytest
from conftest import listed


@pytest.mark.parametrize("case", listed("train"))
def bench_train_step(measure, case):
    assert measure(case) > 0
