"""The fixture `backend` runs a test on each. What a native kernel cannot do yet, it leaves to the reference."""

import warnings

import pytest
from optim_testing import BACKENDS

import fastlm
from fastlm import _native


@pytest.fixture(params=BACKENDS)
def backend(request):
    name, _, isa = request.param.partition("-")
    active = _native.cpu.active_isa() if isa else None
    if isa:
        _native.cpu.select_isa(isa)
        assert _native.cpu.active_isa() == isa
    with fastlm.use_backend("auto" if isa else name):
        yield name
    if isa:
        _native.cpu.select_isa(active)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastlm.FallbackWarning)
        yield
