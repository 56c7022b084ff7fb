"""Tests whose parameter `backend` names one on a GPU make their tensors there."""

import pytest
from op_testing import on_device


@pytest.fixture(autouse=True)
def tensors_where_the_backend_is(request):
    call = getattr(request.node, "callspec", None)
    with on_device(str(call.params.get("backend", "")) if call else ""):
        yield
