"""layer_norm and rms_norm, with and without a residual, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import BACKENDS, DTYPES, ISAS, LAYOUTS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import fastlm

KINDS = ["layer_norm", "rms_norm"]
SHAPES = [(0, 5), (1,), (3, 1), (2, 3, 63), (5, 64), (7, 65), (4, 768), (1300, 33), (2, 9001)]


def parameters(kind, n, dtype=torch.float32):
    weight, bias = 1 + 0.3 * numbers((n,), torch.float64, 11), numbers((n,), torch.float64, 12)
    return [weight.to(dtype), bias.to(dtype)][: 2 if kind == "layer_norm" else 1]


def stock(kind, x, extras, residual=None):
    s = x if residual is None else x + residual
    y = getattr(F, kind)(s, x.shape[-1:], *extras, eps=1e-5)
    return y if residual is None else (y, s)


def ours(kind, x, extras, residual=None):
    return getattr(fastlm, kind)(x, x.shape[-1:], *extras, eps=1e-5, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient(kind, added, dtype, backend, poisoned):  # noqa: F811
    for shape in SHAPES:
        x, dy, r, ds = (numbers(shape, dtype, seed) + (3 if seed == 0 else 0) for seed in range(4))
        results = []
        for f, of in ((ours, dtype), (stock, torch.float64), (stock, dtype)):
            leaves = [t.to(of, copy=True).requires_grad_() for t in (x, *([r] if added else []))]
            extras = [t.to(dtype).to(of, copy=True).requires_grad_() for t in parameters(kind, shape[-1])]
            out = f(kind, leaves[0], extras, *leaves[1:])
            if added:
                (out[0] * dy.to(of)).sum().add((out[1] * ds.to(of)).sum()).backward()
            else:
                out.backward(dy.to(of))
            values = list(out) if added else [out]
            results.append([*(t.detach() for t in values), *(t.grad for t in (*leaves, *extras))])
        for i, values in enumerate(zip(*results, strict=True)):
            assert_as_exact_as_torch(*values, 3, f"result {i} of {kind} at {shape}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_beside_bfloat16(kind, backend):
    x = numbers((6, 40), torch.bfloat16).requires_grad_()
    extras = [t.requires_grad_() for t in parameters(kind, 40)]
    y = ours(kind, x, extras)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and all(t.grad.dtype == torch.float32 for t in extras)
    exact = stock(kind, x.detach().double(), [t.detach().double() for t in extras])
    torch.testing.assert_close(y.detach().double(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(kind, layout, backend, poisoned):  # noqa: F811
    x = LAYOUTS[layout](numbers((4, 5, 35)))
    extras = parameters(kind, 35)
    results = []
    for f in (ours, stock):
        leaf = x.detach().requires_grad_()
        y = f(kind, leaf, extras)
        y.sum().backward()  # an expanded gradient
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["native-baseline", "reference"] if ISAS else ["reference"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_order(kind, added, backend):
    x, r = (numbers((3, 4), torch.float64, i).requires_grad_() for i in range(2))
    extras = [t.requires_grad_() for t in parameters(kind, 4, torch.float64)]

    def f(x, r, *extras):
        return ours(kind, x, extras, r if added else None)

    assert gradcheck(f, (x, r, *extras), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x, r, *extras))
    assert gradcheck(lambda x: ours(kind, x, ()), (x,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_wanted(kind, backend):
    """Gradients of some arguments alone, and of one output alone."""
    x, r = numbers((6, 9)), numbers((6, 9), seed=1)
    for which in range(len(parameters(kind, 9))):
        extras = parameters(kind, 9)
        extras[which].requires_grad_()
        want = parameters(kind, 9)
        want[which].requires_grad_()
        ours(kind, x, extras).square().sum().backward()
        stock(kind, x, want).square().sum().backward()
        torch.testing.assert_close(extras[which].grad, want[which].grad)
    x.requires_grad_()
    _, s = ours(kind, x, parameters(kind, 9), r)
    (dx,) = torch.autograd.grad(s.sum(), x)
    torch.testing.assert_close(dx, torch.ones_like(dx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(kind, backend):
    x = numbers((5, 70))
    x[1, 3], x[2, 66], x[3] = float("nan"), float("inf"), 0.0
    results = []
    for f in (ours, stock):
        leaf = x.clone().requires_grad_()
        y = f(kind, leaf, parameters(kind, 70))
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results, equal_nan=True, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(kind, backend):
    x, extras = numbers((3, 4)), parameters(kind, 4)
    f, g = (lambda t, h=h: h(kind, t, extras).pow(2).sum() for h in (ours, stock))
    for transform in (
        grad, hessian, lambda f: vmap(grad(f)), lambda f: grad(lambda t: vmap(f)(t).sum()),
        lambda f: lambda t: jvp(f, (t,), (t.flip(0),))[1],
    ):  # fmt: skip
        torch.testing.assert_close(transform(f)(x), transform(g)(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(kind, added, backend):
    x, r, dy = (numbers((3, 4), seed=i).requires_grad_() for i in range(3))
    extras = [t.requires_grad_() for t in parameters(kind, 4)]
    name = f"add_{kind}" if added else kind
    torch.library.opcheck(overload(name, backend), (x, *([r] if added else []), *extras, 1e-5))
    args = (dy, r if added else None, x, extras[0], 1e-5, kind == "layer_norm", [True, kind == "layer_norm"])
    torch.library.opcheck(overload("norm_backward", backend), args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_compile(kind, choice):
    torch._dynamo.reset()
    with fastlm.use_backend(choice):
        compiled = torch.compile(lambda x, r, w: sum(ours(kind, x * 2, w, r)).sin(), fullgraph=True)
        for rows in (3, 5):
            a, b = (numbers((rows, 16)).requires_grad_() for _ in range(2))
            r, extras = numbers((rows, 16), seed=1), parameters(kind, 16)
            out, want = compiled(a, r, extras), sum(stock(kind, b * 2, extras, r)).sin()
            out.sum().backward()
            want.sum().backward()
            torch.testing.assert_close((out, a.grad), (want, b.grad), atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bits_do_not_depend_on_threads(threads):
    x, r, dy = (numbers((1300, 77), seed=i) for i in range(3))
    extras = parameters("layer_norm", 77)
    results, before = [], torch.get_num_threads()
    try:
        for n in (threads, 1):
            torch.set_num_threads(n)
            leaves = [t.clone().requires_grad_() for t in (x, *extras)]
            y, s = ours("layer_norm", leaves[0], leaves[1:], r)
            results.append((y, s, *torch.autograd.grad(y, leaves, dy)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_residual_of_another_dtype_is_added_as_torch_adds_it():
    x, r = numbers((3, 8), torch.bfloat16), numbers((3, 8), seed=1)
    y, s = fastlm.layer_norm(x, 8, residual=r)
    assert y.dtype == s.dtype == torch.float32
    torch.testing.assert_close((y, s), (F.layer_norm(x + r, (8,)), x + r))


def test_several_dimensions():
    x, r = numbers((3, 4, 5)), numbers((3, 4, 5), seed=1)
    w, b = numbers((4, 5), seed=2), numbers((4, 5), seed=3)
    torch.testing.assert_close(fastlm.layer_norm(x, (4, 5), w, b), F.layer_norm(x, (4, 5), w, b))
    torch.testing.assert_close(fastlm.rms_norm(x, [4, 5], w), F.rms_norm(x, [4, 5], w))
    torch.testing.assert_close(fastlm.layer_norm(x, (4, 5), w, residual=r)[0], F.layer_norm(x + r, (4, 5), w))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tiny = numbers((3, 5), dtype) * 1e-3
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # torch's own too, for a few versions
        torch.testing.assert_close(fastlm.rms_norm(tiny, 5), F.rms_norm(tiny, (5,), eps=eps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"normalized_shape": 3}, ValueError, "normalized_shape must be the last sizes of x"),
        ({"normalized_shape": ()}, ValueError, "normalized_shape must be the last sizes of x"),
        ({"weight": torch.ones(3)}, ValueError, "weight must be of normalized_shape"),
        ({"weight": torch.ones(4).double()}, TypeError, "weight must be float32 or of the dtype of x"),
        ({"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
        ({"residual": torch.ones(4)}, ValueError, "residual must be of x's shape"),
        ({"residual": torch.ones(3, 4, device="meta")}, ValueError, "residual must be on the device of x"),
        ({"eps": torch.ones(())}, TypeError, "eps must be a number, got Tensor"),
    ],
)
def test_bad_input(kind, wrong, error, message):
    with pytest.raises(error, match=f"fastlm.{kind}: {message}"):
        getattr(fastlm, kind)(**{"x": torch.ones(3, 4), "normalized_shape": 4, **wrong})
