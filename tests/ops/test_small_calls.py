"""Calls too small to be worth an op's own cost go to plain torch, and nothing but their time shows it."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import numbers
from torch.func import grad

import fastlm

x, up, vector, target = numbers((6, 8)), numbers((6, 8), seed=1), numbers((8,), seed=2), torch.arange(6)
matrix = numbers((8, 8), seed=3)
CALLS = {
    "relu": (lambda x: fastlm.relu(x), [x]),
    "relu_squared": (lambda x: fastlm.relu_squared(x), [x]),
    "silu": (lambda x: fastlm.silu(x), [x]),
    "sigmoid": (lambda x: fastlm.sigmoid(x), [x]),
    "tanh": (lambda x: fastlm.tanh(x), [x]),
    "bias_act": (lambda x, b: fastlm.bias_act(x, b, "silu"), [x, vector]),
    "glu": (lambda x, u: fastlm.glu(x, u), [x, up]),
    "layer_norm": (lambda x, w, b: fastlm.layer_norm(x, 8, w, b), [x, vector, vector]),
    "rms_norm": (lambda x, w: fastlm.rms_norm(x, (8,), w), [x, vector]),
    "cross_entropy": (lambda x: fastlm.cross_entropy(x, target, label_smoothing=0.1), [x]),
    "embedding": (lambda w: fastlm.embedding(target, w), [x]),
    "mse_loss": (lambda x: fastlm.mse_loss(x, up), [x]),
    "linear_act": (lambda x, w, b: fastlm.linear_act(x, w, b, "gelu"), [x, matrix, vector]),
    "linear_cross_entropy": (lambda x, w, b: fastlm.linear_cross_entropy(x, w, target, b), [x, matrix, vector]),
}


def nodes(y):
    """The names of all nodes of y's graph."""
    names, todo = [], [y.grad_fn]
    while todo:
        if (at := todo.pop()) is not None:
            names.append(type(at).__name__)
            todo += [n for n, _ in at.next_functions]
    return " ".join(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_plain_torch_gives_what_the_op_gives(name, dtype):
    call, inputs = CALLS[name]

    def run():
        given = [t.to(dtype).requires_grad_() for t in inputs]
        y = call(*given)
        return y, torch.autograd.grad(y.sum(), given)

    with fastlm.use_backend("auto"):
        y, gradients = run()
    with fastlm.use_backend("reference"):
        expected, expected_gradients = run()
    for a, b in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        tolerance = 1e-5 if dtype == torch.float32 else 0.03  # plain torch rounds in between
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


KEPT = {("embedding", torch.bfloat16), ("mse_loss", torch.bfloat16)} | {  # see their files
    (name, dtype) for name in ("layer_norm", "rms_norm") for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_who_runs_them(name, dtype):
    call, inputs = CALLS[name]
    given = [t.to(dtype).requires_grad_() for t in inputs]
    with fastlm.use_backend("auto"):
        assert ("_auto_" in nodes(call(*given))) == ((name, dtype) in KEPT)
    with fastlm.use_backend("reference"):
        assert f"{name}_reference_" in nodes(call(*given))


def test_without_a_graph_layer_norm_is_torchs_too():
    with torch.no_grad(), fastlm.use_backend("auto"):
        assert torch.equal(fastlm.layer_norm(x, 8, vector, vector), F.layer_norm(x, (8,), vector, vector))


@pytest.mark.parametrize("name", CALLS)
def test_third_derivatives(name):
    call, inputs = CALLS[name]
    first, *rest = (t.double() for t in inputs)

    def third():
        first_order = grad(lambda t: call(t, *rest).sin().sum())
        second_order = grad(lambda t: first_order(t).sin().sum())
        return grad(lambda t: second_order(t).sin().sum())(first)

    with fastlm.use_backend("auto"):
        got = third()
    with fastlm.use_backend("reference"):
        torch.testing.assert_close(got, third())


def test_what_the_ops_refuse_is_refused():
    turned = numbers((3, 5, 2)).transpose(1, 2)  # (3, 2, 5), which torch multiplies and adds to apart
    matrix, wrong = numbers((6, 5)), numbers((6,)).double()
    with fastlm.use_backend("auto"):
        with pytest.raises(TypeError, match="bias must have the dtype of x"):
            fastlm.linear_act(turned, matrix, wrong)
        with pytest.raises(TypeError, match="bias must have the dtype of x"):
            fastlm.linear_cross_entropy(turned, matrix, torch.zeros(3, 2, dtype=torch.int64), wrong)
        with pytest.raises(ValueError, match="reduction must be one of"):
            fastlm.cross_entropy(x, target, reduction="elementwise_mean")
        assert fastlm.cross_entropy(x, x.double().softmax(1)).dtype == torch.float32
        with torch.no_grad(), pytest.raises(TypeError, match="bias must be float32 or of the dtype of x"):
            fastlm.layer_norm(x.bfloat16(), 8, None, vector.half())


def test_an_ignored_row_may_hold_anything():
    logits = x.clone()
    logits[2] = float("nan")
    logits.requires_grad_()
    with fastlm.use_backend("auto"):
        loss = fastlm.cross_entropy(logits, torch.where(target == 2, -100, target))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[2].any()
