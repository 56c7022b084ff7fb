"""Every feature on every backend in every dtype: values and gradients against float64."""

from pathlib import Path

import pytest
import torch
from feature_matrix import matrix
from features import features
from op_testing import BACKENDS, DTYPES, assert_as_exact_as_torch

import fastlm
from fastlm import _native

FEATURES = list(features())
ON_THE_REFERENCE = {
    "rope, interleaved, positions",
    "cross_entropy, class weights, smoothing",
    "cross_entropy, probabilities",
}


def value_and_gradients(call, inputs, dy):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, backend, dtype):
    """Values and gradients against float64, in float64, float32, bfloat16 and float16, on every instruction set: the
    error is at most twice that of the reference, plain torch, in the same dtype."""
    _, call, inputs = features()[name]
    inputs = [t.to(dtype) for t in inputs]
    with fastlm.use_backend("reference"):
        shape = call(*inputs).shape
        dy = torch.linspace(0.2, 1, shape.numel()).view(shape)
        exact = value_and_gradients(call, [t.double() for t in inputs], dy)
        plain = value_and_gradients(call, inputs, dy)
    if name in ON_THE_REFERENCE and backend.startswith("native"):
        with pytest.raises(NotImplementedError, match="native does not"):
            call(*inputs)
        return
    found = value_and_gradients(call, inputs, dy)
    if dtype == torch.float64:  # in which nothing is more exact
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)
        return
    for i, (f, e, p) in enumerate(zip(found, exact, plain, strict=True)):
        assert_as_exact_as_torch(f, e, p, 2, f"{name}, {'value' if i == 0 else f'gradient {i}'}")


@pytest.mark.skipif(_native.cpu is None or torch.cuda.is_available(), reason="it is written on a CPU, with CPU kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's own
def test_the_matrix_in_the_docs_is_what_the_backends_do():
    pytest.importorskip("triton")
    written = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
    assert matrix() == written, "run `make features`"
