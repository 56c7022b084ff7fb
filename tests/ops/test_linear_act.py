"""linear_act: every test on every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import ACTS, BACKENDS, DTYPES, ISAS, LAYOUTS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import fastlm
from fastlm import _native

FEW = ["none", "relu", "gelu"]  # of what takes seconds each: saves nothing, the output, the product
# (M, K, N)
SHAPES = [(1, 1, 1), (3, 5, 7), (63, 65, 64), (17, 1, 300), (260, 40, 33), (300, 200, 270)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0)]


def operands(M, K, N, dtype=torch.float32, bias=True):
    x, weight = numbers((M, K), torch.float64), numbers((N, K), torch.float64, seed=1) / max(K, 1) ** 0.5
    made = [x, weight, numbers((N,), torch.float64, seed=2)]
    return [t.to(dtype) for t in made[: 3 if bias else 2]]


def stock(act, x, weight, bias=None):
    return ACTS[act](F.linear(x, weight, bias))


def ours(act, x, weight, bias=None):
    return fastlm.linear_act(x, weight, bias, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient(act, dtype, backend, poisoned):  # noqa: F811
    for shape in SHAPES + EMPTY:
        for bias in (True, False):
            given, dy = operands(*shape, dtype, bias), numbers((shape[0], shape[2]), dtype, seed=3)
            results = []
            for f, of in ((ours, dtype), (stock, torch.float64), (stock, dtype)):
                leaves = [t.to(of, copy=True).requires_grad_() for t in given]
                y = f(act, *leaves)
                y.backward(dy.to(of))
                results.append([y.detach(), *(t.grad for t in leaves)])
            for what, *values in zip(("y", "dx", "dweight", "dbias"), *results, strict=False):
                assert_as_exact_as_torch(*values, 2 if what == "y" else 3, f"{what} of {act} at {shape}")


@pytest.mark.parametrize("act", FEW)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(act, layout, backend, poisoned):  # noqa: F811
    for sizes in ((3, 5, 35), (35,)):
        results = []
        for f in (ours, stock):
            x, weight = (LAYOUTS[layout](t).requires_grad_() for t in (numbers(sizes), numbers((9, 35), seed=1)))
            y = f(act, x, weight)
            y.sum().backward()  # an expanded gradient
            results.append((y.detach(), x.grad, weight.grad))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", ["native-baseline", "reference"] if ISAS else ["reference"])
@pytest.mark.parametrize("act", ACTS)
def test_gradients_of_every_order(act, backend):
    given = [t.requires_grad_() for t in operands(3, 4, 5, torch.float64)]
    for t in given:  # away from relu's corner
        t.data += 0.05 * t.data.sign()
    assert gradcheck(lambda *a: ours(act, *a), given, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda *a: ours(act, *a), given)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_wanted(act, backend):
    for which in range(3):
        results = []
        for f in (ours, stock):
            given = operands(6, 9, 5)
            given[which].requires_grad_()
            f(act, *given).square().sum().backward()
            results.append(given[which].grad)
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("act", FEW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_by_itself(act, backend):
    """Its second output, the product, has a gradient too; and it may be left out although one is asked for."""
    op = overload("linear_act", backend)
    want = [t.requires_grad_() for t in operands(6, 9, 5)]
    u = F.linear(*want)
    expected = torch.autograd.grad((ACTS[act](u) * u).sum() if act == "gelu" else ACTS[act](u).sum(), want)
    given = [t.requires_grad_() for t in operands(6, 9, 5)]
    y, u = op(*given, act, True)
    assert u.numel() == (y.numel() if act == "gelu" else 0)
    total = (y * u).sum() if act == "gelu" else y.sum()
    torch.testing.assert_close(torch.autograd.grad(total, given), expected)
    y, u = op(*given, act, False)
    assert u.numel() == 0
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), given), torch.autograd.grad(ACTS[act](F.linear(*want)).sum(), want)
    )


@pytest.mark.parametrize("act", FEW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(act, backend):
    x, weight, bias = operands(3, 4, 5)
    f, g = (lambda t, h=h: h(act, t, weight, bias).pow(2).sum() for h in (ours, stock))
    for transform in (
        grad, hessian, lambda f: vmap(grad(f)), lambda f: grad(lambda t: vmap(f)(t).sum()),
        lambda f: lambda t: jvp(f, (t,), (t.flip(0),))[1],
    ):  # fmt: skip
        torch.testing.assert_close(transform(f)(x), transform(g)(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("act", FEW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(act, backend):
    given = [t.requires_grad_() for t in operands(3, 4, 5)]
    torch.library.opcheck(overload("linear_act", backend), (*given, act, True))
    dy = numbers((3, 5), seed=3).requires_grad_()
    args = (dy, *given[:2], numbers((3, 5), seed=4), act, [True, False, True])
    torch.library.opcheck(overload("linear_act_backward", backend), args)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("choice", ["auto", *(["native"] if ISAS else []), "reference"])
def test_compile(act, choice):
    torch._dynamo.reset()
    with fastlm.use_backend(choice):
        compiled = torch.compile(lambda *a: ours(act, *a).sin(), fullgraph=True)
        for rows in (3, 5):
            given, want = ([t.requires_grad_() for t in operands(rows, 16, 8)] for _ in range(2))
            out, expected = compiled(*given), stock(act, *want).sin()
            out.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close([out, *(t.grad for t in given)], [expected, *(t.grad for t in want)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16):
        given, want = ([t.requires_grad_() for t in operands(6, 9, 5)] for _ in range(2))
        y, expected = ours("gelu", *given), stock("gelu", *want)
        assert y.dtype == expected.dtype == torch.bfloat16
    y.float().sum().backward()
    expected.float().sum().backward()
    for a, b in zip((y, *(t.grad for t in given)), (expected, *(t.grad for t in want)), strict=True):
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend):
    results = []
    for f in (ours, stock):
        x, weight = (t.requires_grad_() for t in operands(5, 70, 6, bias=False))
        x.data[1, 3], x.data[2, 66], x.data[3] = float("nan"), float("inf"), 0.0
        y = f("relu", x, weight)
        y.sum().backward()
        results.append((y.detach(), x.grad, weight.grad))
    torch.testing.assert_close(*results, equal_nan=True, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_matmul(isa, dtype):
    """Our own products, which linear_act takes for some shapes and machines only, in every direction of the factors."""
    before = _native.cpu.active_isa()
    try:
        _native.cpu.select_isa(isa)
        for M, K, N in [*SHAPES, (0, 3, 4), (3, 0, 4), (130, 700, 515), (513, 31, 257)]:
            a, b = numbers((M, K), dtype), numbers((K, N), dtype, seed=1)
            exact, plain = a.double() @ b.double(), a.float() @ b.float()
            for turned in range(4):
                first = a.t().contiguous().t() if turned & 1 else a
                second = b.t().contiguous().t() if turned & 2 else b
                found = []
                for threads in (1, 2, 7):
                    c = torch.full((M, N), float("nan"))
                    _native.cpu.matmul(first, second, c, False, threads)
                    _native.cpu.matmul(first, second, c, True, threads)
                    found.append(c / 2)
                assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
                assert_as_exact_as_torch(found[0], exact, plain, 3, f"{(M, K, N)}, turned {turned}")
        with pytest.raises(ValueError, match="matmul: b must be float32"):
            _native.cpu.matmul(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), False, 1)
        with pytest.raises(ValueError, match="matmul: a must be contiguous along one dimension"):
            _native.cpu.matmul(torch.ones(4, 6)[::2, ::2], torch.ones(3, 3), torch.ones(2, 3), False, 1)
        with pytest.raises(ValueError, match="matmul: c must be contiguous float32"):
            _native.cpu.matmul(torch.ones(2, 3), torch.ones(3, 3), torch.ones(2, 4), False, 1)
    finally:
        _native.cpu.select_isa(before)


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
def test_products_of_onednn(monkeypatch):
    """Which linear_act takes where there is AVX-512 alone, though they run anywhere."""
    from fastlm.kernels.native import products

    assert products._onednn()
    monkeypatch.setattr(products, "_wide", lambda x: x.dtype == torch.float32)
    with fastlm.use_backend("native"):
        for act in ACTS:
            test_value_and_gradient(act, torch.float32, "native", None)
        test_special_values("native")


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.parametrize("slow", [False, True])
def test_products_in_16_bits(monkeypatch, slow):
    """With the CPU's instructions for a dtype and by conversion, whichever this machine needs; in parts of few rows."""
    from fastlm.kernels.native import products

    monkeypatch.setattr(products, "torch_multiplies", lambda dtype: not slow)
    monkeypatch.setattr(products, "_CONVERTED_ROWS", 3)
    with fastlm.use_backend("native"):
        for act in ACTS:
            for dtype in (torch.bfloat16, torch.float16):
                test_value_and_gradient(act, dtype, "native", None)
        test_special_values("native")


