"""Activations, alone, after a bias and in gated units: every test on every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import ACTS, BACKENDS, DTYPES, ISAS, LAYOUTS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastlm

OURS = {"gelu_tanh": lambda x: fastlm.gelu(x, "tanh")}
OPS = {act: (OURS.get(act) or getattr(fastlm, act), theirs) for act, theirs in ACTS.items() if act != "none"}
OPS |= {
    f"bias_act {act}": (lambda x, act=act: fastlm.bias_act(x, _bias(x), act), lambda x, f=f: f(x + _bias(x)))
    for act, f in ACTS.items()
}
OPS |= {
    f"glu {act}": (lambda x, act=act: fastlm.glu(x, x.neg(), act), lambda x, f=f: f(x) * x.neg())
    for act, f in ACTS.items()
}
FEW = [name for name in OPS if name.split()[-1] in ("relu", "gelu", "silu", "tanh")]  # of what takes seconds each
SHAPES = [(0,), (1,), (63,), (64,), (65,), (3, 0), (0, 5), (7, 1), (2, 3, 17), (513, 129), (40000, 3)]


def _bias(x):
    return torch.linspace(-1, 1, x.shape[-1], dtype=torch.float64).to(x.dtype)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_value_and_gradient(name, dtype, backend, poisoned):  # noqa: F811
    ours, theirs = OPS[name]
    for shape in SHAPES:
        x, dy = numbers(shape, dtype), numbers(shape, dtype, seed=1)
        results = []
        for f, of in ((ours, dtype), (theirs, torch.float64), (theirs, dtype)):
            leaf = x.to(of, copy=True).requires_grad_()
            y = f(leaf)
            y.backward(dy.to(of))
            results.append((y.detach(), leaf.grad))
        for what, factor, *values in zip(("y", "dx"), (2, 3), *results, strict=True):
            assert_as_exact_as_torch(*values, factor, f"{what} of {name} at {shape}")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bias_gradient_over_many_rows(dtype, backend):
    x, dy = numbers((5000, 37), dtype), numbers((5000, 37), dtype, seed=1)
    results = []
    for f, of in ((fastlm.bias_act, dtype), (lambda x, b: torch.relu(x + b), torch.float64),
                  (lambda x, b: torch.relu(x + b), dtype)):  # fmt: skip
        bias = _bias(x).to(of).requires_grad_()
        f(x.to(of), bias).backward(dy.to(of))
        results.append(bias.grad)
    assert_as_exact_as_torch(*results, 3, "dbias")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout, backend, poisoned):  # noqa: F811
    ours, theirs = OPS[name]
    x, dy = numbers((6, 5, 35)), numbers((6, 5, 35), seed=1)
    before = x.clone()
    for gradient in ("same", "sum", "transposed", "cat"):
        results = []
        for f in (ours, theirs):
            leaf = LAYOUTS[layout](x).detach().requires_grad_()
            y = f(leaf)
            if gradient == "sum":
                y.sum().backward()  # an expanded gradient, of stride 0
            elif gradient == "cat":
                torch.cat([y, y * 2]).sum().backward()
            else:
                y.backward(LAYOUTS["transposed" if gradient == "transposed" else layout](dy))
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(*results, msg=lambda m, g=gradient: f"gradient {g}: {m}")
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", OPS)
def test_special_values(name, backend):
    ours, theirs = OPS[name]
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-25, 1e25, -1e-30] * 5)
    # torch's gelu of inf is NaN in float32, on AVX-512: there its float64 says what is right.
    wide = torch.float64 if name.endswith("gelu") and backend != "reference" else torch.float32
    a, b = x.clone().requires_grad_(), x.to(wide, copy=True).requires_grad_()
    dy = torch.ones(40)
    dy[8:24:3], dy[9:24:3] = float("inf"), float("nan")  # also where x <= 0, which stops them
    ours(a).backward(dy)
    theirs(b).backward(dy.to(wide))
    torch.testing.assert_close(ours(x), theirs(b).float(), equal_nan=True)
    torch.testing.assert_close(a.grad, b.grad.float(), equal_nan=True)


@pytest.mark.parametrize("backend", ["native-baseline", "reference"] if ISAS else ["reference"])
@pytest.mark.parametrize("name", OPS)
def test_gradients_of_every_order(name, backend):
    x = numbers((4, 5), torch.float64).requires_grad_()
    assert gradcheck(OPS[name][0], (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(OPS[name][0], (x,), check_batched_grad=True)
    third = [x]
    for f in OPS[name]:
        g = x
        for _ in range(3):
            (g,) = torch.autograd.grad(f(x).pow(3).sum() if g is x else g.sum(), x, create_graph=True)
        third.append(g)
    torch.testing.assert_close(third[1], third[2])


@pytest.mark.parametrize("act", ACTS)
def test_bias_act_gradients(act):
    x, b = numbers((3, 4), torch.float64).requires_grad_(), numbers((4,), torch.float64, 1).requires_grad_()
    assert gradcheck(fastlm.bias_act, (x, b, act), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(fastlm.bias_act, (x, b, act))
    torch.testing.assert_close(fastlm.bias_act(x, b, act), ACTS[act](x + b))


@pytest.mark.parametrize("act", ACTS)
def test_glu_gradients(act, backend):
    gate, up = numbers((3, 4), torch.float64).requires_grad_(), numbers((3, 4), torch.float64, 1).requires_grad_()
    assert gradcheck(fastlm.glu, (gate, up, act), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(fastlm.glu, (gate, up, act))


def test_glu_reads_halves_in_place(backend):
    """The two halves of one product: rows that lie apart."""
    both = numbers((2, 7, 34)).requires_grad_()
    other = both.detach().clone().requires_grad_()
    gate, up = other.chunk(2, dim=-1)
    dy = numbers((2, 7, 17), seed=1)
    y = fastlm.glu(*both.chunk(2, dim=-1))
    want = F.silu(gate) * up
    torch.testing.assert_close(y, want)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(both.grad, other.grad)
    transposed = numbers((5, 6))
    torch.testing.assert_close(fastlm.glu(transposed.T, transposed.T, "relu"), torch.relu(transposed.T) * transposed.T)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(3), torch.ones(4)), ValueError, "gate and up must have one shape"),
        ((torch.ones(()), torch.ones(())), ValueError, "gate and up must have one shape"),
        ((torch.ones(3), torch.ones(3).double()), TypeError, "up must have the dtype of gate"),
        ((torch.ones(3, dtype=torch.int64),) * 2, TypeError, "gate must be floating point"),
        ((torch.ones(3), torch.ones(3), "swish"), ValueError, r"act must be one of none, relu"),
        ((torch.ones(3), torch.ones(3, device="meta")), ValueError, "up must be on the device of gate"),
        ((torch.ones(3), 1.0), TypeError, "up must be a tensor, got float"),
    ],
)
def test_glu_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        fastlm.glu(*arguments)


def test_gelu_says_what_is_wrong():
    with pytest.raises(ValueError, match="approximate must be one of none, tanh, got 'erf'"):
        fastlm.gelu(numbers((3,)), "erf")
    with pytest.raises(TypeError, match="x must be floating point, got torch"):
        fastlm.gelu(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("name", FEW)
def test_transforms(name, backend):
    ours, theirs = (lambda x, f=f: f(x).pow(2).sum() for f in OPS[name])
    x = numbers((3, 4))
    for transform in (
        grad, jacrev, jacfwd, hessian,
        lambda f: vmap(grad(f)),
        lambda f: grad(lambda t: vmap(f)(t).sum()),
        lambda f: lambda t: jvp(f, (t,), (t.flip(0),))[1],
    ):  # fmt: skip
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))


@pytest.mark.parametrize("name", ["relu", "relu_squared", "gelu", "silu", "sigmoid", "tanh", "bias_act", "glu"])
def test_opcheck(name, backend):
    x, dy = numbers((3, 4)).requires_grad_(), numbers((3, 4), seed=1).requires_grad_()
    more = {
        "gelu": ("tanh",),
        "bias_act": (numbers((4,), seed=2).requires_grad_(), "relu_squared"),
        "glu": (numbers((3, 4), seed=3).requires_grad_(), "silu"),
    }.get(name, ())
    torch.library.opcheck(overload(name, backend), (x, *more))
    torch.library.opcheck(overload(f"{name}_backward", backend), (dy, x, *more))


@pytest.mark.parametrize("choice", ["auto", "native", "reference"])
@pytest.mark.parametrize("name", FEW)
def test_compile(name, choice):
    if choice == "native" and not ISAS:
        pytest.skip("no compiled CPU module")
    torch._dynamo.reset()
    ours, theirs = OPS[name]
    with fastlm.use_backend(choice):
        compiled = torch.compile(lambda x: ours(x).sin(), fullgraph=True)
        for rows in (3, 5):
            a, b = (numbers((rows, 16)).requires_grad_() for _ in range(2))
            out, want = compiled(a), theirs(b).sin()
            # .sum() gives an expanded gradient: Inductor may drop a .contiguous() and hand it on as it is.
            out.sum().backward()
            want.sum().backward()
            torch.testing.assert_close((out, a.grad), (want, b.grad))


def test_compile_follows_the_backend():
    torch._dynamo.reset()
    seen = []

    def record(graph, inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    compiled = torch.compile(lambda x: fastlm.relu(x), backend=record, fullgraph=True)
    x = numbers((4,))
    for choice in ("auto", "reference", "auto"):
        with fastlm.use_backend(choice):
            compiled(x)
    assert seen == [[seen[0][0]], ["fastlm_reference.relu.default"]]
    assert "fastlm" not in seen[0][0]  # plain torch, for Inductor to fuse


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_dropout(act):
    x, b = numbers((200, 300)), numbers((300,))
    seed = torch.tensor(1234)
    y = fastlm.bias_act(x, b, act, dropout_p=0.25, seed=seed)
    full = fastlm.bias_act(x, b, act)
    kept = y != 0
    torch.testing.assert_close(y[kept], (full / 0.75)[kept])
    share = (~kept)[full != 0].double().mean().item()
    n = (full != 0).sum().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
    assert torch.equal(y, fastlm.bias_act(x, b, act, dropout_p=0.25, seed=seed))
    assert not torch.equal(y, fastlm.bias_act(x, b, act, dropout_p=0.25, seed=seed + 1))
    torch.manual_seed(3)
    first = fastlm.bias_act(x, b, act, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(first, fastlm.bias_act(x, b, act, dropout_p=0.25))


def test_dropout_bits_are_philox():
    """A known answer of Random123 for Philox4x32-10, all zero; and all 64 bits of the counter and the seed count."""
    from fastlm._dropout import philox

    words = philox(torch.tensor([0]), torch.tensor(0))
    assert [hex(int(w)) for w in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    draws = {tuple(int(w) for w in philox(torch.tensor([1 << i]), torch.tensor(0))) for i in range(63)}
    draws |= {tuple(int(w) for w in philox(torch.tensor([0]), torch.tensor(1 << i))) for i in range(63)}
    assert len(draws) == 126


def test_autocast_takes_the_bias_to_the_type_of_x():
    x, b = numbers((3, 4), torch.bfloat16), numbers((4,)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastlm.bias_act(x, b)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert b.grad.dtype == torch.float32


def test_inputs_stay_as_they_are_and_retained_graphs_repeat(backend):
    for ours, _ in OPS.values():
        x = numbers((9, 33)).requires_grad_()
        before, version = x.detach().clone(), x._version
        y = ours(x)
        (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(first, second) and torch.equal(x, before) and x._version == version


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: fastlm.bias_act(x, x[0], "swish"), ValueError,
         "fastlm.bias_act: act must be one of none, relu, relu_squared, gelu, gelu_tanh, silu, sigmoid, tanh, "
         "got 'swish'"),
        (lambda x: fastlm.bias_act(x, x), ValueError,
         "fastlm.bias_act: bias must be (N,) for x (..., N) = (2, 3), got (2, 3)"),
        (lambda x: fastlm.bias_act(x, x[0].double()), TypeError,
         "fastlm.bias_act: bias must have the dtype of x, torch.float32, got torch.float64"),
        (lambda x: fastlm.bias_act(x.int(), x[0].int()), TypeError,
         "fastlm.bias_act: x must be floating point, got torch.int32"),
        (lambda x: fastlm.bias_act(x, x[0], dropout_p=1.0), ValueError,
         "fastlm.bias_act: dropout_p must be in [0, 1), got 1.0"),
        (lambda x: fastlm.bias_act(x, x[0], dropout_p=0.1, seed=1.0), TypeError,
         "fastlm.bias_act: seed must be one int64 in a tensor, got 1.0"),
        (lambda x: fastlm.bias_act(x, x[0], dropout_p=0.1, seed=torch.arange(8)), TypeError,
         "fastlm.bias_act: seed must be one int64 in a tensor, got torch.int64 (8,)"),
        (lambda x: fastlm.bias_act(x, x[0].to("meta")), ValueError,
         "fastlm.bias_act: bias must be on the device of x, cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(call, error, text):
    with pytest.raises(error) as caught:
        call(torch.ones(2, 3))
    assert str(caught.value) == text


def test_relu_takes_floating_point_alone():
    for f in (fastlm.relu, fastlm.relu_squared):
        with pytest.raises(TypeError, match="must be floating point"):
            f(torch.arange(3))


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_without_memory_of_its_own_gets_a_sentence():
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(3, 3)])
    with fastlm.use_backend("native"), pytest.raises((TypeError, RuntimeError)) as caught:
        fastlm.relu(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("f", [fastlm.relu, fastlm.relu_squared])
def test_meta_and_marked_tensors(f):
    assert f(torch.empty(3, 4, device="meta")).shape == (3, 4)
    z = torch.randn(5, dtype=torch.complex64)
    torch.testing.assert_close(f(z.conj().imag), f(-z.imag))  # a real tensor whose memory holds the opposite


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
def test_memory_that_elements_share_is_not_dense():
    """Sizes (2, 4) with strides (7, 0) span 8 elements as a dense tensor does, and hold 2."""
    from fastlm import _native

    x = torch.randn(8).as_strided((2, 4), (7, 0))
    with pytest.raises(ValueError, match="tensors must be dense"):
        _native.cpu.act_forward(x, x, 0, 1)
    torch.testing.assert_close(fastlm.relu(x), torch.relu(x))


def test_a_bias_may_change_before_its_gradient_is_computed():
    """relu's gradient is computed from the output: the bias is not saved."""
    x, bias = numbers((3, 4)), numbers((4,)).requires_grad_()
    y = fastlm.bias_act(x, bias)
    with torch.no_grad():
        bias.add_(1)
    y.sum().backward()
    torch.testing.assert_close(bias.grad, (y > 0).float().sum(0))


def test_graphs_are_named_after_the_op():
    for backend in ("auto", "reference"):
        with fastlm.use_backend(backend):
            assert fastlm.relu(numbers((3,)).requires_grad_()).grad_fn.name() == f"relu_{backend}_Backward"


@pytest.mark.parametrize(
    "wrong",
    [{"x": [1.0]}, {"bias": None}, {"act": ["relu"]}, {"dropout_p": "a"}, {"bias": torch.ones(4, dtype=int)}],
    ids=str,
)
def test_bias_act_says_what_is_wrong(wrong):
    given = {"x": numbers((3, 4)), "bias": numbers((4,)), "act": "relu", "dropout_p": 0.0, **wrong}
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=f"fastlm.bias_act: {name} must be"):
        fastlm.bias_act(**given)
