"""Every feature on every backend in every dtype: values and gradients against float64."""

import pytest
import torch
from features import features
from op_testing import BACKENDS, DTYPES, assert_as_exact_as_torch

import fastlm

FEATURES = list(features())


def value_and_gradients(call, inputs, dy):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, backend, dtype):
    _, call, inputs = features()[name]
    inputs = [t.to(dtype) for t in inputs]
    with fastlm.use_backend("reference"):
        shape = call(*inputs).shape
        dy = torch.linspace(0.2, 1, shape.numel()).view(shape)
        exact = value_and_gradients(call, [t.double() for t in inputs], dy)
        plain = value_and_gradients(call, inputs, dy)
    found = value_and_gradients(call, inputs, dy)
    for i, (f, e, p) in enumerate(zip(found, exact, plain, strict=True)):
        assert_as_exact_as_torch(f, e, p, 2, f"{name}, {'value' if i == 0 else f'gradient {i}'}")
