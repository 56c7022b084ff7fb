"""The Triton bias + activation kernels against their references in float64."""

import math

import pytest
import torch
from triton_testing import (
    DEVICE,
    HALVES,
    assert_close,
    assert_exact,
    assert_lean,
    assert_self_checks,
    compile_for_gpu,
    randn,
)

import fastlm
from fastlm._activations import ACTIVATIONS, SAVE_OUTPUT
from fastlm.kernels.triton import bias_act as kernels

SHAPES = [(0, 5), (5, 0), (1,), (1, 1), (15, 127), (16, 128), (17, 129), (2, 40, 65), (200, 3)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter


def saved_of(x, bias, act):
    """What the op saves; of the bias no more than its size is then to be read."""
    if act in SAVE_OUTPUT:
        return kernels.bias_act(x, bias, act, 0.0, None), torch.full_like(bias, math.nan)
    return x, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values_and_gradients(act, dtype):
    for shape in SHAPES if act in ("relu", "gelu") else SHAPES[-3:]:
        x, bias, dy = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype), randn(*shape, dtype=dtype)
        assert_exact(kernels.bias_act, "bias_act", x, bias, act, 0.0, None)
        saved, bias = saved_of(x, bias, act)
        # torch's sum in float16 is worse than ours, in float32 about as good as ulps of the largest element tell.
        ulps = 4 * math.ceil(math.sqrt(x.numel() / max(shape[-1], 1) + 1))
        assert_exact(kernels.bias_act_backward, "bias_act_backward", dy, saved, bias, act, ulps=ulps)


def test_strides():
    for act in ("relu", "gelu"):
        x, bias = randn(9, 70, 4)[:, :66].transpose(1, 2), randn(132)[::2]
        y = kernels.bias_act(x, bias, act, 0.0, None)
        assert y.is_contiguous()
        assert torch.equal(y, kernels.bias_act(x.contiguous(), bias.contiguous(), act, 0.0, None))
        saved, bias = saved_of(x, bias, act)
        for dy in (torch.ones((), device=DEVICE).expand(x.shape), randn(66, 4, 9).permute(2, 1, 0)):
            found = kernels.bias_act_backward(dy, saved, bias, act)
            wanted = kernels.bias_act_backward(*(t.contiguous() for t in (dy, saved, bias)), act)
            assert found[0].is_contiguous()
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_stays_in_its_column(act):
    x, bias, dy = randn(70, 40), randn(40), randn(70, 40)
    x[3, 7] = math.nan
    assert kernels.bias_act(x, bias, act, 0.0, None).isnan().nonzero().tolist() == [[3, 7]]
    dy[5, 9], bias[9] = math.nan, 100.0
    saved, bias = saved_of(x, bias, act)
    dx, dbias = kernels.bias_act_backward(dy, saved, bias, act)
    at_x = [] if act == "none" else [[3, 7]]
    if act in ("relu", "relu_squared"):  # the gradient passes at NaN, where it is dy or twice dy times NaN
        at_x = [[3, 7]] if act == "relu_squared" else []
    assert dx.isnan().nonzero().tolist() == [*at_x, [5, 9]]
    assert dbias.isnan().nonzero().flatten().tolist() == [*(column for _, column in at_x), 9]


def test_the_bias_gradient_is_summed_in_short_runs():
    dy = torch.full((3_000, 1), 0.1, device=DEVICE)
    y = torch.ones_like(dy)
    _, dbias = kernels.bias_act_backward(dy, y, torch.ones(1, device=DEVICE), "relu")
    assert_close(dbias, dy.double().sum(0), ulps=2)


def test_dropout():
    x, bias, seed = randn(6, 37), randn(37), torch.tensor(11, device=DEVICE)
    for act in ("none", "gelu", "tanh"):
        assert_exact(kernels.bias_act, "bias_act", x, bias, act, 0.4, seed)
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, bias)]
            with fastlm.use_backend(backend):
                fastlm.bias_act(*leaves, act, 0.4, seed).sin().sum().backward()
            results.append([t.grad for t in leaves])
        for got, want in zip(*results, strict=True):
            assert_close(got, want, ulps=8)


def test_what_it_refuses():
    x, bias, seed = randn(2, 3), randn(3), torch.tensor(11, device=DEVICE)
    with fastlm.use_backend("triton"):
        fastlm.bias_act(x.double(), bias.double())
        with pytest.raises(NotImplementedError, match="triton does not take"):
            fastlm.bias_act(x.double(), bias.double(), "relu", 0.1, seed)
    assert kernels._unsupported(x.long(), bias, "relu", 0.0, None) == "does not take torch.int64"


def test_self_checks():
    assert_self_checks("bias_act")


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import bias_act as kernels
for act, dtype in (
    ("relu", torch.float32), ("tanh", torch.float32), ("gelu", torch.float32), ("relu_squared", torch.float16),
    ("gelu", torch.bfloat16), ("gelu_tanh", torch.bfloat16), ("relu", torch.float64),
):
    x, bias = torch.empty(64, 768, dtype=dtype), torch.empty(768, dtype=dtype)
    kernels.bias_act(x, bias, act, 0.0, None)
    kernels.bias_act_backward(x, x, bias, act)
""")
    assert len(compiled) == 2 * 2 * 7
    assert_lean(compiled)
