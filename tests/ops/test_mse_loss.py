"""mse_loss through the op, on every backend, beside torch's."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from op_testing import BACKENDS, DTYPES, LAYOUTS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import fastlm

SIZES = [(1,), (63,), (5, 7), (3, 4, 65), (70000,), (0,), ()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_exact_as_torch(backend, dtype, layout, poisoned):  # noqa: F811
    for size in SIZES:
        if len(size) < 2 and layout in ("transposed", "padded rows"):
            continue
        for reduction in ("mean", "sum"):
            x, target = (LAYOUTS[layout](numbers(size, dtype, seed)) for seed in (0, 1))
            results = []
            for f, of in ((fastlm.mse_loss, dtype), (F.mse_loss, torch.float64), (F.mse_loss, dtype)):
                leaves = [t.detach().to(of).requires_grad_() for t in (x, target)]
                loss = f(*leaves, reduction=reduction)
                results.append([loss.detach(), *torch.autograd.grad(loss, leaves, loss.new_tensor(0.75))])
            for what, *values in zip(("loss", "dx", "dtarget"), *results, strict=True):
                assert_as_exact_as_torch(*values, 3, f"{what} at {size}, {reduction}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_order(backend):
    x, target = (numbers((3, 5), torch.float64, seed).requires_grad_() for seed in (0, 1))
    for reduction in ("mean", "sum"):
        assert gradcheck(lambda *t, r=reduction: fastlm.mse_loss(*t, reduction=r), (x, target), check_batched_grad=True)
        assert gradgradcheck(lambda *t, r=reduction: fastlm.mse_loss(*t, reduction=r), (x, target))
    loss = fastlm.mse_loss(x.pow(3), target).square()
    for _ in range(3):
        (loss,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    expected = F.mse_loss(x.pow(3), target).square()
    for _ in range(3):
        (expected,) = torch.autograd.grad(expected.sum(), x, create_graph=True)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, target = (numbers((5, 7), torch.float32, seed).requires_grad_() for seed in (0, 1))
    torch.library.opcheck(overload("mse_loss", backend), (x, target))
    torch.library.opcheck(overload("mse_loss_backward", backend), (torch.tensor(0.3), x, target))


def test_weight_broadcasting_and_older_names():
    x, target, weight = (numbers((3, 4), seed=seed) for seed in range(3))
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            fastlm.mse_loss(x, target, reduction=reduction, weight=weight.abs()),
            F.mse_loss(x, target, reduction=reduction, weight=weight.abs()),
        )
    assert torch.equal(fastlm.mse_loss(x, target, reduction="none"), F.mse_loss(x, target, reduction="none"))
    with pytest.warns(UserWarning, match=r"input \(3, 4\) and target \(4,\) are broadcast"):
        ours = fastlm.mse_loss(x, target[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours, F.mse_loss(x, target[0]))
        torch.testing.assert_close(fastlm.mse_loss(x, target, False), F.mse_loss(x, target, reduction="sum"))
    assert fastlm.mse_loss(x, target.double()).dtype == torch.float64


def test_sixteen_bits_are_summed_in_more():
    ones = torch.ones(1 << 20, dtype=torch.bfloat16)
    assert fastlm.mse_loss(ones, ones * 0, reduction="sum") == 1 << 20
    assert fastlm.mse_loss(ones.half(), ones.half() * 0) == 1


def test_transforms_compile_and_autocast():
    x, target = numbers((4, 6), torch.float64), numbers((4, 6), torch.float64, 1)
    torch.testing.assert_close(grad(fastlm.mse_loss)(x, target), grad(F.mse_loss)(x, target))
    torch.testing.assert_close(vmap(grad(fastlm.mse_loss))(x, target), vmap(grad(F.mse_loss))(x, target))
    tangents = jvp(fastlm.mse_loss, (x, target), (target, x))[1], jvp(F.mse_loss, (x, target), (target, x))[1]
    torch.testing.assert_close(*tangents)
    torch._dynamo.reset()
    compiled = torch.compile(fastlm.mse_loss, fullgraph=True)
    leaves = [x.float().requires_grad_(), target.float()]
    (dx,) = torch.autograd.grad(compiled(*leaves), leaves[0])
    torch.testing.assert_close(dx, torch.autograd.grad(F.mse_loss(*leaves), leaves[0])[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastlm.mse_loss(leaves[0].bfloat16(), leaves[1]).dtype == torch.float32


@pytest.mark.parametrize(
    "args, error, words",
    [
        (([1.0], torch.ones(1)), TypeError, "input must be a tensor, got list"),
        ((torch.ones(2), torch.ones(2).long()), TypeError, "target must be floating point, got torch.int64"),
        ((torch.ones(2), torch.ones(3)), ValueError, "shapes must broadcast, got input (2,) and target (3,)"),
        ((torch.ones(2), torch.ones(2), None, None, "all"), ValueError,
         "reduction must be one of mean, sum, none, got 'all'"),
        ((torch.ones(2), torch.ones(2), None, None, "mean", torch.ones(1)), ValueError,
         "weight must be of input's shape, (2,), got (1,)"),
        ((torch.ones(2), torch.ones(2, device="meta")), ValueError,
         "target must be on the device of input, cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_input(args, error, words):
    with pytest.raises(error) as raised:
        fastlm.mse_loss(*args)
    assert str(raised.value) == f"fastlm.mse_loss: {words}"


def test_backends_takes_the_public_arguments():
    assert fastlm.backends("mse_loss", input=torch.ones(2), target=torch.ones(2))[-1].backend == "reference"
