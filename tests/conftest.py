"""Which fastlm the tests run on, and how to force its slower paths."""

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch
from full_disk import FullDisk

import fastlm
from fastlm import _native

# Triton's kernels run on the GPU where there is one, else in Triton's interpreter on CPU tensors. Triton reads the
# variable when it decorates a function, its own library's at its import: so here, before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import hypothesis
except ImportError:  # the GPU tests do without it
    pass
else:
    hypothesis.settings.register_profile("fastlm", deadline=None)  # a limit per example would test the machine's load
    hypothesis.settings.load_profile("fastlm")

SOURCE = Path(__file__).parents[1]


def pytest_configure(config):
    # `python -m pytest` puts the working directory first in sys.path, and with it the sources, which are not built.
    here = Path(fastlm.__file__).is_relative_to(SOURCE / "fastlm")
    installed = any(d.metadata["Name"] == "fastlm" for d in importlib.metadata.distributions())
    if here and installed and _native.cpu is None:
        raise pytest.UsageError(
            f"fastlm is installed, but the tests would run on the sources in {SOURCE}, which are not built. "
            "Run `pytest` and not `python -m pytest`, or build in place with `make inplace`."
        )
    # FASTLM_TEST_EXCHANGE=off: tensors are read as on a torch that has no DLPack exchange capsule.
    if os.environ.get("FASTLM_TEST_EXCHANGE") == "off":
        if _native.cpu is None:
            raise pytest.UsageError("FASTLM_TEST_EXCHANGE=off needs the module fastlm._cpu")
        _native.cpu.use_exchange(False)


def pytest_report_header(config):
    cpu = f"_cpu on {_native.cpu.active_isa()}" if _native.cpu is not None else _native.reasons["cpu"]
    backend = os.environ.get("FASTLM_BACKEND") or "auto"
    return f"fastlm {fastlm.__version__} from {fastlm.__path__[0]}, torch {torch.__version__}, {cpu}, backend {backend}"


@pytest.fixture
def full_disk(monkeypatch):
    return FullDisk(monkeypatch)
