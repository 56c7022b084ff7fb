"""The Triton relu kernels against their formulas in float64."""

import math

import pytest
import torch
from triton_testing import DEVICE, HALVES, SIZES, assert_close, randn

from fastlm.kernels.triton import relu as kernels

DTYPES = [torch.float32, torch.float64, *HALVES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_values_and_gradients(n, dtype):
    x, dy = randn(n, dtype=dtype), randn(n, dtype=dtype)
    exact, dy64 = x.double().relu(), dy.double()
    assert torch.equal(kernels.relu(x), torch.relu(x))
    assert torch.equal(kernels.relu_backward(dy, torch.relu(x)), torch.where(x > 0, dy, 0))
    assert_close(kernels.relu_squared(x), exact**2, ulps=1)
    assert_close(kernels.relu_squared_backward(dy, x), 2 * dy64 * exact, ulps=1)


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda t: t.t(),
        lambda t: t[1:, ::2],
        lambda t: t[:, :1].expand(-1, 7),
        lambda t: t[0, 0],
        lambda t: t.view(5, 2, 3, 11).to(memory_format=torch.channels_last),
    ],
)
def test_layouts(lay_out):
    x = lay_out(randn(10, 33))
    y = kernels.relu(x)
    assert torch.equal(y, torch.relu(x))
    assert y.stride() == torch.empty_like(x).stride()
    for dy in (torch.ones((), device=DEVICE).expand(x.shape), randn(*x.shape)):
        dx = kernels.relu_backward(dy, y)
        assert dx.stride() == y.stride()
        assert torch.equal(dx, torch.where(x > 0, dy, 0))
        assert_close(kernels.relu_squared_backward(dy, x), 2 * dy.double() * x.double().relu(), ulps=1)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's, from the interpreter
def test_special_values():
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-25, 1e25]
    x = torch.tensor(special, device=DEVICE)
    dy = torch.full_like(x, 3.0)
    torch.testing.assert_close(kernels.relu(x), torch.relu(x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(kernels.relu_squared(x), torch.relu(x) ** 2, rtol=1e-6, atol=0, equal_nan=True)
    # torch passes the gradient at NaN.
    torch.testing.assert_close(kernels.relu_backward(dy, torch.relu(x)), torch.where(x <= 0, 0, dy), rtol=0, atol=0)
    want = torch.where(x <= 0, 0, dy * (2 * x))
    torch.testing.assert_close(kernels.relu_squared_backward(dy, x), want, rtol=1e-6, atol=0, equal_nan=True)
