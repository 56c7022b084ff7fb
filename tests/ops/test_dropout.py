"""dropout, alone and after a bias and an activation, on every backend."""

import pytest
import torch
from op_testing import ACTS, BACKENDS, DTYPES, LAYOUTS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm._dropout import keep_mask

SEED = torch.tensor(2**40 + 3)


def plain(x, p, seed):
    return torch.where(keep_mask(tuple(x.shape), p, seed), x / (1 - p), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_drops_what_the_seed_says(backend, dtype, layout, poisoned):  # noqa: F811
    for shape in ((3, 70), (1, 1), (5, 4099), (0, 3)):
        x = LAYOUTS[layout](numbers(shape, dtype)).requires_grad_()
        y = fastlm.dropout(x, 0.3, seed=SEED.to(x.device))
        assert y.is_contiguous() and y.dtype == dtype
        exact, same = (plain(x.detach().to(of), 0.3, SEED.to(x.device)) for of in (torch.float64, dtype))
        assert_as_exact_as_torch(y.detach(), exact, same, 2, f"y at {shape}")
        assert torch.equal(y == 0, same == 0)
        dy = numbers(shape, dtype, 1)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert_as_exact_as_torch(
            dx, *(plain(dy.to(of), 0.3, SEED.to(x.device)) for of in (torch.float64, dtype)), 3, "dx"
        )


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_after_bias_and_activation(backend, dtype, act, poisoned):  # noqa: F811
    for shape in ((3, 70), (300, 33), (2, 9001)):
        results = []
        for run, of in (("ours", dtype), ("plain", torch.float64), ("plain", dtype)):
            x, bias = (numbers(s, dtype, i).to(of).requires_grad_() for i, s in enumerate((shape, shape[1:])))
            if run == "ours":
                y = fastlm.bias_act(x, bias, act, 0.2, SEED.to(x.device))
            else:
                y = plain(ACTS[act](x + bias), 0.2, SEED.to(x.device))
            results.append([y.detach(), *torch.autograd.grad(y, (x, bias), numbers(shape, dtype, 2).to(of))])
        for what, *values in zip(("y", "dx", "dbias"), *results, strict=True):
            assert_as_exact_as_torch(*values, 3, f"{what} at {shape}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_order(backend):
    x, bias = numbers((3, 5), torch.float64).requires_grad_(), numbers((5,), torch.float64, 1).requires_grad_()
    assert gradcheck(lambda x: fastlm.dropout(x, 0.4, seed=SEED), x, check_batched_grad=True)
    assert gradgradcheck(lambda x: fastlm.dropout(x.square(), 0.4, seed=SEED), x)
    for act in ("gelu", "tanh"):
        assert gradcheck(lambda x, b, act=act: fastlm.bias_act(x, b, act, 0.4, SEED), (x, bias))
        assert gradgradcheck(lambda x, b, act=act: fastlm.bias_act(x, b, act, 0.4, SEED), (x, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_may_be_nan(backend):
    x = torch.full((1000,), float("nan"))
    y = fastlm.dropout(x, 0.5, seed=SEED.to(x.device))
    assert torch.equal(y.isnan(), keep_mask((1000,), 0.5, SEED.to(x.device)))
    assert torch.equal(y == 0, ~y.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x = numbers((5, 7)).requires_grad_()
    torch.library.opcheck(overload("dropout", backend), (x, 0.3, SEED.to(x.device)))
    torch.library.opcheck(overload("bias_act", backend), (x, x[0].detach(), "tanh", 0.3, SEED.to(x.device)))


def test_torchs_generator_decides():
    x = torch.ones(20_000)
    torch.manual_seed(4)
    first = fastlm.dropout(x, 0.25)
    assert not torch.equal(first, fastlm.dropout(x, 0.25))
    torch.manual_seed(4)
    assert torch.equal(first, fastlm.dropout(x, 0.25))
    assert abs((first == 0).double().mean().item() - 0.25) < 0.01 and abs(first.mean().item() - 1) < 0.02
    # The same mask when a checkpoint computes it again.
    leaf = numbers((4, 500)).requires_grad_()
    y = checkpoint(lambda t: fastlm.bias_act(t, torch.zeros(500), "gelu", 0.5).square(), leaf, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(dx == 0, y == 0)
    for same in (fastlm.dropout(x, 0.5, training=False), fastlm.dropout(x, 0.0)):
        assert torch.equal(same, x) and same.data_ptr() != x.data_ptr()


def test_transforms_and_compile():
    x = numbers((4, 6), torch.float64)

    def f(x):
        return fastlm.dropout(x, 0.5, seed=SEED).pow(2).sum()

    torch.testing.assert_close(grad(f)(x), 2 * plain(plain(x, 0.5, SEED), 0.5, SEED))
    torch.testing.assert_close(vmap(grad(f))(x)[1], grad(f)(x[1]))
    torch.testing.assert_close(jvp(f, (x,), (x,))[1], 2 * f(x))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fastlm.dropout(x, 0.5, seed=SEED), fullgraph=True)
    assert torch.equal(compiled(x), plain(x, 0.5, SEED))


@pytest.mark.parametrize(
    "args, options, error, words",
    [
        ((torch.ones(2).long(),), {}, TypeError, "x must be floating point, got torch.int64"),
        ((torch.ones(2), 1.0), {}, ValueError, "p must be in [0, 1), got 1.0"),
        ((torch.ones(2),), {"seed": 3}, TypeError, "seed must be one int64 in a tensor, got 3"),
    ],
)
def test_bad_input(args, options, error, words):
    with pytest.raises(error) as raised:
        fastlm.dropout(*args, **options)
    assert str(raised.value) == f"fastlm.dropout: {words}"
