"""A test whose parameter `backend` names one makes its tensors on that backend's device, and runs on it.

Small calls are the op's own here, but in test_small_calls.py.
"""

import pytest
from op_testing import BACKENDS, on_device, running

from fastlm import _library


@pytest.fixture(autouse=True)
def small_calls(request, monkeypatch):
    monkeypatch.setattr(_library, "_small_calls_to_torch", request.module.__name__ == "test_small_calls")


@pytest.fixture(autouse=True)
def on_its_backend(request):
    call = getattr(request.node, "callspec", None)
    backend = str(call.params.get("backend", "")) if call else ""
    with on_device(backend):
        if backend in BACKENDS:
            with running(backend):
                yield
        else:
            yield
