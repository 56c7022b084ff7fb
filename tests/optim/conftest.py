"""Fixtures that run a test on each backend. What a native kernel cannot do yet, it leaves to the reference."""

import functools
import importlib
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from optim_testing import BACKENDS, GPU_BACKENDS

import fastlm
from fastlm import _native

sys.path.append(str(Path(__file__).parents[1] / "cuda"))  # for cuda_testing


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


@functools.cache
def emulated():
    return importlib.import_module("cuda_testing").Kernels("emulated")


@pytest.fixture(params=[*BACKENDS, *GPU_BACKENDS])
def every_backend(request, monkeypatch):
    """Also the GPU's: new tensors go there where there is one, else CUDA's kernels run in their emulation, on CPU
    tensors, and Triton's in its interpreter."""
    if request.param in BACKENDS:
        yield from running(request.param)
    elif os.environ.get("FASTLM_CPU_ISA"):
        pytest.skip("the same on every instruction set of the CPU")
    elif torch.cuda.is_available():
        with torch.device("cuda"), warnings.catch_warnings():
            warnings.simplefilter("error", fastlm.FallbackWarning)
            yield from running(request.param.replace("cuda", "native"))
    elif request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        yield from running("triton")
    else:
        kernels = emulated()
        monkeypatch.setattr("fastlm.ops.adam._adam", kernels["adam_"])
        monkeypatch.setattr("fastlm.ops.sgd._sgd", kernels["sgd_"])
        yield "emulated"


@pytest.fixture(params=list(dict.fromkeys((BACKENDS[0], BACKENDS[-1]))))
def best_backend(request):
    """For what tests/ops runs on every instruction set: the best one, and the reference."""
    yield from running(request.param)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastlm.FallbackWarning)
        yield
