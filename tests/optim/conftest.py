"""Fixtures that run a test on each backend. What a native kernel cannot do yet, it leaves to the reference."""

import warnings

import pytest
from optim_testing import BACKENDS

import fastlm
from fastlm import _native


def running(named):
    name, _, isa = named.partition("-")
    active = _native.cpu.active_isa() if isa else None
    if isa:
        _native.cpu.select_isa(isa)
        assert _native.cpu.active_isa() == isa
    with fastlm.use_backend("auto" if isa else name):
        yield name
    if isa:
        _native.cpu.select_isa(active)


@pytest.fixture(params=BACKENDS)
def backend(request):
    yield from running(request.param)


@pytest.fixture(params=list(dict.fromkeys((BACKENDS[0], BACKENDS[-1]))))
def best_backend(request):
    """For what tests/ops runs on every instruction set: the best one, and the reference."""
    yield from running(request.param)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastlm.FallbackWarning)
        yield
