"""The Triton bias + activation kernels against their formulas in float64."""

import math

import pytest
import torch
from triton_testing import DEVICE, HALVES, assert_close, compile_for_gpu, randn

from fastlm.kernels._common import unsupported_bias_act_on_gpu
from fastlm.kernels.triton import bias_act as kernels

SHAPES = [(0, 5), (5, 0), (1,), (1, 1), (15, 127), (16, 128), (17, 129), (2, 40, 65), (200, 3)]


def backward(dy, x, bias, act):
    """The wrapper's gradients, in float64, and what the op saves."""
    y = torch.relu(x + bias)
    at = (x.double() + bias.double()).relu()
    want = torch.where(y <= 0, 0, dy.double()) if act == "relu" else 2 * dy.double() * at
    return want, (y if act == "relu" else x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ["relu", "relu_squared"])
def test_values_and_gradients(shape, dtype, act):
    x, bias, dy = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype), randn(*shape, dtype=dtype)
    exact = (x.double() + bias.double()).relu()
    assert_close(kernels.bias_act(x, bias, act, 0.0, None), exact if act == "relu" else exact**2, ulps=2)
    want, saved = backward(dy, x, bias, act)
    dx, dbias = kernels.bias_act_backward(dy, saved, bias, act)
    assert_close(dx, want, ulps=2)
    assert_close(dbias, want.sum_to_size(bias.shape), ulps=4 * math.ceil(math.sqrt(x.numel() / max(shape[-1], 1) + 1)))


@pytest.mark.parametrize("act", ["relu", "relu_squared"])
def test_strides(act):
    x, bias = randn(9, 70, 4)[:, :66].transpose(1, 2), randn(132)[::2]
    want = (x + bias).relu()
    y = kernels.bias_act(x, bias, act, 0.0, None)
    assert y.is_contiguous()
    assert_close(y, (want if act == "relu" else want**2).double(), ulps=4)
    for dy in (torch.ones((), device=DEVICE).expand(x.shape), randn(66, 4, 9).permute(2, 1, 0)):
        want, saved = backward(dy, x, bias, act)
        dx, dbias = kernels.bias_act_backward(dy, saved, bias, act)
        assert dx.is_contiguous()
        assert_close(dx, want, ulps=4)
        assert_close(dbias, want.sum((0, 1)), ulps=16)


@pytest.mark.parametrize("act", ["relu", "relu_squared"])
def test_nan_stays_in_its_column(act):
    x, bias, dy = randn(70, 40), randn(40), randn(70, 40)
    x[3, 7] = math.nan
    y = kernels.bias_act(x, bias, act, 0.0, None)
    assert y.isnan().nonzero().tolist() == [[3, 7]]
    dy[5, 9], bias[9] = math.nan, 100.0
    want, saved = backward(dy, x, bias, act)
    dx, dbias = kernels.bias_act_backward(dy, saved, bias, act)
    assert torch.equal(dx.isnan(), want.isnan())
    assert dbias.isnan().nonzero().flatten().tolist() == want.sum(0).isnan().nonzero().flatten().tolist()


def test_the_bias_gradient_is_summed_in_short_runs():
    dy = torch.full((3_000, 1), 0.1, device=DEVICE)
    y = torch.ones_like(dy)
    _, dbias = kernels.bias_act_backward(dy, y, torch.ones(1, device=DEVICE), "relu")
    assert_close(dbias, dy.double().sum(0), ulps=2)


def test_what_it_refuses():
    x, bias = randn(2, 3), randn(3)
    assert unsupported_bias_act_on_gpu(x, bias, "relu", 0.0, None) is None
    assert unsupported_bias_act_on_gpu(x, bias, "gelu", 0.0, None) == "does not do act='gelu'"
    assert unsupported_bias_act_on_gpu(x, bias, "relu", 0.1, None) == "does not do dropout"
    assert unsupported_bias_act_on_gpu(x.long(), bias, "relu", 0.0, None) == "does not take torch.int64"


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm.kernels._common import unsupported_bias_act_on_gpu
from fastlm.kernels.triton import bias_act as kernels
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    x, bias = torch.empty(64, 768, dtype=dtype), torch.empty(768, dtype=dtype)
    for act in ("relu", "relu_squared"):
        kernels.bias_act(x, bias, act, 0.0, None)
        kernels.bias_act_backward(x, x, bias, act)
""")
    assert len(compiled) == 2 * 4 * 4
    for c in compiled:
        # float64 is there for checks, not for speed.
        assert c["spilled"] == 0 or c["dtype"] == "fp64", (c["kernel"], c["dtype"], c["architecture"])
        assert "ld.global.v" in c["ptx"]  # 128-bit loads
