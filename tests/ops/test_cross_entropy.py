"""cross_entropy against torch's, every argument, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import BACKENDS, DTYPES, ISAS, LAYOUTS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import fastlm

SHAPES = [(0, 5), (1, 1), (3, 2), (5, 63), (7, 65), (4, 2048), (3, 2049), (2, 50304)]


def classes(rows, C, ignored=-100):
    target = torch.randint(0, C, (rows,), generator=torch.Generator("cpu").manual_seed(3), device="cpu")
    if ignored is not None and rows > 2:
        target[1] = ignored
    return target.to(torch.get_default_device())


def plain(x, target, z_loss=0.0, softcap=None, **options):
    """What the two further options mean, in torch."""
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    reduction = options.pop("reduction", "mean")
    loss = F.cross_entropy(z, target, reduction="none", **options)
    counts = target != options.get("ignore_index", -100)
    loss = loss + torch.where(counts, z_loss * z.logsumexp(1).square(), 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counts.sum()}[reduction]


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "all smooth": {"label_smoothing": 1.0},
    "ignore": {"ignore_index": 0},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0, "reduction": "sum"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient(name, dtype, backend, poisoned):  # noqa: F811
    for rows, C in SHAPES:
        if rows == 0 and OPTIONS[name].get("reduction", "mean") == "mean":
            continue
        x, target = 3 * numbers((rows, C), dtype), classes(rows, C, OPTIONS[name].get("ignore_index", -100))
        results = []
        for f, of in ((fastlm.cross_entropy, dtype), (plain, torch.float64), (plain, dtype)):
            leaf = x.to(of, copy=True).requires_grad_()
            loss = f(leaf, target, **OPTIONS[name])
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
        for what, values in zip(("loss", "dx"), zip(*results, strict=True), strict=True):
            assert_as_exact_as_torch(*values, 3, f"{what} at {(rows, C)}")


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 2}, {"reduction": "sum"}], ids=str)
def test_shapes_weights_and_probabilities_are_torchs(options):
    weight = 0.5 + torch.rand(5, dtype=torch.float64)
    for shape in ((5,), (4, 5), (4, 5, 3), (2, 5, 3, 2)):
        x = numbers(shape, torch.float64).requires_grad_()
        target = torch.randint(0, 5, (shape[:1] + shape[2:]) if len(shape) > 1 else ())
        for t in (target, numbers(shape, torch.float64, 1).softmax(0 if len(shape) == 1 else 1).requires_grad_()):
            if t.is_floating_point() and "ignore_index" in options:
                continue
            for w in (None, weight):
                losses = [f(x, t, w, **options) for f in (fastlm.cross_entropy, F.cross_entropy)]
                torch.testing.assert_close(*losses, equal_nan=True)
                inputs = [x, t] if t.requires_grad else [x]
                torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses), equal_nan=True)
    x, t = numbers((4, 5)), classes(4, 5)
    for old in ({"reduce": False}, {"size_average": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            torch.testing.assert_close(fastlm.cross_entropy(x, t, **old), F.cross_entropy(x, t, **old))


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend):
    x = numbers((6, 40))
    x[0, 3], x[1, 2], x[2, :39], x[3], x[4, 5] = float("nan"), float("inf"), -float("inf"), -float("inf"), 1e30
    target = torch.tensor([0, 1, 39, 4, 5, 6])
    results = []
    for f in (fastlm.cross_entropy, F.cross_entropy):
        leaf = x.clone().requires_grad_()
        loss = f(leaf, target, reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, equal_nan=True)
    far, target = numbers((3, 3000)), torch.tensor([2600, 0, 0])
    far[0, :2500], far[1, 2048:], far[2, 100:2900] = (-float("inf"),) * 3  # whole blocks, before and after
    torch.testing.assert_close(fastlm.cross_entropy(far, target), F.cross_entropy(far, target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_may_hold_anything(backend):
    x = numbers((3, 70)).requires_grad_()
    bad = x.detach().clone()
    bad[1] = float("nan")
    bad.requires_grad_()
    target = torch.tensor([5, -100, 6])
    for options in ({}, {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 3.0}):
        good, got = (fastlm.cross_entropy(t, target, **options) for t in (x, bad))
        torch.testing.assert_close(got, good)
        torch.testing.assert_close(torch.autograd.grad(got, bad), torch.autograd.grad(good, x))
    assert fastlm.cross_entropy(x, torch.full((3,), -100)).isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(layout, backend):
    x = LAYOUTS[layout](numbers((6, 35)))
    before, target = x.clone(), classes(6, 35)
    results = []
    for f in (fastlm.cross_entropy, F.cross_entropy):
        leaf = x.detach().requires_grad_()
        loss = f(leaf, torch.stack([target, target], -1)[:, 0])
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["native-baseline", "reference"] if ISAS else ["reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_every_order(name, backend):
    x = numbers((4, 5), torch.float64).requires_grad_()
    target = classes(4, 5, OPTIONS[name].get("ignore_index", -100))

    def f(x):
        return fastlm.cross_entropy(x, target, **OPTIONS[name])

    assert gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    x, target = numbers((3, 7)), classes(3, 7, None)
    for f, g in [(fastlm.cross_entropy, F.cross_entropy)]:
        torch.testing.assert_close(*(grad(h)(x, target) for h in (f, g)))
        torch.testing.assert_close(*(vmap(grad(h))(x, target) for h in (f, g)))
        torch.testing.assert_close(*(jvp(lambda t, h=h: h(t, target), (x,), (x.flip(0),)) for h in (f, g)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, target = numbers((3, 7)).requires_grad_(), classes(3, 7)
    args = (x, target, None, -100, 0.1, 2.0)
    torch.library.opcheck(overload("cross_entropy", backend), args)
    lse = overload("cross_entropy", backend)(*args)[1].detach()
    args = (numbers((3,)), numbers((3,), seed=1), x, target, None, lse, -100, 0.1, 2.0)
    torch.library.opcheck(overload("cross_entropy_backward", backend), args)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_compile(choice):
    torch._dynamo.reset()
    with fastlm.use_backend(choice):
        compiled = torch.compile(lambda x, t: fastlm.cross_entropy(x * 2, t, z_loss=0.1), fullgraph=True)
        for rows in (3, 5):
            a, b = (numbers((rows, 16)).requires_grad_() for _ in range(2))
            out, want = compiled(a, classes(rows, 16)), plain(b * 2, classes(rows, 16), z_loss=0.1)
            out.backward()
            want.backward()
            torch.testing.assert_close((out, a.grad), (want, b.grad))


def test_autocast_gives_float32():
    x, target = numbers((4, 9), torch.bfloat16).requires_grad_(), classes(4, 9)
    assert fastlm.cross_entropy(x, target).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fastlm.cross_entropy(x, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(x.float(), target))
    loss.backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_no_class(backend):
    for wrong in (5, -1, 2**40):
        with pytest.raises(IndexError, match="a target must be a class, 0 to 4"):
            fastlm.cross_entropy(numbers((3, 5)), torch.tensor([0, wrong, 1]))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"input": torch.ones(3, 5, dtype=torch.int64)}, TypeError, "input must be floating point"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, TypeError, "target must be int64 classes, or probabilities"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target must be \(3,\)"),
        ({"target": torch.zeros(3, 4)}, ValueError, r"target must be \(3, 5\)"),
        ({"target": [0, 1, 2]}, TypeError, "target must be a tensor, got list"),
        ({"weight": torch.ones(3)}, ValueError, "weight must be"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"softcap": 0.0}, ValueError, "softcap must be from 1e-30"),
        ({"z_loss": torch.ones(())}, TypeError, "z_loss must be a number, got Tensor"),
    ],
)
def test_bad_input(wrong, error, message):
    with pytest.raises(error, match=f"fastlm.cross_entropy: {message}"):
        fastlm.cross_entropy(**{"input": torch.ones(3, 5), "target": torch.zeros(3, dtype=torch.int64), **wrong})
