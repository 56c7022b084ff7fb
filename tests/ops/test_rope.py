"""rope: every test on every backend."""

import math

import pytest
import torch
from op_testing import BACKENDS, DTYPES, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

import fastlm
from fastlm.ops.rope import rope_reference

# (..., T, H, D), R: all of a row and a part, whole vectors and not
SIZES = [((2, 5, 3, 64), 64), ((3, 7, 2, 10), 6), ((4, 1, 33), 2), ((2, 2, 3, 1, 128), 96)]


def tables(positions, R):
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(R // 2) / R)
    return angle.cos().float(), angle.sin().float()


def by_complex_numbers(x, cos, sin, interleaved, positions=None):
    """What turning means, in float64."""
    T, R = x.shape[-3], 2 * cos.shape[-1]
    rows = torch.arange(T) if positions is None else positions
    turn = torch.complex(cos.double(), sin.double())[rows][..., None, :]  # (..., T, 1, R/2)
    part = x[..., :R].double()
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    turned = torch.view_as_real(torch.complex(a.contiguous(), b.contiguous()) * turn)  # (..., T, H, R/2, 2)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, x[..., R:].double()), -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_turns_pairs(backend, dtype, interleaved, poisoned):  # noqa: F811
    if interleaved and "native" in backend:
        pytest.skip("left to the reference")
    for shape, R in SIZES:
        x, dy = numbers(shape, dtype), numbers(shape, dtype, seed=1)
        cos, sin = tables(9, R)
        for positions in (None, torch.arange(shape[-3]).flip(0), torch.randint(9, shape[:-2])):
            leaf, plain = (x.clone().requires_grad_() for _ in range(2))
            y = fastlm.rope(leaf, cos, sin, interleaved=interleaved, positions=positions)
            exact = by_complex_numbers(x, cos, sin, interleaved, positions)
            back = by_complex_numbers(dy, cos, -sin, interleaved, positions)  # the gradient turns back
            rows = slice(shape[-3]) if positions is None else positions
            stock = rope_reference(
                plain.view(-1, *shape[-3:]), *(t[rows].view(-1, shape[-3], R // 2) for t in (cos, sin)), interleaved
            ).view(shape)
            assert y.dtype == dtype and y.is_contiguous()
            assert_as_exact_as_torch(y.detach(), exact, stock.detach(), 2, f"y at {shape}")
            (dx,), (dx_stock,) = torch.autograd.grad(y, leaf, dy), torch.autograd.grad(stock, plain, dy)
            assert_as_exact_as_torch(dx, back, dx_stock, 2, f"dx at {shape}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_special_values(backend):
    cos, sin = tables(4, 6)
    x = numbers((2, 3, 4, 10)).transpose(1, 2)  # (2, 4, 3, 10), not contiguous
    assert torch.equal(fastlm.rope(x, cos, sin), fastlm.rope(x.contiguous(), cos, sin))
    x = x.contiguous()
    x[0, 1, 0, 0], x[0, 2, 0, 9] = float("nan"), float("inf")
    y = fastlm.rope(x, cos, sin)
    assert y[0, 1, 0, [0, 3]].isnan().all() and y.isnan().sum() == 2
    assert y[0, 2, 0, 9] == float("inf")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_x_and_of_the_tables(backend):
    x = numbers((2, 3, 2, 6), torch.float64).requires_grad_()
    cos, sin = (t.double().requires_grad_() for t in tables(4, 4))
    for interleaved in (False, True) if backend == "reference" else (False,):
        call = lambda *a, i=interleaved: fastlm.rope(*a, interleaved=i)  # noqa: E731
        assert gradcheck(call, (x, cos, sin), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(call, (x, cos, sin))
    assert gradcheck(lambda x: fastlm.rope(x, cos.detach(), sin.detach()), x, check_batched_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    cos, sin = tables(3, 8)
    x = numbers((4, 2, 3, 2, 8))
    each = torch.stack([fastlm.rope(t, cos, sin) for t in x])
    torch.testing.assert_close(vmap(lambda t: fastlm.rope(t, cos, sin))(x), each)
    torch.testing.assert_close(grad(lambda t: fastlm.rope(t, cos, sin).square().sum())(x[0]), 2 * x[0])  # lengths stay


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, (cos, sin) = numbers((2, 3, 2, 8)).requires_grad_(), tables(3, 6)
    torch.library.opcheck(overload("rope", backend), (x, cos[None], sin[None], False))


@pytest.mark.parametrize("rows", [3, 7, 10])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_refuses_tables_that_do_not_fit(backend, rows):
    cos, sin = tables(rows, 8)
    with pytest.raises((ValueError, RuntimeError)):
        overload("rope", backend)(numbers((2, 5, 3, 8)), cos[None], sin[None], False)


def test_compiled():
    x, (cos, sin) = numbers((2, 3, 2, 8)), tables(3, 6)
    compiled = torch.compile(fastlm.rope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cos, sin), fastlm.rope(x, cos, sin))


def test_empty():
    cos, sin = tables(3, 6)
    assert fastlm.rope(torch.empty(0, 3, 2, 8), cos, sin).shape == (0, 3, 2, 8)
    assert fastlm.rope(torch.empty(2, 0, 2, 8), cos, sin).shape == (2, 0, 2, 8)


def test_tables_keep_far_positions_apart():
    cos, sin = fastlm.rope_tables(1 << 17, 8, 100.0, dtype=torch.float64)
    assert cos.shape == sin.shape == (1 << 17, 4)
    for t in (0, 1, 131_071):
        want = torch.tensor([math.remainder(t * 100.0 ** (-i / 4), 2 * math.pi) for i in range(4)], dtype=torch.float64)
        torch.testing.assert_close(torch.atan2(sin[t], cos[t]), want, rtol=0, atol=1e-10)
    assert fastlm.rope_tables(3, 2)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 8), "fastlm.rope_tables: length must be at least 0, got -1"),
        ((4, 7), "fastlm.rope_tables: dim must be even and at least 2, got 7"),
        ((4, 0), "fastlm.rope_tables: dim must be even and at least 2, got 0"),
        ((4, 8, 1.0), "fastlm.rope_tables: base must be above 1, got 1.0"),
    ],
)
def test_wrong_tables_are_named(arguments, message):
    with pytest.raises(ValueError) as caught:
        fastlm.rope_tables(*arguments)
    assert str(caught.value) == message


WRONG = [
    ({"x": torch.ones(2, 3)}, ValueError, r"x must be \(\.\.\., T, H, D\), got \(2, 3\)"),
    ({"x": torch.ones(3, 2, 8, dtype=torch.int64)}, TypeError, "x must be floating point"),
    ({"cos": torch.ones(3, 5)}, ValueError, "R from 2 to D = 8"),
    ({"sin": torch.ones(2, 4)}, ValueError, r"got \(3, 4\) and \(2, 4\)"),
    ({"x": torch.ones(4, 2, 8)}, ValueError, "must have at least T = 4 rows, got 3"),
    ({"positions": torch.ones(2, dtype=torch.int64)}, ValueError, r"positions must be \(T,\) = \(3,\)"),
    ({"positions": torch.ones(3)}, TypeError, "positions must be int32 or int64"),
    ({"cos": torch.ones(3, 4, device="meta")}, ValueError, "cos must be on the device of x"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change, error, message):
    given = {"x": torch.ones(3, 2, 8), "cos": torch.ones(3, 4), "sin": torch.ones(3, 4)} | change
    with pytest.raises(error, match=message):
        fastlm.rope(**given)
