"""The Triton kernels of activations, alone and in gated units, against their references in float64."""

import math

import pytest
import torch
from triton_testing import (
    DEVICE,
    HALVES,
    SIZES,
    assert_close,
    assert_exact,
    assert_lean,
    assert_self_checks,
    compile_for_gpu,
    randn,
)

import fastlm
from fastlm._activations import ACTIVATIONS, SAVE_OUTPUT
from fastlm.kernels.triton import activation, glu

DTYPES = [torch.float32, torch.float64, *HALVES]
# Of each op: its kernels, and the arguments that follow the tensors.
OPS = {
    "gelu": (activation.gelu, activation.gelu_backward, ("none",)),
    "gelu, tanh": (activation.gelu, activation.gelu_backward, ("tanh",)),
    "silu": (activation.silu, activation.silu_backward, ()),
    "sigmoid": (activation.sigmoid, activation.sigmoid_backward, ()),
    "tanh": (activation.tanh_, activation.tanh_backward, ()),
}
SHAPES = [(0, 5), (5, 0), (1,), (15, 127), (2, 9, 129)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter


def run(name, x, dy):
    """y and dx by the kernels."""
    forward, backward, more = OPS[name]
    y = forward(x, *more)
    return y, backward(dy, y if name in SAVE_OUTPUT else x, *more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients(name, dtype):
    op = name.partition(",")[0]
    forward, backward, more = OPS[name]
    for n in SIZES:
        x, dy = 3 * randn(n, dtype=dtype), randn(n, dtype=dtype)
        assert_exact(forward, op, x, *more)
        saved = forward(x, *more) if name in SAVE_OUTPUT else x
        assert_exact(backward, f"{op}_backward", dy, saved, *more)


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh"])
def test_small_values_keep_their_digits(name):
    """Where the largest value does not hide them."""
    for x in (torch.logspace(-30, 1, 200, device=DEVICE), -torch.logspace(-30, 1, 200, device=DEVICE)):
        y, _ = run(name, x, x)
        torch.testing.assert_close(y.double(), ACTIVATIONS[name](x.double()), rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_layouts(name):
    for lay_out in (
        lambda t: t.t(),
        lambda t: t[1:, ::2],
        lambda t: t[:, :1].expand(-1, 7),
        lambda t: t[0, 0],
        lambda t: t.view(5, 2, 3, 11).to(memory_format=torch.channels_last),
    ):
        x = lay_out(randn(10, 33))
        for dy in (torch.ones((), device=DEVICE).expand(x.shape), randn(*x.shape)):
            y, dx = run(name, x, dy)
            want_y, want_dx = run(name, x.contiguous(), dy.contiguous())
            assert y.stride() == dx.stride() == torch.empty_like(x).stride()
            assert torch.equal(y, want_y) and torch.equal(dx, want_dx)


@pytest.mark.parametrize("name", OPS)
def test_special_values(name):
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-25, 1e25, -1e25]
    x = torch.tensor(special, device=DEVICE)
    # torch's gelu of inf may be NaN in float32; the slope of its approximation is at 1e25, in any float32.
    leaf = x.to(torch.float32 if name == "gelu, tanh" else torch.float64, copy=True).requires_grad_()
    want = ACTIVATIONS[name.replace(", ", "_")](leaf)
    want.backward(torch.full_like(want, 3.0))
    y, dx = run(name, x, torch.full_like(x, 3.0))
    torch.testing.assert_close(y, want.float(), equal_nan=True)
    torch.testing.assert_close(dx, leaf.grad.float(), equal_nan=True)
    assert torch.equal(y[3:5].signbit(), want.float()[3:5].signbit())


# --- gated units ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_glu(act, dtype):
    for shape in SHAPES:
        gate, up, dy = (2 * randn(*shape, dtype=dtype) for _ in range(3))
        assert_exact(glu.glu, "glu", gate, up, act)
        assert_exact(glu.glu_backward, "glu_backward", dy, gate, up, act)


def test_glu_of_the_halves_of_a_matrix():
    both = randn(9, 2, 70)
    for gate, up in (both.unbind(1), both.flatten(1).chunk(2, dim=-1), both.permute(2, 0, 1).unbind(-1)):
        assert not gate.is_contiguous()
        for dy in (torch.ones((), device=DEVICE).expand(gate.shape), randn(*gate.shape)):
            results = [glu.glu(gate, up, "silu"), *glu.glu_backward(dy, gate, up, "silu")]
            dense = [t.contiguous() for t in (dy, gate, up)]
            wanted = [glu.glu(*dense[1:], "silu"), *glu.glu_backward(*dense, "silu")]
            for got, want in zip(results, wanted, strict=True):
                assert got.is_contiguous() and torch.equal(got, want)


def test_the_ops_run_on_these_kernels():
    """Through autograd, with what the ops save."""
    calls = [*map(fastlm.__dict__.get, ("gelu", "silu", "sigmoid", "tanh", "relu", "relu_squared"))]
    calls.append(lambda x: fastlm.glu(x[:, :20], x[:, 20:], "tanh"))
    for call in calls:
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            x = torch.linspace(-3, 3, 280, device=DEVICE, dtype=dtype).view(7, 40).requires_grad_()
            with fastlm.use_backend(backend):
                y = call(x)
            y.sin().sum().backward()
            results.append((y.detach(), x.grad))
        for got, want in zip(*results, strict=True):
            assert_close(got, want, ulps=8)


def test_self_checks():
    assert_self_checks("activation", "relu", "glu")


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm._activations import ACTIVATIONS
from fastlm.kernels.triton import activation, glu
def compile(act, dtype):
    x = torch.empty(4, 1024, dtype=dtype)
    activation.value(x, act)
    activation.gradient(x, x, act)
    if act == "gelu":
        glu.glu(x, x, act)
        glu.glu_backward(x, x, x, act)
for act in ACTIVATIONS:
    compile(act, torch.bfloat16)
for act in ("gelu", "tanh"):
    compile(act, torch.float32)
""")
    assert len(compiled) == 2 * (2 * (len(ACTIVATIONS) + 2) + 2 * 2)
    assert_lean(compiled)
