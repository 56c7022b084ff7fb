"""linear_cross_entropy: every test on every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import BACKENDS, DTYPES, ISAS, LAYOUTS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

import fastlm

# (R, D, C): fewer rows than are taken at a time, several times as many, one, none
SHAPES = [(7, 5, 11), (300, 40, 65), (1700, 9, 33), (1, 1, 1), (0, 4, 3)]
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"z_loss": 1e-2, "softcap": 3.0},
    {"ignore_index": 1, "z_loss": 1e-2},
]


def operands(R, D, C, dtype=torch.float32, bias=True):
    x, weight, b = numbers((R, D), torch.float64), numbers((C, D), torch.float64, 1), numbers((C,), torch.float64, 2)
    return [t.to(dtype) for t in ([x, weight / D**0.5, b] if bias else [x, weight / D**0.5])]


def targets(R, C):
    return torch.randint(C, (R,), generator=torch.Generator("cpu").manual_seed(5), device="cpu").to(
        torch.get_default_device()
    )


def ours(target, options, x, weight, bias=None):
    return fastlm.linear_cross_entropy(x, weight, target, bias, **options)


def stock(target, options, x, weight, bias=None):
    options = dict(options)
    z_loss, softcap = options.pop("z_loss", 0), options.pop("softcap", None)
    logits = F.linear(x, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, **options)
    if z_loss:
        counts = target != options.get("ignore_index", -100)
        more = z_loss * (torch.logsumexp(logits, 1).square() * counts).sum()
        loss = loss + (more if options.get("reduction") == "sum" else more / counts.sum())
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient(options, dtype, backend, poisoned):  # noqa: F811
    for shape in SHAPES:
        if shape[0] == 0 and options.get("reduction") != "sum":
            continue
        target = targets(shape[0], shape[2])
        if options.get("ignore_index") == 1 and shape[2] == 1:
            continue
        for bias in (True, False):
            results = []
            for f, of in ((ours, dtype), (stock, torch.float64), (stock, dtype)):
                leaves = [t.to(of, copy=True).requires_grad_() for t in operands(*shape, dtype, bias)]
                loss = f(target, options, *leaves)
                (loss * 3).backward()
                results.append([loss.detach(), *(t.grad for t in leaves)])
            for what, *values in zip(("loss", "dx", "dweight", "dbias"), *results, strict=False):
                assert_as_exact_as_torch(*values, 3, f"{what} at {shape}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_reductions(reduction, backend):
    target = targets(12, 9).view(3, 4)
    results = []
    for f in (fastlm.linear_cross_entropy, None):
        x, weight, bias = (t.requires_grad_() for t in operands(12, 6, 9))
        x3 = x.view(3, 4, 6)
        if f is None:
            out = F.cross_entropy(F.linear(x, weight, bias), target.flatten(), reduction=reduction)
            out = out.view(3, 4) if reduction == "none" else out
        else:
            out = f(x3, weight, target, bias, reduction=reduction)
        out.sum().backward()
        results.append((out.detach(), x.grad, weight.grad, bias.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_class_weights_and_probabilities(reduction, probabilities, choice):
    x, weight, bias = (numbers(shape, torch.float64, seed) for seed, shape in enumerate(((2, 3, 6), (9, 6), (9,))))
    target = (
        numbers((2, 3, 9), torch.float64, 3).softmax(-1) if probabilities else torch.tensor([[0, 8, -100], [4, 4, 1]])
    )
    options = {"reduction": reduction, "label_smoothing": 0.1}
    class_weight = numbers((9,), torch.float64, 4).abs()

    def gradients(call):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        loss = call(*leaves)
        return loss.detach(), torch.autograd.grad(loss.square().sum(), leaves)

    def stock(x, weight, bias):
        rows = target.flatten(0, 1) if probabilities else target.flatten()
        losses = F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), rows, class_weight, **options)
        return losses.view(2, 3) if reduction == "none" else losses

    def ours(x, weight, bias):
        return fastlm.linear_cross_entropy(x, weight, target, bias, class_weight=class_weight, **options)

    with fastlm.use_backend(choice):
        torch.testing.assert_close(gradients(ours), gradients(stock))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_and_with_some(backend):
    target = targets(400, 33)
    x, weight, bias = operands(400, 8, 33)
    want = stock(target, {}, x, weight, bias)
    with torch.no_grad():
        torch.testing.assert_close(ours(target, {}, x, weight, bias), want)
    for which in range(3):
        results = []
        for f in (ours, stock):
            given = operands(400, 8, 33)
            given[which].requires_grad_()
            f(target, {}, *given).backward()
            results.append(given[which].grad)
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows(backend):
    """They may hold anything, even where all of them are."""
    target = targets(300, 9)
    target[::2] = -100
    results = []
    for f in (ours, stock):
        x, weight = (t.requires_grad_() for t in operands(300, 6, 9, bias=False))
        f(target, {"reduction": "sum"}, x, weight).backward()
        results.append((x.grad, weight.grad))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert ours(torch.full_like(target, -100), {}, x, weight).isnan()
    assert ours(torch.full_like(target, -100), {"reduction": "sum"}, x, weight) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(layout, backend, poisoned):  # noqa: F811
    target, results = targets(15, 9).view(3, 5), []
    for f in (ours, lambda t, o, x, w: stock(t.flatten(), o, x.flatten(0, 1), w)):
        x, weight = (LAYOUTS[layout](t).requires_grad_() for t in (numbers((3, 5, 35)), numbers((9, 35), seed=1)))
        loss = f(target, {}, x, weight)
        loss.backward()
        results.append((loss.detach(), x.grad, weight.grad))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["native-baseline", "reference"] if ISAS else ["reference"])
def test_gradients_of_every_order(options, backend):
    target = targets(5, 4)
    given = [t.requires_grad_() for t in operands(5, 3, 4, torch.float64)]
    assert gradcheck(lambda *a: ours(target, options, *a), given, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda *a: ours(target, options, *a), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    x, weight = (t.requires_grad_() for t in operands(9, 4, 5, bias=False))
    loss = ours(targets(9, 5), {}, x, weight)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    torch.testing.assert_close(list(torch.autograd.grad(loss, (x, weight))), kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    x, weight, bias = operands(6, 4, 5)
    target = targets(6, 5)
    f, g = (lambda t, h=h: h(target, {}, t, weight, bias) for h in (ours, stock))
    torch.testing.assert_close(grad(f)(x), grad(g)(x))
    many = torch.stack([x, x.flip(0)])
    torch.testing.assert_close(vmap(grad(f))(many), vmap(grad(g))(many))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    given = [t.requires_grad_() for t in operands(6, 4, 5)]
    args = (*given, targets(6, 5), -100, 0.1, 1e-2, 0.0, True, [True, True, True])
    torch.library.opcheck(overload("linear_cross_entropy", backend), args)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_compile(choice):
    torch._dynamo.reset()
    with fastlm.use_backend(choice):
        compiled = torch.compile(lambda t, *a: ours(t, {}, *a).sin(), fullgraph=True)
        for rows in (3, 5):
            given, want = ([t.requires_grad_() for t in operands(rows, 16, 8)] for _ in range(2))
            target = targets(rows, 8)
            out, expected = compiled(target, *given), stock(target, {}, *want).sin()
            out.backward()
            expected.backward()
            torch.testing.assert_close([out, *(t.grad for t in given)], [expected, *(t.grad for t in want)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    device, target = torch.get_default_device().type, targets(60, 5)
    with torch.autocast(device, torch.bfloat16):
        given, want = ([t.requires_grad_() for t in operands(60, 9, 5)] for _ in range(2))
        loss, expected = ours(target, {}, *given), stock(target, {}, *want)
        assert loss.dtype == expected.dtype == torch.float32
    loss.backward()
    expected.backward()
    for a, b in zip((loss, *(t.grad for t in given)), (expected, *(t.grad for t in want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_with_a_loss_scale(backend):
    """A row's share of many rows is below float16's normal numbers, the scale above its largest."""
    x, weight = (numbers(size, torch.float16, i) / 8 for i, size in enumerate(((4096, 8), (512, 8))))
    target = torch.arange(4096, device=x.device) % 512
    given, exact = ([t.to(dtype).requires_grad_() for t in (x, weight)] for dtype in (torch.float32, torch.float64))
    with torch.autocast(x.device.type, torch.float16):
        loss = fastlm.linear_cross_entropy(*given, target)
    got = torch.autograd.grad(loss * 2.0**17, given)
    want = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target) * 2.0**17, exact)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 2e-3 * b.norm()


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
def test_threads_change_no_more_than_the_rounding():
    results, before = [], torch.get_num_threads()
    target = targets(700, 300)
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            x, weight = (t.requires_grad_() for t in operands(700, 80, 300, bias=False))
            loss = ours(target, {}, x, weight)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, weight))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:  # the products are those of torch's libraries
        torch.testing.assert_close(results[0], other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.ones(3, 5)}, ValueError, r"x must be \(..., D\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \(C, D\)"),
        ({"weight": torch.ones(5, 4).double()}, TypeError, "weight must have the dtype of x"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \(C,\)"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target must be \(3,\)"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, TypeError, "target must be int64 classes, or probabilities"),
        ({"target": torch.zeros(3)}, ValueError, r"target must be \(3, 5\)"),
        ({"class_weight": torch.zeros(3)}, ValueError, r"class_weight must be \(C,\) = \(5,\), got \(3,\)"),
        ({"class_weight": torch.zeros(5, dtype=torch.int64)}, TypeError, "class_weight must be floating point"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "target must be on the device of x"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
        ({"softcap": -1.0}, ValueError, "softcap must be from 1e-30"),
    ],
)
def test_bad_input(wrong, error, message):
    given = {"x": torch.ones(3, 4), "weight": torch.ones(5, 4), "target": torch.zeros(3, dtype=torch.int64), **wrong}
    with pytest.raises(error, match=f"fastlm.linear_cross_entropy: {message}"):
        fastlm.linear_cross_entropy(**given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_no_class(backend):
    with pytest.raises(IndexError, match="target must be a class, 0 to 4"):
        ours(torch.tensor([0, 5, 1]), {}, *operands(3, 4, 5))