def test_small_layers_are_left_to_torch(monkeypatch):
    from fastlm import _library
    from fastlm.ops import linear_act

    monkeypatch.setattr(_library, "_small_calls_to_torch", True)

    x, weight = numbers((2, 8)).requires_grad_(), numbers((4, 8), seed=1)
    named = lambda y: type(y.grad_fn).__name__  # noqa: E731
    with fastlm.use_backend("reference"):
        assert "linear_act" in named(fastlm.linear_act(x, weight))
    with fastlm.use_backend("auto"):
        assert named(fastlm.linear_act(x, weight)) == "ReluBackward0"
        monkeypatch.setattr(linear_act, "_SMALL", _library.small(64, 1 << 27))
        assert "linear_act" in named(fastlm.linear_act(x, weight))
        with torch.autocast("cpu", torch.bfloat16):
            assert named(fastlm.linear_act(x, weight)) == "ReluBackward0"
            monkeypatch.setattr(linear_act, "_SMALL", _library.small(64, 64))
            assert "linear_act" in named(fastlm.linear_act(x, weight))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.ones(())}, ValueError, r"x must be \(..., K\)"),
        ({"x": torch.ones(3, 5)}, ValueError, r"x must be \(..., K\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \(N, K\)"),
        ({"weight": torch.ones(5, 4).double()}, TypeError, "weight must have the dtype of x"),
        ({"weight": torch.ones(5, 4, device="meta")}, ValueError, "weight must be on the device of x"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \(N,\)"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        ({"act": "swish"}, ValueError, "act must be one of none, relu"),
    ],
)
def test_bad_input(wrong, error, message):
    with pytest.raises(error, match=f"fastlm.linear_act: {message}"):
        fastlm.linear_act(**{"x": torch.ones(3, 4), "weight": torch.ones(5, 4), **wrong})


@pytest.mark.parametrize("layout", ["every second", "expanded", "rows apart", "turned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_in_any_layout(backend, dtype, layout):
    """oneDNN was found to take a strided bias for a contiguous one."""
    lay = {
        "every second": lambda t: torch.stack([t, t + 1], -1)[..., 0],
        "expanded": lambda t: t[..., :1].expand(t.shape),
        "rows apart": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
        "turned": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    }[layout]
    for M, N, K in ((5, 7, 3), (70, 130, 65)):
        operands = [numbers(s, dtype, i) for i, s in enumerate(((M, K), (N, K), (N,)))]
        for which in range(3):
            laid = [lay(t) if i == which else t for i, t in enumerate(operands)]
            target = torch.arange(M, device=operands[0].device) % N
            for call in (
                lambda x, w, b: fastlm.linear_act(x, w, b, "gelu"),
                lambda x, w, b, target=target: fastlm.linear_cross_entropy(x, w, target, b),
            ):
                strided, dense = call(*laid), call(*(t.contiguous() for t in laid))
                torch.testing.assert_close(strided, dense, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 0.02)
