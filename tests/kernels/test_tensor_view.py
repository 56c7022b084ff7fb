"""How the C++ modules read torch's tensors: many dimensions, empty ones, ones without memory."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastlm
from fastlm import _native

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=_native.reasons.get("cpu", ""))


@pytest.fixture(autouse=True)
def kernels():
    with fastlm.use_backend("native"):  # plain torch would take small tensors
        yield


@pytest.fixture(params=["exchange", "attributes"])
def reader(request):
    """Through the DLPack exchange capsule, and as on a torch without one."""
    before = _native.cpu.use_exchange(True)
    if request.param == "exchange" and not before:
        pytest.skip("this torch has no exchange capsule")
    _native.cpu.use_exchange(request.param == "exchange")
    yield
    _native.cpu.use_exchange(before)


@pytest.mark.parametrize("sizes", [(1,) * 9, (2,) * 10, (1, 3) * 6, (2, 1, 1, 2, 0, 2, 1, 2, 2)], ids=str)
def test_more_dimensions_than_a_view_holds(reader, sizes):
    x = torch.randn(sizes, requires_grad=True)
    y = fastlm.relu(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, torch.relu(x)) and torch.equal(x.grad, (x > 0).float())
    mixed = torch.randn(sizes).transpose(0, -1)
    assert torch.equal(fastlm.relu(mixed), torch.relu(mixed))
    bias = torch.randn(sizes[-1])
    assert torch.equal(fastlm.bias_act(x, bias), torch.relu(x + bias))


def test_too_many_dimensions_apart_get_a_sentence(reader):
    x = torch.randn(2**9).as_strided((2,) * 9, tuple(2**i for i in range(9)))  # dense, and no two merge
    with pytest.raises(
        ValueError, match="tensor has 9 dimensions, more than 8 of which do not lie one behind the other"
    ):
        _native.cpu.act_forward(x, x, 1, 1)
    torch.testing.assert_close(fastlm.relu(x), torch.relu(x))


@pytest.mark.parametrize("f", [fastlm.relu, fastlm.relu_squared])
def test_empty_gradients_of_any_strides(reader, f):
    x = torch.empty(0, 3, requires_grad=True)
    f(x).backward(torch.empty(3, 0).t())
    assert x.grad.shape == (0, 3)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_without_memory_is_refused(reader):
    with FakeTensorMode():
        fakes = [torch.empty(8), torch.empty(8)[3:]]
    for fake in fakes:
        with pytest.raises((ValueError, RuntimeError)):
            _native.cpu.act_forward(fake, fake, 1, 1)
