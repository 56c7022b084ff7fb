"""A test whose parameter `backend` names one makes its tensors on that backend's device, and runs on it."""

import pytest
from op_testing import BACKENDS, on_device, running


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
