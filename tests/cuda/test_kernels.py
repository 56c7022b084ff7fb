"""Every CUDA kernel against its definition in float64: emulated on the CPU, and on the GPU where there is one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from attention_cases import DECODE, OPTIONS, decode_case, draw, option_case, options
from cuda_testing import FAMILIES, Kernels, TritonKernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import _library
from fastlm._activations import ACTIVATIONS, GRADIENTS, SAVE_OUTPUT
from fastlm._dropout import keep_mask
from fastlm._eight_bit import dequantized, quantized, random_of
from fastlm._rounding import noise_of, random_words
from fastlm.kernels import linear_cross_entropy, products_gpu
from fastlm.ops.adam import adam_reference
from fastlm.ops.bias_act import bias_act_backward_reference, bias_act_reference
from fastlm.ops.cross_entropy import (
    cross_entropy_backward_reference,
    cross_entropy_reference,
    linear_cross_entropy_reference,
)
from fastlm.ops.dropout import dropout_reference
from fastlm.ops.embedding import embedding_backward_reference
from fastlm.ops.glu import glu_backward_reference, glu_reference
from fastlm.ops.linear_act import linear_act_backward_reference, linear_act_reference
from fastlm.ops.mse_loss import mse_loss_backward_reference, mse_loss_reference
from fastlm.ops.norm import (
    add_layer_norm_reference,
    add_rms_norm_reference,
    layer_norm_reference,
    norm_backward_reference,
    rms_norm_reference,
)
from fastlm.ops.rope import rope_reference
from fastlm.ops.sgd import sgd_reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.float16, torch.bfloat16]
SENTINEL = 77.0


def assert_close(got: Tensor, want: Tensor, ulps: float = 2.0, floor: Tensor | float = 0.0) -> None:
    """`want`, computed in float64 from the same inputs; NaN and infinities must agree exactly. `floor`: how far off an
    element may be besides, in roundings of what is computed in.
    """
    got, dtype = got.cpu().double(), got.dtype
    assert got.shape == want.shape
    want = want.to(dtype).double()  # overflows where the dtype does
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    eps = torch.finfo(dtype).eps
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if dtype == torch.float64:  # then `want` is no more exact
        rounding *= 8
    floor = torch.as_tensor(floor * rounding).expand(want.shape)[finite]
    error = ((got[finite] - want[finite]).abs() - floor) / want[finite].abs().clamp_min(torch.finfo(dtype).tiny / eps)
    assert error.numel() == 0 or error.max() <= ulps * eps, f"off by {error.max() / eps:.1f} ulp"


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """In norm, where errors of sums cancel differently element by element, and no single element far off."""
    got, want = got.cpu().double(), want.double()
    assert got.isfinite().all()
    error = (got - want).norm() / want.norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"
    if want.numel() > 0:
        worst = (got - want).abs().max() / want.square().mean().sqrt().clamp_min(1e-30)
        assert worst <= 8 * tolerance, (
            f"an element is off by {worst:.2e} of the typical one, allowed {8 * tolerance:.0e}"
        )


def assert_no_worse(got: Tensor, want: Tensor, plain: Tensor, tolerance: float, least: float = 0.0) -> None:
    """Of the typical element, rows without a key left aside; and three times the error of plain torch in the same
    dtype, where numbers cancel. `least` is of the typical element.
    """
    assert got.shape == want.shape and got.isfinite().all()
    if want.numel() == 0:
        return
    error, beside = ((x.cpu().double() - want).abs() for x in (got, plain))
    typical = max(want[want != 0].square().mean().sqrt().nan_to_num(0).item(), least)
    share = (want != 0).double().mean().sqrt().item() if least == 0 else 1.0
    mean, worst = error.square().mean().sqrt().item(), error.max().item()
    mean_allowed = tolerance * typical * share + 3 * beside.square().mean().sqrt().item()
    worst_allowed = 8 * tolerance * typical + 3 * beside.max().item()
    assert mean <= mean_allowed, f"off by {mean:.2e} in the mean, allowed {mean_allowed:.2e}"
    assert worst <= worst_allowed, f"an element is off by {worst:.2e}, allowed {worst_allowed:.2e}"


def product_tolerance(dtype: torch.dtype) -> float:
    """Of the typical result of products in a dtype; in float64 what it is compared with is no more exact."""
    return (48 if dtype == torch.float64 else 6) * torch.finfo(dtype).eps


class NothingIsRead(TorchDispatchMode):
    """Raises where a number of a tensor is asked for, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


# --- activations ------------------------------------------------------------------------------------------------------
# Activation -> op and what it takes besides x.
ELEMENTWISE = {act: (act, ()) for act in ACTIVATIONS if act not in ("none", "gelu", "gelu_tanh")}
ELEMENTWISE |= {"gelu": ("gelu", ("none",)), "gelu_tanh": ("gelu", ("tanh",))}
EXACT = ("none", "relu", "relu_squared")
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 100.0, -100.0, 3e4, -3e4, 1e-7, -10.0, 10.0]


def slack(act: str, times: Tensor | float = 1.0) -> Tensor | float:
    """The floor of assert_close: where 1 + erf or 1 - s cancel, errors are of 1, times what the result is times."""
    return 0.0 if act in EXACT else 4 * torch.as_tensor(times).nan_to_num(posinf=0, neginf=0).abs()


def check_elementwise(kernels: Kernels, act: str, x: Tensor, dy: Tensor) -> None:
    op, more = ELEMENTWISE[act]
    y = kernels[op](x, *more)
    assert y.stride() == torch.empty_like(x).stride()
    exact, exact_dy = x.cpu().double(), dy.cpu().double()
    assert_close(y, ACTIVATIONS[act](exact), floor=slack(act))
    saved = y if act in SAVE_OUTPUT else x
    dx = kernels[f"{op}_backward"](dy, saved, *more)
    assert_close(dx, GRADIENTS[act](exact_dy, saved.cpu().double()), ulps=3, floor=slack(act, exact_dy))


@pytest.mark.parametrize("act", ELEMENTWISE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [0, 1, 7, 63, 8192, 10001])
@pytest.mark.parametrize("offset", [0, 1])
def test_activation(kernels, act, dtype, n, offset):
    x = draw(n + offset, dtype=dtype)
    if n >= 63:
        x[offset : offset + len(SPECIAL)] = torch.tensor(SPECIAL)
    dy = draw(n + offset, dtype=dtype, seed=1).to(kernels.device)[offset:]
    check_elementwise(kernels, act, x.to(kernels.device)[offset:], dy)


@pytest.mark.parametrize("act", ELEMENTWISE)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_activation_layouts(kernels, act, layout):
    x = draw(12, 70).to(kernels.device)
    x = {"transposed": x.mT, "sliced": x[:, ::2], "expanded": x[:1].expand(5, 70)}[layout]
    check_elementwise(
        kernels, act, x, torch.ones((), device=kernels.device).expand(x.shape)
    )  # as .sum() passes it back


@pytest.mark.parametrize("act", ELEMENTWISE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activation_takes_every_number(kernels, act, dtype):
    """Every float16; as float32 and float64 with as many more digits as fit."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).to(dtype)
    x = (x * (1 + torch.finfo(dtype).eps)).to(kernels.device)
    check_elementwise(kernels, act, x, torch.ones_like(x))


def test_where_relu_is_flat_no_gradient_passes(kernels):
    x = torch.tensor([-1.0, 0.0, -0.0, -math.inf, 1.0, math.nan], device=kernels.device)
    for dy in (math.inf, math.nan):
        for op in ("relu", "relu_squared"):
            dx = kernels[f"{op}_backward"](torch.full_like(x, dy), x)
            assert (dx[:4] == 0).all() and not dx[4:].isfinite().any()


# --- bias_act ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (3, 0), (300, 70), (129, 513), (2, 3, 256), (1000, 3)])
def test_bias_act(kernels, act, dtype, shape):
    x, bias, dy = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    on = [t.to(kernels.device) for t in (x, bias, dy)]
    y = kernels["bias_act"](on[0], on[1], act, 0.0, None)
    assert_close(y, bias_act_reference(x.double(), bias.double(), act, 0.0, None), ulps=3, floor=slack(act))
    saved, given = (
        (y, torch.full_like(on[1], math.nan)) if act in SAVE_OUTPUT else on[:2]
    )  # of which no more than the size
    dx, dbias = kernels["bias_act_backward"](on[2], saved, given, act)
    want = bias_act_backward_reference(dy.double(), saved.cpu().double(), bias.double(), act)
    assert_close(dx, want[0], ulps=3, floor=slack(act, dy.double()))
    if dbias.numel() > 0 and want[1].norm() > 0:
        assert_near(dbias, want[1], 4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(dbias.cpu().double(), want[1])
    again = kernels["bias_act_backward"](on[2], saved, given, act)
    assert torch.equal(dx, again[0]) and torch.equal(dbias, again[1])


# --- linear_act -------------------------------------------------------------------------------------------------------
# M, K, N: of whole vectors and not, without rows, columns or a sum
LINEAR_ACT = [(33, 40, 65), (140, 24, 72), (1, 1, 1), (0, 5, 4), (4, 5, 0), (3, 0, 6)]


def check_linear_act(kernels, act, dtype, sizes, bias=True, keep=True, wanted=(True, True, True)):
    M, K, N = sizes
    x, weight, b, dy = (
        draw(*shape, dtype=dtype, seed=i).to(kernels.device) for i, shape in enumerate([(M, K), (N, K), (N,), (M, N)])
    )
    b = b if bias else None
    y, u = kernels["linear_act"](x, weight, b, act, keep)
    exact = [None if t is None else t.cpu().double() for t in (x, weight, b)]
    assert y.dtype == dtype and y.is_contiguous()
    plain = linear_act_reference(x, weight, b, act, keep)
    for got, want, beside in zip((y, u), linear_act_reference(*exact, act, keep), plain, strict=True):
        assert_no_worse(got, want, beside, product_tolerance(dtype))
    if not keep:  # it was said that no gradient would be asked for
        return
    saved = y if act in SAVE_OUTPUT else u
    got = kernels["linear_act_backward"](dy, x, weight, saved, act, wanted)
    want = linear_act_backward_reference(dy.cpu().double(), *exact[:2], saved.cpu().double(), act, wanted)
    plain = linear_act_backward_reference(dy, x, weight, saved, act, wanted)
    for a, b, beside in zip(got, want, plain, strict=True):
        assert a.dtype == dtype and a.is_contiguous()
        assert_no_worse(a, b, beside, product_tolerance(dtype))
    again = kernels["linear_act_backward"](dy, x, weight, saved, act, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_act(kernels, act, dtype):
    for sizes in LINEAR_ACT:
        check_linear_act(kernels, act, dtype, sizes)
    check_linear_act(kernels, act, dtype, (20, 9, 17), bias=False, keep=False)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False,) * 3):
        check_linear_act(kernels, act, dtype, (20, 9, 17), False, True, wanted)


def test_linear_act_keeps_what_is_not_a_number(kernels):
    x, weight = torch.eye(3, device=kernels.device), torch.eye(3, device=kernels.device)
    x[1, 1] = math.nan
    y, _ = kernels["linear_act"](x, weight, None, "relu", True)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    dy = torch.full_like(y, math.inf)
    _, _, dbias = kernels["linear_act_backward"](
        dy[:, :1], x, weight[:1], torch.zeros_like(dy[:, :1]), "relu", [True] * 3
    )
    assert (dbias == 0).all()


# --- dropout ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 63, 8192, 10001])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 5])
def test_dropout(kernels, dtype, n, offset, seed):
    x = draw(n + offset, dtype=dtype).to(kernels.device)[offset:]
    for p in (0.3, 0.999):
        y = kernels["dropout"](x, p, torch.tensor(seed, device=kernels.device))
        want = dropout_reference(x.cpu().double(), p, torch.tensor(seed))
        assert torch.equal(y.cpu() == 0, (want == 0) | (x.cpu() == 0))
        assert_close(y, want)


def test_dropout_drops_what_is_not_finite(kernels):
    x = torch.full((40, 50), math.nan, device=kernels.device).T
    y = kernels["dropout"](x, 0.5, torch.tensor(3, device=kernels.device))
    assert y.is_contiguous()
    assert torch.equal(y.isnan().cpu(), keep_mask((50, 40), 0.5, torch.tensor(3)))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_act_with_dropout(kernels, act, dtype):
    x, bias = draw(7, 33, dtype=dtype).to(kernels.device), draw(33, dtype=dtype).to(kernels.device)
    seed = torch.tensor(11, device=kernels.device)
    y = kernels["bias_act"](x, bias, act, 0.4, seed)
    assert torch.equal(y, kernels["dropout"](kernels["bias_act"](x, bias, act, 0.0, None), 0.4, seed))


# --- mse_loss ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [0, 1, 7, 8192, 32768, 100001])
@pytest.mark.parametrize("offset", [0, 1])
def test_mse_loss(kernels, dtype, n, offset):
    x, target = (draw(n + offset, dtype=dtype, seed=i).to(kernels.device)[offset:] for i in range(2))
    loss = kernels["mse_loss"](x, target)
    wide = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == wide and loss.shape == ()
    torch.testing.assert_close(
        loss.cpu().double(),
        mse_loss_reference(x.cpu().double(), target.cpu().double()),
        rtol=4 * torch.finfo(wide).eps,
        atol=0,
    )
    assert torch.equal(loss, kernels["mse_loss"](x, target))
    g = torch.tensor(0.3, dtype=wide, device=kernels.device)
    want = mse_loss_backward_reference(g.cpu().double(), x.cpu().double(), target.cpu().double())
    assert_close(kernels["mse_loss_backward"](g, x, target), want, ulps=3)
    if n > 0:
        x[n // 2] = math.nan
        assert kernels["mse_loss"](x, target).isnan()
        assert kernels["mse_loss_backward"](g, x, target).isnan().sum() == 1


# --- gated units ------------------------------------------------------------------------------------------------------
def check_glu(kernels: Kernels, act: str, gate: Tensor, up: Tensor, dy: Tensor) -> None:
    exact_gate, exact_up, exact_dy = (t.cpu().double() for t in (gate, up, dy))
    y = kernels["glu"](gate, up, act)
    assert y.is_contiguous()
    assert_close(y, glu_reference(exact_gate, exact_up, act), ulps=3, floor=slack(act, exact_up))
    got = kernels["glu_backward"](dy, gate, up, act)
    want = glu_backward_reference(exact_dy, exact_gate, exact_up, act)
    for a, b, times in zip(got, want, (exact_dy * exact_up, exact_dy), strict=True):
        assert a.is_contiguous()
        assert_close(a, b, ulps=4, floor=slack(act, times))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (0, 5), (3, 0), (5,), (300, 70), (9, 513), (2, 3, 256), (1000, 3), (3, 4096)]
)
def test_glu(kernels, act, dtype, shape):
    """Two tensors, and the halves of one."""
    gate, up, dy = (draw(*shape, dtype=dtype, seed=i).to(kernels.device) for i in range(3))
    if shape == (300, 70):
        gate[7, : len(SPECIAL)] = torch.tensor(SPECIAL, device=kernels.device)
        up[9, : len(SPECIAL)] = torch.tensor(SPECIAL, device=kernels.device)
    check_glu(kernels, act, gate, up, dy)
    halves = torch.cat([gate, up], -1).chunk(2, -1)
    want = kernels["glu"](gate, up, act), *kernels["glu_backward"](dy, gate, up, act)
    got = kernels["glu"](*halves, act), *kernels["glu_backward"](dy, *halves, act)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "misaligned", "up expanded"])
def test_glu_layouts(kernels, layout):
    gate, up, dy = (draw(12, 72, seed=i).to(kernels.device) for i in range(3))
    if layout == "up expanded":
        gate, up = gate, up[:1].expand(12, 72)
    else:
        change = {
            "transposed": lambda x: x.mT, "sliced": lambda x: x[:, ::2], "expanded": lambda x: x[:1].expand(5, 72),
            "misaligned": lambda x: x[:, 1:65],
        }[layout]  # fmt: skip
        gate, up, dy = change(gate), change(up), change(dy)
    check_glu(kernels, "silu", gate, up, dy)


# --- norms ------------------------------------------------------------------------------------------------------------
# Rows and columns: of a warp, of four, of a block, too long for its registers; with tails, and more rows than a block.
NORM = [
    (3, 1),
    (37, 5),
    (70, 64),
    (9, 512),
    (5, 513),
    (20, 777),
    (3, 1025),
    (6, 2048),
    (3, 2049),
    (2, 8192),
    (2, 9001),
    (0, 8),
    (4, 0),
]


def check_norm(kernels, dtype, rows, cols, centred, residual, weighted, offset=0, dsum=True):
    """Forward and backward, `offset` elements into their memory."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rows_of(seed, shift=0.0):
        x = torch.zeros(rows * cols + offset, dtype=dtype)
        x[offset:] = (draw(rows * cols, seed=seed) + shift).to(dtype)
        return x.to(kernels.device)[offset:].view(rows, cols)

    x, other, dy, ds = rows_of(0, 1.0), rows_of(1) if residual else None, rows_of(2), rows_of(3) if dsum else None
    weight, bias = (  # as far into their memory
        draw(cols + offset, dtype=wide, seed=4 + i).to(kernels.device)[offset:] if weighted else None for i in range(2)
    )
    parameters = [weight, bias] if centred else [weight]
    given = [x, *([other] if residual else []), *parameters]
    exact = [None if t is None else t.cpu().double() for t in given]
    name = ("add_" if residual else "") + ("layer_norm" if centred else "rms_norm")
    references = [rms_norm_reference, layer_norm_reference, add_rms_norm_reference, add_layer_norm_reference]
    got = kernels[name](*given, 1e-5)
    want = references[2 * residual + centred](*exact, 1e-5)
    eps = torch.finfo(dtype).eps
    y, s = got if residual else (got, x)
    s_exact = s.cpu().double()
    if residual:
        assert torch.equal(s.cpu(), x.cpu() + other.cpu())
        want, _ = references[centred](s_exact, *exact[2:], 1e-5), None
    assert y.dtype == dtype and y.is_contiguous()
    assert_near(y, want, 2 * eps)
    wanted = [weighted, weighted and centred]
    saved = (dy, ds, s, weight)
    gradients = kernels["norm_backward"](*saved, 1e-5, centred, wanted)
    exact = [None if t is None else t.cpu().double() for t in saved]
    want = norm_backward_reference(*exact, 1e-5, centred, wanted)
    assert_near(gradients[0], want[0], 3 * eps)
    for a, b in zip(gradients[1:], want[1:], strict=True):
        assert a.dtype == wide and a.shape == b.shape
        assert_near(a, b, 1e-5 if wide == torch.float32 else 1e-13)
    again = kernels["norm_backward"](*saved, 1e-5, centred, wanted)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, cols", NORM)
@pytest.mark.parametrize("centred", [False, True])
def test_norm(kernels, dtype, rows, cols, centred):
    check_norm(kernels, dtype, rows, cols, centred, True, True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cols", [72, 1000, 9000])
@pytest.mark.parametrize(
    "residual, weighted, offset, dsum", [(False, True, 0, False), (False, False, 1, True), (True, False, 1, False)]
)
def test_norm_with_less(kernels, dtype, cols, residual, weighted, offset, dsum):
    for centred in (False, True):
        check_norm(kernels, dtype, 5, cols, centred, residual, weighted, offset, dsum)


@pytest.mark.parametrize("cols", [40, 700, 3000])
@pytest.mark.parametrize("dtype", HALVES)
def test_norm_of_rows_that_are_no_numbers(kernels, dtype, cols):
    """They stay among themselves; and a deviation is not lost beside a large mean."""
    x = draw(4, cols, dtype=dtype)
    x[1, 3], x[2, 5] = math.nan, math.inf
    x[3] += 100
    y = kernels["layer_norm"](x.to(kernels.device), None, None, 1e-5)
    assert y[1].isnan().all() and y[2].isnan().all()
    assert_near(y[[0, 3]], layer_norm_reference(x[[0, 3]].double(), None, None, 1e-5), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("cols", [72, 71, 1000, 2501, 9001])
def test_norm_stays_inside(kernels, cols):
    canaries, module = Canaries(kernels.device), kernels.module
    empty = lambda *shape, dtype=torch.float16: canaries.empty(*shape, dtype=dtype)  # noqa: E731
    x, residual, dy = (draw(5, cols, dtype=torch.float16, seed=i).to(kernels.device) for i in range(3))
    weight, bias = (draw(cols, seed=i).to(kernels.device) for i in range(2))
    y, s, dx = (empty(5, cols) for _ in range(3))
    module.norm_forward(x, residual, weight, bias, y, s, 1e-5, True, kernels.stream())
    dweight, dbias = (empty(cols, dtype=torch.float32) for _ in range(2))
    partial = empty(2 * module.norm_slices(s) * cols, dtype=torch.float32)
    module.norm_backward(dy, residual, s, weight, dx, dweight, dbias, partial, 1e-5, True, kernels.stream())
    canaries.check()
    want = norm_backward_reference(*(t.cpu().double() for t in (dy, residual, s, weight)), 1e-5, True, [True, True])
    for a, b in zip((dx, dweight, dbias), want, strict=True):
        assert_near(a, b, 3 * torch.finfo(a.dtype).eps if a is dx else 1e-5)


# --- the embedding ----------------------------------------------------------------------------------------------------
# V, N, places, how much the first rows are preferred: rows of whole vectors and not, more columns than a block has,
# sums over many parts of the places, over one and over a whole number of them, of nothing
EMBEDDING = [
    (5, 3, 40, 1), (65, 40, 300, 4), (1000, 70, 100, 1), (3, 600, 200, 1), (1, 9, 321, 1), (2, 2100, 33, 1),
    (40, 8, 31, 1), (40, 8, 32, 1), (40, 8, 64, 9), (1, 1, 1, 1), (7, 5, 0, 1), (7, 0, 5, 1),
]  # fmt: skip


def check_embedding(kernels, dtype, V, N, count, power, padding=-1, offset=0):
    """`offset` elements into their memory."""
    index = ((draw(count).abs() % 1) ** power * V).long().clamp_max(V - 1).to(kernels.device)
    weight, dy = (
        draw(n * N + offset, dtype=dtype, seed=i).to(kernels.device)[offset:].view(n, N)
        for i, n in enumerate((V, count))
    )
    y = kernels["embedding"](weight, index, padding)
    assert y.is_contiguous() and torch.equal(y, weight[index])
    dweight = kernels["embedding_backward"](dy, index, V, padding)
    want = embedding_backward_reference(dy.cpu().double(), index.cpu(), V, padding)
    assert dweight.dtype == dtype and dweight.is_contiguous()
    # By the sizes of the terms: sums may cancel.
    terms = embedding_backward_reference(dy.cpu().double().abs(), index.cpu(), V, padding)
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((dweight.cpu().double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 8 * wide * terms).all()
    assert torch.equal(dweight, kernels["embedding_backward"](dy, index, V, padding))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", EMBEDDING, ids=str)
def test_embedding(kernels, dtype, case):
    check_embedding(kernels, dtype, *case)
    check_embedding(kernels, dtype, *case, padding=0, offset=1)


@pytest.mark.parametrize("cols", [40, 41])
def test_indices_that_are_no_rows_lead_nowhere_else(kernels, cols):
    """Rows of NaN, and no part of any sum, also where they go on from part to part. Nobody reads them before."""
    index = torch.tensor([-1, 2, 5, 2**62, -(2**62), 0] * 40, device=kernels.device)
    known = (index >= 0) & (index < 5)
    weight, dy = draw(5, cols).to(kernels.device), draw(len(index), cols).to(kernels.device)
    dy[~known] = math.nan
    with NothingIsRead():
        y = kernels["embedding"](weight, index, -1)
        dweight = kernels["embedding_backward"](dy, index, 5, -1)
    assert torch.equal(y[known], weight[index[known]]) and y[~known].isnan().all()
    want = kernels["embedding_backward"](dy[known], index[known], 5, -1)
    assert_near(dweight, want.cpu(), 1e-6)
    assert (dweight[[1, 3, 4]] == 0).all()


def test_embedding_layouts(kernels):
    weight, index = draw(8, 6).to(kernels.device).T, torch.tensor([[0, 5], [5, 5]], device=kernels.device).T.flatten()
    assert torch.equal(kernels["embedding"](weight, index, -1), weight[index])
    one = torch.ones((), device=kernels.device).expand(4, 8)  # as .sum() passes it back
    dweight = kernels["embedding_backward"](one, index, 6, -1)
    assert (dweight[0] == 1).all() and (dweight[5] == 3).all() and (dweight[1:5] == 0).all()


@pytest.mark.parametrize("cols", [1, 40, 111, 1030])
@pytest.mark.parametrize("dtype", FLOATS)
def test_embedding_stays_inside(kernels, dtype, cols):
    canaries, module, stream = Canaries(kernels.device), kernels.module, kernels.stream()
    index, order = torch.sort(torch.arange(70, device=kernels.device) % 4 * 3)
    weight, dy = (draw(n, cols, dtype=dtype).to(kernels.device) for n in (10, 70))
    wide = torch.promote_types(dtype, torch.float32)
    y, dweight = canaries.empty(70, cols, dtype=dtype), canaries.empty(10, cols, dtype=dtype).zero_()
    partial = canaries.empty(module.embedding_partial_rows(70), cols, dtype=wide).zero_()
    module.embedding_forward(weight, index, y, stream)
    module.embedding_backward(dy, index, order, dweight, partial, 3, stream)
    canaries.check()
    assert torch.equal(y, weight[index])
    want = torch.zeros(10, cols, dtype=torch.float64).index_add_(0, index.cpu(), dy.cpu().double()[order.cpu()])
    want[3] = 0
    assert_near(dweight, want, 4 * torch.finfo(dtype).eps)


# --- rope and the loss ------------------------------------------------------------------------------------------------
# N, T, heads, head dim, half of what is turned, tables of each sequence, elements into the memory
ROPE = [
    (2, 5, 3, 64, 32, False, 0), (1, 40, 2, 128, 64, True, 0), (2, 3, 1, 40, 16, False, 0), (1, 7, 5, 6, 3, True, 0),
    (1, 1, 1, 2, 1, False, 0), (2, 9, 4, 80, 16, True, 1), (1, 3, 2, 1000, 400, False, 0), (0, 4, 2, 16, 8, False, 0),
]  # fmt: skip


def check_rope(kernels, dtype, n, t, heads, dim, half, own, offset):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = draw(n * t * heads * dim + offset, dtype=dtype).to(kernels.device)[offset:].view(n, t, heads, dim)
    angles = 7 * draw(n if own else 1, t, half, dtype=torch.float64, seed=1)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    tables = [
        torch.nn.functional.pad(t.flatten(), (offset, 0)).to(kernels.device)[offset:].view_as(t) for t in (cos, sin)
    ]
    y = kernels["rope"](x, *tables, False)
    want = rope_reference(x.cpu().double(), cos.double(), sin.double(), False)
    assert y.dtype == dtype and y.is_contiguous() and y.shape == x.shape
    assert_near(y, want, 2 * torch.finfo(dtype).eps)
    assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", ROPE, ids=str)
def test_rope(kernels, dtype, case):
    check_rope(kernels, dtype, *case)


def draw_logits(rows, classes, dtype, device, seed=0):
    x = (4 * draw(rows, classes, seed=seed)).to(dtype).to(device)
    target = (draw(rows, seed=1).abs() * 1e4).long().remainder(max(classes, 1)).to(device)
    target[1::3] = -100
    return x, target


def check_cross_entropy(kernels, dtype, rows, classes, smoothing, softcap, with_dlse):
    x, target = draw_logits(rows, classes, dtype, kernels.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = (-100, smoothing, softcap)
    loss, lse = kernels["cross_entropy"](x, target, None, *options)
    exact, here = x.cpu().double(), target.cpu()
    want = cross_entropy_reference(exact, here, None, *options)
    eps = torch.finfo(wide).eps
    for got, value in zip((loss, lse), want, strict=True):
        assert got.dtype == wide and (got.cpu()[here == -100] == 0).all()
        assert_near(got, value, 8 * eps)
    exact_lse = want[1]
    g = draw(rows, dtype=wide, seed=2).to(kernels.device)
    dlse = draw(rows, dtype=wide, seed=3).to(kernels.device) if with_dlse else None
    dx = kernels["cross_entropy_backward"](g, dlse, x, target, None, lse, *options)
    gradients = (t if t is None else t.cpu().double() for t in (g, dlse))
    want = cross_entropy_backward_reference(*gradients, exact, here, None, exact_lse, *options)
    assert dx.dtype == dtype and (dx.cpu()[here == -100] == 0).all()
    # Element by element, as they differ by many powers of ten: the rounding to the dtype, and that of the terms, where
    # exp(z - lse) has the error of z - lse, a number around 20.
    z = softcap * torch.tanh(exact / softcap) if softcap else exact
    p = torch.exp(z - exact_lse[:, None])
    shares = smoothing / classes + (1 - smoothing) * torch.zeros_like(p).scatter(1, here.clamp_min(0)[:, None], 1.0)
    of_loss, of_lse = (t.cpu().double().abs()[:, None] if t is not None else 0 for t in (g, dlse))
    terms = (p + shares) * of_loss + p * of_lse
    number = torch.finfo(dtype)
    allowed = number.eps * (want.abs() + number.tiny) + 64 * eps * terms
    assert ((dx.cpu().double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "rows, classes", [(0, 5), (5, 1), (37, 3), (40, 65), (9, 1000), (4, 1024), (5, 1031), (3, 20011)]
)
def test_cross_entropy(kernels, dtype, rows, classes):
    check_cross_entropy(kernels, dtype, rows, classes, 0.0, 0.0, False)
    check_cross_entropy(kernels, dtype, rows, classes, 0.1, 5.0, True)


@pytest.mark.parametrize("classes", [70, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_strange_rows(kernels, dtype, classes):
    """Each stays by itself: NaN, infinities, huge logits; targets that are no class, which nothing is read for."""
    x, target = draw_logits(9, classes, dtype, kernels.device)
    target[:] = 7
    x[0, 11], x[1, 11], x[2], x[3, 11], x[4] = math.nan, math.inf, -math.inf, -math.inf, 1000
    target[5], target[6], target[7] = classes, -1, 2**62
    loss, lse = kernels["cross_entropy"](x, target, None, -100, 0.0, 0.0)
    known = [0, 1, 2, 3, 4, 8]
    want = cross_entropy_reference(x.cpu()[known].double(), target.cpu()[known], None, -100, 0.0, 0.0)
    for got, value in zip((loss, lse), want, strict=True):
        torch.testing.assert_close(got.cpu()[known].double(), value, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert loss[5:8].isnan().all() and lse[5:8].isfinite().all()
    dx = kernels["cross_entropy_backward"](torch.ones_like(lse), None, x, target, None, lse, -100, 0.0, 0.0)
    assert dx[[0, 5, 6, 7]].isnan().all() and dx[[3, 4, 8]].isfinite().all()


def test_cross_entropy_in_place(kernels):
    """The gradient may overwrite the logits, whatever their rows begin at."""
    for classes in (65, 72, 2001, 2048):
        x, target = draw_logits(6, classes, torch.bfloat16, kernels.device)
        loss, lse = kernels["cross_entropy"](x, target, None, -100, 0.1, 0.0)
        want = kernels["cross_entropy_backward"](loss, lse, x, target, None, lse, -100, 0.1, 0.0)
        kernels.module.cross_entropy_backward(loss, lse, x, target, lse, x, -100, 0.1, 0.0, kernels.stream())
        assert torch.equal(x, want)


# rows, columns, classes: of three parts, of one, of two of which the last is one row, of nothing
LINEAR_CROSS_ENTROPY = [(300, 40, 65), (7, 5, 11), (129, 33, 1031), (1, 1, 1), (0, 8, 9), (5, 0, 4)]


def linear_operands(kernels, dtype, rows, cols, classes, bias=True):
    x, weight, b = (draw(*shape, seed=i) for i, shape in enumerate([(rows, cols), (classes, cols), (classes,)]))
    weight = weight / max(cols, 1) ** 0.5
    target = draw_logits(rows, classes, dtype, kernels.device)[1]
    return *((t if t is None else t.to(dtype).to(kernels.device)) for t in (x, weight, b if bias else None)), target


def check_linear_cross_entropy(kernels, dtype, sizes, bias=True, options=(-100, 0.0, 0.0, 0.0, True), part=1):
    """With the logits of 128 rows held at a time, if no more bytes than `part` are."""
    *operands, target = linear_operands(kernels, dtype, *sizes, bias)
    target[target == -100] = options[0]
    run = kernels["linear_cross_entropy"]
    wanted = [True, True, bias]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, "_MOST_BYTES", part)
        patch.setattr(torch, "empty_like", lambda t, **options: torch.full_like(t, math.nan, **options))
        got = run(*operands, target, *options, wanted)
        again = run(*operands, target, *options, wanted)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, again, strict=True))
    here = [None if t is None else t.cpu() for t in operands]
    want = linear_cross_entropy_reference(
        *(t if t is None else t.double() for t in here), target.cpu(), *options, wanted
    )
    plain = linear_cross_entropy_reference(*operands, target, *options, wanted)
    wide = torch.promote_types(dtype, torch.float32)
    assert got[0].dtype == wide and torch.equal(got[0].isnan().cpu(), want[0].isnan())
    for a, b, beside in zip(got, want, plain, strict=True):
        if not b.isnan().any():
            assert_no_worse(a, b, beside, product_tolerance(dtype))
    kept = torch.float32 if dtype == torch.float16 else dtype
    assert all(t.dtype == kept and t.is_contiguous() for t in got[1:])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", LINEAR_CROSS_ENTROPY, ids=str)
def test_linear_cross_entropy(kernels, dtype, sizes):
    check_linear_cross_entropy(kernels, dtype, sizes)
    check_linear_cross_entropy(kernels, dtype, sizes, False, (1, 0.1, 1e-2, 3.0, False), 1 << 29)


@pytest.mark.parametrize("wanted", [[False] * 3, [True, False, False], [False, True, False], [False, False, True]])
def test_linear_cross_entropy_makes_what_is_wanted(kernels, wanted):
    """The same bits as with all of it, and nothing else."""
    *operands, target = linear_operands(kernels, torch.bfloat16, 200, 24, 50)
    options = (-100, 0.1, 1e-2, 3.0, True)
    everything = kernels["linear_cross_entropy"](*operands, target, *options, [True] * 3)
    got = kernels["linear_cross_entropy"](*operands, target, *options, wanted)
    for want, a, b in zip([True, *wanted], got, everything, strict=True):
        assert torch.equal(a, b) if want else a.numel() == 0 and a.dtype == b.dtype


def test_linear_cross_entropy_of_strange_rows(kernels):
    """Ignored rows may hold anything, and all may be ignored; a target that is no class makes the loss NaN."""
    x, weight, bias, target = linear_operands(kernels, torch.float32, 9, 8, 70)
    options, run = (-100, 0.0, 1e-2, 0.0, True), kernels["linear_cross_entropy"]
    want = run(x, weight, bias, target, *options, [True] * 3)
    x[target == -100] = math.nan
    got = run(x, weight, bias, target, *options, [True, False, True])
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(got[3], want[3])
    loss, dx, _, _ = run(x, weight, bias, torch.full_like(target, -100), *options, [True, False, False])
    assert loss.isnan() and (dx == 0).all()
    target[0] = 70
    assert run(x, weight, bias, target, *options, [True, False, False])[0].isnan()


def test_rows_of_logits_that_are_held():
    """As many as fit, of one size; the whole tiles of the products decide."""
    shapes = {
        (16384, 131072, torch.bfloat16): 2048, (16384, 131072, torch.float32): 1024,
        (2100, 131072, torch.bfloat16): 1152, (16384, 32000, torch.bfloat16): 8192, (5, 131072, torch.bfloat16): 128,
        (300, 10**9, torch.float32): 128, (0, 0, torch.float32): 128,
    }  # fmt: skip
    for (count, classes, dtype), want in shapes.items():
        x, weight = (torch.empty(n, 4, dtype=dtype, device="meta") for n in (count, classes))
        assert linear_cross_entropy.rows_on_gpu(x, weight) == want, (count, classes)


def test_sums_that_an_older_torch_cannot_do(kernels, monkeypatch):
    """Are refused where they are needed: of 16-bit factors, for the gradient of the weight."""
    aten = SimpleNamespace(baddbmm=SimpleNamespace())
    monkeypatch.setattr(products_gpu, "torch", SimpleNamespace(ops=SimpleNamespace(aten=aten)))
    options = (-100, 0.0, 0.0, 0.0, True)
    for dtype in FLOATS:
        operands = linear_operands(kernels, dtype, 5, 4, 3)
        refusal = kernels.refusal("linear_cross_entropy", *operands, *options, [False, True, False])
        assert ("torch 2.8" in refusal) if dtype in HALVES else refusal is None
        assert kernels.refusal("linear_cross_entropy", *operands, *options, [True, False, True]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_waits_for_nothing(kernels, dtype):
    operands = linear_operands(kernels, dtype, 20, 8, 30)
    with NothingIsRead():
        kernels["linear_cross_entropy"](*operands, -100, 0.1, 1e-2, 3.0, True, [True] * 3)
    with NothingIsRead(), pytest.raises(AssertionError):
        operands[-1].sum().item()


# --- Adam -------------------------------------------------------------------------------------------------------------
def adam_lists(dtype: torch.dtype, sizes: list[int], amsgrad: bool) -> list[list[Tensor]]:
    lists = [[draw(n, dtype=dtype, seed=s) for n in sizes] for s in range(3)]
    lists += [[draw(n, dtype=dtype, seed=s).square() for n in sizes] for s in (3, 4)]
    if not amsgrad:
        lists[4] = []
    return [*lists, [on_host(float(i % 5)) for i in range(len(sizes))]]


def on_host(value: float) -> Tensor:
    """A number on the CPU for kernels that take all others to be on a GPU, even where none are."""
    number = torch.tensor(value)
    number.on_host = True
    return number


NO_EXTRAS = (0.0, None, [], [], 0.0, [], [])  # l1, found_inf, masters, averages of weights and their decay, scales
NOTHING_MORE = (None, False, None, False, 0, *NO_EXTRAS)  # no scale, nothing at random, lr a number


def on(device: torch.device, x):
    """A copy there of an argument of a step, but of steps that are counted on the host."""
    if isinstance(x, (list, tuple)):
        return [on(device, t) for t in x]
    if isinstance(x, Tensor):
        return on_host(x.item()) if hasattr(x, "on_host") else x.to(device, copy=True)
    return x


def assert_stepped(got: Tensor, before: Tensor, want: Tensor, plain: Tensor) -> None:
    """An update is a difference of numbers around 1, or as large as what it changes, each of a few roundings; and where
    a quotient of small differences makes these large, they may be twice the reference's in the same dtype.
    """
    got, before, want, eps = got.cpu().double(), before.cpu().double(), want.double(), torch.finfo(got.dtype).eps
    size = torch.maximum(want.abs(), before.nan_to_num(0).abs()).clamp_min(1.0)
    error, beside = (((x - want).abs() / size).nan_to_num(math.inf) for x in (got, plain.double()))
    if error.numel() > 0:
        assert error.max() <= max(4 * eps, 2 * beside.max()), f"off by {error.max() / eps:.1f} ulp"


def check_step(kernels, op: str, reference: Callable[..., None], args: tuple) -> None:
    """One step, twice, against float64; nothing but the lists is written, and nothing at all where it is skipped."""
    given = dict(zip(inspect.signature(reference).parameters, args, strict=True))
    ours, again = (on(kernels.device, given) for given in 2 * [list(given.values())])
    for call in (ours, again):
        kernels[op](*call)
    ours, again = (dict(zip(given, call, strict=True)) for call in (ours, again))
    lists = {name: tensors for name, tensors in given.items() if isinstance(tensors, (list, tuple))}
    exact = on(torch.device("cpu"), list(given.values()))
    exact = {
        name: [t.double() for t in x] if name in lists and name != "steps" else x
        for name, x in zip(given, exact, strict=True)
    }
    if given["masters"]:  # the step is theirs
        exact |= {"params": [t.cpu().double() for t in given["masters"]], "masters": []}
    reference(**exact)
    if given["masters"]:
        exact["masters"] = exact["params"]
    plain = dict(zip(given, on(torch.device("cpu"), list(given.values())), strict=True))
    reference(**plain)
    skipped = given["found_inf"] is not None and given["found_inf"].item() != 0
    for name, tensors in lists.items():
        stepped = zip(tensors, ours[name], again[name], exact[name], plain[name], strict=True)
        for before, a, b, want, beside in stepped:
            assert a.dtype == before.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
            if skipped or name == "grads":
                assert torch.equal(a.cpu().nan_to_num(7), before.cpu().nan_to_num(7)), name
                continue
            assert_stepped(a, before, want, beside)


def check_adam(kernels, lists: list[list[Tensor]], options: tuple, more: tuple = NOTHING_MORE) -> None:
    check_step(kernels, "adam_", adam_reference, (*lists, *options, *more))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam(kernels, dtype, decoupled, amsgrad):
    lists = adam_lists(dtype, [0, 1, 63, 8193, 257], amsgrad)
    check_adam(kernels, lists, (0.1, 0.9, 0.99, 1e-6, 0.1, decoupled, amsgrad, amsgrad))


def test_adam_more_tensors_than_a_launch_takes(kernels):
    check_adam(
        kernels, adam_lists(torch.float32, list(range(1, 120)), True), (0.1, 0.9, 0.99, 1e-6, 0.0, True, True, False)
    )


def test_adam_mixed_dtypes_in_one_call(kernels):
    lists = [
        [*a, *b]
        for a, b in zip(
            adam_lists(torch.float32, [5, 9], False), adam_lists(torch.bfloat16, [5, 9], False), strict=True
        )
    ]
    before = [t.clone() for t in lists[0]]
    moved = [[t.to(kernels.device) for t in tensors] for tensors in lists[:5]]
    kernels["adam_"](*moved, lists[5], 0.1, 0.9, 0.99, 1e-6, 0.0, True, False, False, *NOTHING_MORE)
    assert all(not torch.equal(a.cpu(), b) for a, b in zip(moved[0], before, strict=True))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_states_of_their_own_dtype(kernels, dtype, state_dtype):
    """Dense and strided; what is bfloat16 makes all that follows from it as coarse."""
    lists = adam_lists(dtype, [1, 4099, 8192], True)
    lists[2:5] = [[t.to(state_dtype) for t in tensors] for tensors in lists[2:5]]
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, True, True, False)
    check_adam(kernels, copies(lists), options)
    strided = [[torch.stack([t, t], 1)[:, 0].to(kernels.device) for t in tensors] for tensors in lists[:5]]
    dense = [[t.to(kernels.device, copy=True) for t in tensors] for tensors in lists[:5]]
    for tensors in (strided, dense):
        kernels["adam_"](*tensors, [on_host(1.0) for _ in range(3)], *options, None, True, None, True, 7, *NO_EXTRAS)
    for got, want in zip(strided, dense, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def copies(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [*([t.clone() for t in tensors] for tensors in lists[:5]), [on_host(t.item()) for t in lists[5]]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_adam_reads_steps_lr_and_scale_on_the_device(kernels, dtype):
    """More parameters than one launch counts (where arguments take 4 KB); with steps in float32 and float64."""
    lists = adam_lists(dtype, [5, 0, *range(300)], False)
    kinds = (torch.float32, torch.float64)
    lists[5] = [torch.tensor(float(i % 7), dtype=kinds[i % 2], device=kernels.device) for i in range(302)]
    before = [step.item() for step in lists[5]]
    scale, lr = torch.tensor(0.25, device=kernels.device), torch.tensor([0.05], dtype=dtype, device=kernels.device)
    options = (float("nan"), 0.9, 0.99, 1e-6, 0.1, True, False, True)
    exact = [[t.double().clone() for t in tensors] for tensors in lists[:5]]
    exact.append([step.cpu() for step in lists[5]])
    exact[5] = [step.clone() for step in exact[5]]
    ours = [[t.to(kernels.device) for t in tensors] for tensors in lists[:5]]
    kernels["adam_"](*ours, lists[5], *options, scale, False, lr, False, 0, *NO_EXTRAS)
    adam_reference(*exact, *options, scale.cpu(), False, lr.cpu())
    assert [step.item() for step in lists[5]] == [t + 1 for t in before]
    for got, want in zip(ours, exact, strict=False):
        for a, b in zip(got, want, strict=True):
            error = (a.cpu().double() - b).abs() / b.abs().clamp_min(1.0)
            assert error.numel() == 0 or error.max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("counted", ["host", "device"])
@pytest.mark.parametrize("dtype, state_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_adam_rounds_at_random_as_the_reference(kernels, dtype, state_dtype, counted):
    lists = adam_lists(dtype, [3, 40_000], False)
    lists[2:4] = [[t.to(state_dtype) for t in tensors] for tensors in lists[2:4]]
    options, more = (0.01, 0.9, 0.999, 1e-8, 0.1, True, False, False), (None, True, None, True, 12345, *NO_EXTRAS)
    ours = [[t.to(kernels.device, copy=True) for t in tensors] for tensors in lists[:5]]
    steps = [on_host(4.0) if counted == "host" else torch.tensor(4.0, device=kernels.device) for _ in range(2)]
    kernels["adam_"](*ours, steps, *options, *more)
    adam_reference(*lists[:5], [torch.tensor(4.0) for _ in range(2)], *options, *more)
    for got, want in zip(ours[:4], lists[:4], strict=True):
        for a, b in zip(got, want, strict=True):
            assert (a.cpu() != b).float().mean() < 2e-3 or a.dtype == torch.float32
    nearest = adam_lists(dtype, [3, 40_000], False)
    nearest[2:4] = [[t.to(state_dtype) for t in tensors] for tensors in nearest[2:4]]
    adam_reference(*nearest[:5], [torch.tensor(4.0) for _ in range(2)], *options)
    at_random = 0 if dtype == torch.bfloat16 else 3
    assert 0.1 < (ours[at_random][1].cpu() != nearest[at_random][1]).float().mean() < 0.8


# --- what a step may do besides ---------------------------------------------------------------------------------------
STEP_DTYPES = [(dtype, dtype) for dtype in FLOATS]
STEP_DTYPES += [(dtype, torch.float32) for dtype in HALVES] + [(torch.float32, torch.bfloat16)]


def joined(extras: set[str]) -> str:  # in every process the same
    return "-".join(sorted(extras))


EXTRAS = [{"l1"}, {"found_inf"}, {"skipped"}, {"masters"}, {"emas"}, {"l1", "found_inf", "masters", "emas"}]


def extras_of(params: list[Tensor], wanted: set[str], device: torch.device) -> dict:
    """The arguments of a step that do what is wanted; masters where parameters may have them."""
    wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in params]
    with_masters = "masters" in wanted and all(p.element_size() == 2 for p in params)
    found_inf = {"found_inf": 0.0, "skipped": math.inf}
    return {
        "l1": 0.05 if "l1" in wanted else 0.0,
        "found_inf": next((torch.tensor(x, device=device) for name, x in found_inf.items() if name in wanted), None),
        "masters": [p * 1.001 for p in wide] if with_masters else [],
        "emas": [p * 0.5 for p in wide] if "emas" in wanted else [],
        "ema_decay": 0.75,
    }


def counted(lists: list[list[Tensor]], device: torch.device) -> list[Tensor]:
    """The steps of some lists, which come last, counted on the device."""
    return [step.clone().to(device) for step in lists[-1]]


@pytest.mark.parametrize("extras", EXTRAS, ids=joined)
@pytest.mark.parametrize("dtype, state_dtype", STEP_DTYPES)
def test_adam_extras(kernels, dtype, state_dtype, extras):
    lists = adam_lists(dtype, [0, 1, 63, 8193, 257], False)
    lists[2:4] = [[t.to(state_dtype) for t in tensors] for tensors in lists[2:4]]
    more = extras_of(lists[0], extras, kernels.device)
    if more["found_inf"] is not None:
        lists[5] = counted(lists, kernels.device)
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, "emas" in extras, False, True)
    check_adam(kernels, lists, options, (*NOTHING_MORE[:5], *more.values(), [], []))


def sgd_args(
    dtype: torch.dtype, sizes: list[int], device: torch.device, *, state_dtype: torch.dtype | None = None,
    momentum: float = 0.9, dampening: float = 0.0, weight_decay: float = 0.1, nesterov: bool = False,
    maximize: bool = False, scale: float | None = None, lr: float | Tensor = 0.1, steps: str = "host",
    extras: set[str] = frozenset(), stochastic_params: bool = False,
) -> tuple:  # fmt: skip
    """Of tensors on the CPU, and of numbers on the device. steps: where they are counted, or that they are not."""
    params, grads, buffers = ([draw(n, dtype=dtype, seed=s) for n in sizes] for s in range(3))
    buffers = [t.to(state_dtype or dtype) for t in buffers] if momentum != 0 else []
    counts = [on_host(float(i % 3)) for i in range(len(sizes))] if steps != "none" else []
    for buffer, count in zip(buffers, counts, strict=False):
        if count == 0:  # in the first step nothing is read of it
            buffer.fill_(math.nan)
    if steps == "device":
        counts = counted([counts], device)
    more = extras_of(params, extras, device)
    rate, device_lr = (math.nan, lr) if isinstance(lr, Tensor) else (lr, None)
    scale = None if scale is None else torch.tensor(scale, device=device)
    numbers = (rate, momentum, dampening, weight_decay, more["l1"], nesterov, maximize, scale, device_lr)
    last = (more["found_inf"], more["masters"], more["emas"], more["ema_decay"], stochastic_params, 12345)
    return params, grads, buffers, counts, *numbers, *last


def check_sgd(kernels, *args, **options) -> None:
    check_step(kernels, "sgd_", sgd_reference, sgd_args(*args, kernels.device, **options))


@pytest.mark.parametrize("dtype, state_dtype", STEP_DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "steps": "none"}, {"momentum": 0.0, "scale": 0.5, "maximize": True}, {},
        {"dampening": 0.5, "weight_decay": 0.0, "steps": "device"}, {"nesterov": True, "maximize": True},
    ],
    ids=["plain", "maximize", "momentum", "dampening", "nesterov"],
)  # fmt: skip
def test_sgd(kernels, dtype, state_dtype, options):
    check_sgd(kernels, dtype, [0, 1, 63, 8193, 257], state_dtype=state_dtype, **options)


@pytest.mark.parametrize("extras", EXTRAS, ids=joined)
@pytest.mark.parametrize("dtype, state_dtype", STEP_DTYPES)
@pytest.mark.parametrize("momentum, steps", [(0.9, "device"), (0.0, "none")])
def test_sgd_extras(kernels, dtype, state_dtype, extras, momentum, steps):
    check_sgd(
        kernels, dtype, [0, 1, 63, 4099, 257], state_dtype=state_dtype, momentum=momentum, steps=steps, extras=extras
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", ["none", "device"])
def test_sgd_reads_lr_and_scale_on_the_device(kernels, dtype, steps):
    """More parameters than one launch takes (where arguments take 4 KB)."""
    lr = torch.tensor([0.05], dtype=dtype, device=kernels.device)
    momentum = 0.0 if steps == "none" else 0.5
    check_sgd(kernels, dtype, [5, 0, *range(120)], momentum=momentum, scale=0.25, lr=lr, steps=steps)


@pytest.mark.parametrize("steps", ["host", "device"])
def test_sgd_rounds_at_random_as_the_reference(kernels, steps):
    args = sgd_args(torch.bfloat16, [3, 40_000], kernels.device, steps=steps, lr=1e-3, stochastic_params=True)
    ours, want = on(kernels.device, args), on(torch.device("cpu"), args)
    kernels["sgd_"](*ours)
    sgd_reference(*want)
    assert (ours[0][1].cpu() != want[0][1]).float().mean() < 2e-3
    nearest = sgd_args(torch.bfloat16, [3, 40_000], torch.device("cpu"), lr=1e-3)
    sgd_reference(*nearest)
    assert 0.1 < (ours[0][1].cpu() != nearest[0][1]).float().mean() < 0.8


@pytest.mark.parametrize("op", ["adam_", "sgd_"])
@pytest.mark.parametrize("extras", [EXTRAS[-1], {"skipped", "emas"}], ids=joined)
@pytest.mark.parametrize("dtype, state_dtype", STEP_DTYPES)
def test_strided_steps_with_extras_are_as_dense_ones(kernels, op, dtype, state_dtype, extras):
    args = list(sgd_args(dtype, [4099, 257], kernels.device, state_dtype=state_dtype, steps="device", extras=extras))
    if op == "adam_":
        lists = adam_lists(dtype, [4099, 257], True)
        lists[2:5] = [[t.to(state_dtype) for t in tensors] for tensors in lists[2:5]]
        lists[5] = counted(lists, kernels.device)
        more = extras_of(lists[0], extras, kernels.device)
        args = [*lists, 0.1, 0.9, 0.99, 1e-6, 0.1, False, True, False, *NOTHING_MORE[:5], *more.values(), [], []]
    dense = on(kernels.device, args)
    strided = [
        [torch.stack([t, t], 1)[:, 0] if t.dim() > 0 else t for t in x] if isinstance(x, list) else x
        for x in on(kernels.device, args)
    ]
    for call in (dense, strided):
        kernels[op](*call)
    for a, b in zip(dense, strided, strict=True):
        if isinstance(a, list):
            assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))
    # A word beside each that was stepped is as it was.
    for x, before in zip(strided, args, strict=True):
        if isinstance(x, list):
            beside = [t.as_strided(t.shape, t.stride(), 1) for t in x if t.dim() > 0]
            whole = [t.to(kernels.device) for t in before if t.dim() > 0]
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(beside, whole, strict=True))


@pytest.mark.parametrize("op", ["adam_", "sgd_"])
def test_steps_wait_for_nothing(kernels, op):
    """With all numbers on the device."""
    lr, device = torch.tensor(0.1, device=kernels.device), kernels.device
    args = sgd_args(torch.float32, [5, 300], device, lr=lr, scale=0.5, steps="device", extras={"found_inf", "emas"})
    if op == "adam_":
        lists = adam_lists(torch.float32, [5, 300], False)
        lists[5] = counted(lists, device)
        more = extras_of(lists[0], {"found_inf", "emas"}, device)
        args = (*lists, 0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False, lr, False, lr, False, 0, *more.values(), [], [])
    args = on(device, args)
    with NothingIsRead():
        kernels[op](*args)


# --- states in 8 bits -------------------------------------------------------------------------------------------------
def packed_lists(dtype: torch.dtype, sizes: list[int]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """As adam_lists, with states in 8 bits; and their scales. Of a size's blocks one is 0."""
    lists = adam_lists(dtype, sizes, False)
    scales = []
    for k, signed in ((2, True), (3, False)):
        wide = [t.float() for t in lists[k]]
        for t in wide:
            t[256:512] = 0
        packed = [quantized(t, signed) for t in wide]
        lists[k] = [codes.view(t.shape) for (codes, _), t in zip(packed, wide, strict=True)]
        scales.append([scale for _, scale in packed])
    return lists, scales


def signed_codes(codes: Tensor, signed: bool) -> Tensor:
    """As integers, of which neighbours differ by 1, above and below 0."""
    return torch.where(codes > 127, -(codes & 127).int(), codes.int()) if signed else codes.int()


def check_adam_8bit(
    kernels, dtype: torch.dtype, sizes: list[int], options: tuple, extras: set[str] = frozenset(),
    scale: float | None = None, steps: str = "device", seed: int = 7, stochastic_params: bool = False,
) -> None:  # fmt: skip
    """Against the step in float64 of states that were unpacked, packed again with the same random bits."""
    lists, scales = packed_lists(dtype, sizes)
    more = extras_of(lists[0], extras, kernels.device)
    if steps == "device" or more["found_inf"] is not None:
        lists[5] = counted(lists, kernels.device)
    scale = None if scale is None else torch.tensor(scale, device=kernels.device)
    args = (
        *lists,
        *options,
        scale,
        False,
        None,
        stochastic_params and not more["masters"],
        seed,
        *more.values(),
        *scales,
    )
    ours, again = (on(kernels.device, args) for _ in range(2))
    for call in (ours, again):
        kernels["adam_"](*call)
    for a, b, before in zip(ours, again, args, strict=True):
        if isinstance(a, list):
            assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))
            if "skipped" in extras:
                assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, before, strict=True))
    if "skipped" in extras:
        return
    cpu = torch.device("cpu")
    exact = on(cpu, args)
    exact[0] = [t.double() for t in more["masters"] or lists[0]]
    exact[1] = [t.double() for t in lists[1]]
    exact[2:4] = [
        [dequantized(codes, scale, signed).double() for codes, scale in zip(lists[k], scales[k - 2], strict=True)]
        for k, signed in ((2, True), (3, False))
    ]
    names = list(inspect.signature(adam_reference).parameters)
    exact = dict(zip(names, exact, strict=True)) | {"masters": [], "exp_avg_scales": [], "exp_avg_sq_scales": []}
    exact |= {"stochastic_params": False, "emas": [t.double() for t in exact["emas"]]}
    adam_reference(**exact)
    got, given, plain = (dict(zip(names, call, strict=True)) for call in (ours, args, on(cpu, args)))
    adam_reference(**plain)
    pairs = {"params": "params", "emas": "emas"} | ({"masters": "params"} if more["masters"] else {})
    for name, of in pairs.items():
        for a, before, want, beside in zip(got[name], given[name], exact[of], plain[name], strict=True):
            assert_stepped(a, before, want, beside)
    for i, step in enumerate(exact["steps"]):
        assert got["steps"][i].item() == step.item()
        noise = noise_of(step.double().reshape(()), i, seed)
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            state = exact[f"{name}s"][i].float()
            codes, scales_of = quantized(state, signed, random_of(random_words(state, noise), signed))
            codes_got, scales_got = got[f"{name}s"][i].cpu(), got[f"{name}_scales"][i].cpu()
            torch.testing.assert_close(scales_got, scales_of, rtol=1e-6, atol=0, equal_nan=True)
            apart = (signed_codes(codes_got, signed) - signed_codes(codes, signed)).abs()
            assert apart.numel() == 0 or apart.max() <= 1  # at a border that the last bit of a float32 crosses
            assert apart.numel() == 0 or apart.float().mean() <= max(2e-3, 2 / apart.numel())


@pytest.mark.parametrize("extras", [set(), *EXTRAS], ids=lambda extras: joined(extras) or "none")
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_adam_8bit(kernels, dtype, extras):
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, "l1" in extras, False, "emas" in extras)
    check_adam_8bit(kernels, dtype, [0, 1, 63, 8193, 257, 512], options, extras, scale=0.5)


@pytest.mark.parametrize("steps", ["host", "device"])
def test_adam_8bit_more_tensors_than_a_launch_takes(kernels, steps):
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False)
    check_adam_8bit(kernels, torch.bfloat16, [*range(1, 90)], options, steps=steps)


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_adam_8bit_of_what_is_not_finite(kernels, dtype):
    """A block with one such gradient becomes NaN, the others are as without it; the least states become 0, no square
    above 0 beside larger ones does.
    """
    lists, scales = packed_lists(dtype, [2000, 2000, 300])
    lists[1][0][[300, 999]] = torch.tensor([math.nan, -math.inf], dtype=dtype)
    lists[1][1][:] = 0
    scales[0][1][:], scales[1][1][:] = 1e-30, 1e-30
    lists[1][2][:4], lists[3][2][:4] = 6e-8, 0
    args = (*lists, 0.0, 0.9, 0.99, 1e-6, 0.0, True, False, False, *NOTHING_MORE[:-2], *scales)
    ours, want = on(kernels.device, args), on(torch.device("cpu"), args)
    kernels["adam_"](*ours)
    adam_reference(*want)
    for k in (-2, -1):
        for got, right in zip(ours[k], want[k], strict=True):
            torch.testing.assert_close(got.cpu(), right, rtol=1e-6, atol=0, equal_nan=True)
        assert ours[k][0].cpu().isnan().nonzero().flatten().tolist() == [1, 3]
        assert (ours[k][1] == 0).all()
    assert (ours[3][2][:4] == 1).all()
    for k in (2, 3):
        for got, right in zip(ours[k], want[k], strict=True):
            assert (signed_codes(got.cpu(), k == 2) - signed_codes(right, k == 2)).abs().max() <= 1


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_adam_8bit_goes_by_memory(kernels, dtype):
    """Transposed parameters are as those of their memory; gradients, masters and averages may lie otherwise."""
    lists, scales = packed_lists(dtype, [1260])
    more = extras_of(lists[0], {"emas", "masters"}, kernels.device)
    args = (*lists, 0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False, *NOTHING_MORE[:5], *more.values(), *scales)
    flat, turned = on(kernels.device, args), on(kernels.device, args)
    names = list(inspect.signature(adam_reference).parameters)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        k = names.index(name)
        turned[k] = [t.view(30, 42).mT for t in turned[k]]
    for name in ("grads", "masters", "emas"):
        k = names.index(name)
        turned[k] = [t.view(30, 42).mT.contiguous() for t in turned[k]]
    for call in (flat, turned):
        kernels["adam_"](*call)
    for a, b in zip(flat, turned, strict=True):
        if isinstance(a, list):
            assert all(torch.equal(x, y.mT.reshape(x.shape) if y.dim() == 2 else y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_adam_8bit_misaligned(kernels, dtype):
    lists, scales = packed_lists(dtype, [1100])
    args = (*lists, 0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False, *NOTHING_MORE[:-2], *scales)
    aligned, shifted = on(kernels.device, args), on(kernels.device, args)
    for k in range(4):
        shifted[k] = [torch.cat([t[:1], t])[1:] for t in shifted[k]]
    for call in (aligned, shifted):
        kernels["adam_"](*call)
    for a, b in zip(aligned, shifted, strict=True):
        if isinstance(a, list):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float64, torch.float32]])
def test_grad_norm(kernels, dtypes):
    grads = [
        draw(n, dtype=dtype, seed=n).to(kernels.device)
        for dtype in dtypes
        for n in (0, 1, 63, 32767, 32768, 70_001, *range(200))
    ]
    grads.append(draw(40, 30, dtype=dtypes[0]).to(kernels.device).t()[::2])
    grads.append(draw(1001, dtype=dtypes[0]).to(kernels.device)[1:])
    norm = kernels["grad_norm"](grads)
    assert norm.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32) and norm.shape == ()
    want = torch.cat([g.cpu().double().flatten() for g in grads]).norm()
    torch.testing.assert_close(norm.cpu().double(), want, rtol=1e-6, atol=0)
    assert torch.equal(norm, kernels["grad_norm"](grads))
    grads[-1][17] = math.nan
    assert kernels["grad_norm"](grads).isnan()
    assert kernels["grad_norm"]([torch.zeros(3, device=kernels.device), torch.ones(0, device=kernels.device)]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_strides_stay_in_place(kernels, dtype):
    """Parameters that are views, and lists whose strides differ from theirs: stepped where they are, around nothing."""
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, True, True, False)
    dense = adam_lists(dtype, [120], True)
    want = [[t.to(kernels.device).view(6, 20) for t in tensors] for tensors in dense[:5]]
    base = [torch.full((20, 13), SENTINEL, dtype=dtype, device=kernels.device) for _ in range(5)]
    views = [[b[:, 1::2].T] for b in base]  # (6, 20)
    for (view,), (value,) in zip(views, want, strict=True):
        view.copy_(value)
    kernels["adam_"](*views, [on_host(1.0)], *options, *NOTHING_MORE)
    kernels["adam_"](*want, [on_host(1.0)], *options, *NOTHING_MORE)
    for b, (view,), (value,) in zip(base, views, want, strict=True):
        assert torch.equal(view, value)
        assert (b[:, ::2] == SENTINEL).all()


# --- attention --------------------------------------------------------------------------------------------------------
def exact_attention(q, k, v, causal, window, scale):
    """In float64 by the definition; also the log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q_len, k_len = q.shape[2], k.shape[2]
    ahead = torch.arange(k_len) - torch.arange(q_len)[:, None]
    distance = ahead - (k_len - q_len)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= (distance if causal == 1 else ahead) <= 0
    if window[0] >= 0:
        visible &= distance >= -window[0]
    if window[1] >= 0:
        visible &= distance <= window[1]
    s = torch.where(visible, (q @ k.mT) * scale, -math.inf)
    lse = s.logsumexp(-1)
    p = torch.where(visible, torch.exp(s - torch.where(lse == -math.inf, 0, lse).unsqueeze(-1)), 0)
    # Where no row sees it, whatever a key holds must not count.
    return torch.where(p.unsqueeze(-1) > 0, p.unsqueeze(-1) * v.unsqueeze(2), 0).sum(3), lse


def laid_out(x: Tensor, layout: str, device: torch.device) -> Tensor:
    x = x.to(device)
    if layout == "bthd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "misaligned":
        return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
    if layout == "columns":
        return x.mT.contiguous().mT
    return x


# batch, query heads, key heads, queries, keys, head dim, value dim, causal, window, layout
ATTENTION = [
    (1, 1, 1, 64, 64, 64, 64, 0, (-1, -1), "plain"),
    (1, 2, 1, 130, 130, 64, 64, 1, (-1, -1), "plain"),
    (2, 4, 2, 70, 100, 40, 40, 1, (-1, -1), "bthd"),
    (1, 1, 1, 100, 70, 111, 111, 1, (-1, -1), "plain"),
    (1, 1, 1, 65, 129, 128, 96, 2, (-1, -1), "plain"),
    (1, 1, 1, 129, 65, 192, 192, 1, (-1, -1), "plain"),
    (1, 2, 2, 40, 70, 200, 256, 0, (-1, -1), "bthd"),
    (1, 1, 1, 1, 1, 8, 8, 1, (-1, -1), "plain"),
    (1, 6, 2, 63, 65, 16, 16, 2, (-1, -1), "misaligned"),
    (1, 2, 1, 66, 66, 32, 32, 0, (-1, -1), "columns"),
    (1, 1, 1, 20, 80, 64, 256, 1, (-1, -1), "plain"),
    (1, 1, 1, 150, 150, 64, 64, 1, (20, -1), "plain"),
    (1, 1, 1, 90, 140, 24, 24, 0, (30, 10), "plain"),
    (1, 1, 1, 90, 140, 1, 3, 0, (-1, 0), "plain"),
    (1, 1, 1, 90, 70, 32, 32, 2, (30, 5), "plain"),
    (1, 2, 1, 70, 130, 96, 96, 1, (-1, -1), "bthd"),
    (1, 1, 1, 66, 40, 88, 80, 2, (-1, -1), "misaligned"),
    (1, 2, 2, 33, 66, 256, 192, 1, (-1, -1), "plain"),
]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def check_attention(kernels, dtype, case, tolerance=None, deterministic=True):
    batch, heads, heads_k, q_len, k_len, width, width_v, causal, window, layout = case
    tolerance = tolerance or TOLERANCE[dtype]
    q, k, v = (
        draw(batch, h, t, d, dtype=dtype, seed=i)
        for i, (h, t, d) in enumerate([(heads, q_len, width), (heads_k, k_len, width), (heads_k, k_len, width_v)])
    )
    do, dlse = draw(batch, heads, q_len, width_v, dtype=dtype, seed=3), draw(batch, heads, q_len, seed=4)
    scale = width**-0.5
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    o, lse = exact_attention(*leaves, causal, window, scale)
    blind = lse == -math.inf
    dlse = torch.where(blind, 0, dlse)
    want = torch.autograd.grad((o * do.double()).sum() + (torch.where(blind, 0, lse) * dlse).sum(), leaves)

    q, k, v, do = (laid_out(t, layout, kernels.device) for t in (q, k, v, do))
    got_o, got_lse = kernels["attention"](q, k, v, *options(causal, window, scale))
    assert got_o.dtype == dtype and got_lse.dtype == torch.float32
    assert torch.equal(got_lse.cpu() == -math.inf, blind)
    assert (got_o.cpu()[blind] == 0).all()
    assert_near(got_o, o.detach(), tolerance)
    assert_near(torch.where(blind, 0, got_lse.cpu()), torch.where(blind, 0, lse.detach()), 1e-5)
    saved = (do, dlse.to(kernels.device), q, k, v, got_o, got_lse)
    last = (*options(causal, window, scale, deterministic=deterministic), [True] * 3 + [False] * 3)
    got = kernels["attention_backward"](*saved, *last)
    for name, a, b, t in zip("qkv", got[:3], want, (q, k, v), strict=True):
        assert a.dtype == dtype and a.stride() == torch.empty_like(t).stride(), name
        assert_near(a, b.nan_to_num(0), 2 * tolerance)
    assert all(x.numel() == 0 for x in got[3:])
    return got_o, got_lse, got


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(kernels, dtype, case):
    check_attention(kernels, dtype, case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", ATTENTION[::3], ids=str)
def test_attention_without_tensor_cores(kernels, dtype, case, monkeypatch):
    """16-bit dtypes through the fp32 kernels, as devices older than sm_80 run them."""
    if not kernels.emulated:
        pytest.skip("the device decides")
    monkeypatch.setenv("EMULATED_COMPUTE_CAPABILITY", "75")
    check_attention(kernels, dtype, case)


def check_options(kernels, dtype, width, width_v, name, deterministic=True):
    case = option_case(name, dtype, width, width_v, kernels.device)
    case_options = (*case.options[:-1], deterministic)
    o, lse = kernels["attention"](*case.qkv, *case_options)
    assert torch.equal(lse.cpu() == -math.inf, case.lse == -math.inf)
    assert_near(o, case.o, TOLERANCE[dtype])
    assert_near(lse.cpu().nan_to_num(neginf=0), case.lse.nan_to_num(neginf=0), 1e-5)
    got = kernels["attention_backward"](case.do, case.dlse, *case.qkv, o, lse, *case_options, case.wanted)
    for i, (a, b) in enumerate(zip(got, case.gradients, strict=True)):
        assert a.shape == b.shape
        # A sum over all scores: roundings of o in its dtype cancel as little as in the reference.
        assert_near(a, b, (2 if i < 3 else 4) * max(TOLERANCE[dtype], TOLERANCE[a.dtype]))
    return (o, lse, *got)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_options(kernels, dtype, name):
    """Against the reference in float64; and the same bits again."""
    first, again = (check_options(kernels, dtype, 64, 64, name) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sink_that_takes_all_of_the_weight(kernels, dtype):
    q = draw(1, 2, 20, 16, dtype=dtype).to(kernels.device)
    sinks = torch.tensor([math.inf, 0.5], device=kernels.device)
    o, lse = kernels["attention"](q, q, q, *options(sinks=sinks))
    assert (o[:, 0] == 0).all() and (lse[:, 0] == math.inf).all() and o[:, 1].isfinite().all()
    lens = torch.tensor([20], device=kernels.device)
    o, lse = kernels["attention_decode"](q, q, q, lens, None, None, sinks, -1, 0, 0.1, 0.0)
    assert (o[:, 0] == 0).all() and (lse[:, 0] == math.inf).all() and o[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width, width_v", [(96, 80), (128, 128), (192, 128), (256, 256)])
def test_attention_options_of_every_width(kernels, dtype, width, width_v):
    check_options(kernels, dtype, width, width_v, "all")


@pytest.mark.parametrize("ends", [[0, 30, 10, 70], [-5, 20, 300, 70], [0, 0, 0, 0], [70, 0, 70, 0]], ids=str)
def test_attention_unchecked_ends_lead_nowhere_else(kernels, ends):
    """Nobody reads cu_seqlens on a GPU before the kernels do: whatever stands there, they stay inside the tensors."""
    module, canaries = kernels.module, Canaries(kernels.device)
    q, k, v, do = (canaries.empty(1, 2, 70, 32, dtype=torch.float16).zero_() for _ in range(4))
    o, dq, dk, dv = (canaries.empty(1, 2, 70, 32, dtype=torch.float16).zero_() for _ in range(4))
    lse, stats = (canaries.empty(*shape, dtype=torch.float32).zero_() for shape in ((1, 2, 70), (1, 2, 70, 2)))
    ends = torch.tensor(ends, device=kernels.device)
    last = bare(kernels.stream(), ends=ends)
    module.attention_forward(q, k, v, o, lse, *last)
    module.attention_backward(do, None, q, k, v, o, lse, dq, dk, dv, None, None, None, stats, *last)
    canaries.check()
    assert all((t == 0).all() for t in (o, dq, dk, dv))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_attention_of_nothing(kernels, sizes):
    batch, heads, q_len, k_len = sizes
    q = torch.zeros(batch, heads, q_len, 16, dtype=torch.float16, device=kernels.device)
    k = torch.zeros(batch, heads, k_len, 16, dtype=torch.float16, device=kernels.device)
    o, lse = kernels["attention"](q, k, k, *options())
    assert (o == 0).all() and (lse == -math.inf).all()
    dq, dk, dv, *_ = kernels["attention_backward"](o, None, q, k, k, o, lse, *options(), [True] * 3 + [False] * 3)
    assert dq.shape == q.shape and (dq == 0).all() and (dk == 0).all() and (dv == 0).all()


# --- the same on Hopper ---------------------------------------------------------------------------------------------
HOPPER = [
    (1, 1, 1, 128, 128, 64, 64, 0, (-1, -1), "plain"),
    (1, 2, 1, 300, 300, 64, 64, 1, (-1, -1), "plain"),
    (2, 4, 2, 70, 600, 40, 40, 1, (-1, -1), "bthd"),
    (1, 2, 2, 200, 130, 128, 96, 1, (-1, -1), "bthd"),
    (1, 1, 1, 390, 520, 128, 128, 2, (-1, -1), "plain"),
    (1, 3, 1, 260, 400, 64, 128, 0, (100, 30), "plain"),
    (1, 1, 1, 1, 1, 8, 8, 1, (-1, -1), "plain"),
]


@pytest.fixture
def on_hopper(kernels, monkeypatch):
    """The family for sm_90a, and proof that each call of attention took it."""
    if not kernels.emulated and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("FASTLM_CUDA_FAMILY", "sm90")
    monkeypatch.setenv("EMULATED_COMPUTE_CAPABILITY", "90")
    return kernels


def families(kernels, q, k, v, scale=1.0):
    """Of the forward and the backward."""
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
    last = (*[None] * 7, (-(2**30), 0, 2**30), scale, 0.0, 0.0, kernels.stream())
    forward = kernels.module.attention_forward(q, k, v, o, lse, *last)
    gradients, stats = (
        [torch.empty_like(q), *(torch.empty(k.shape).to(q) for _ in range(2))],
        lse.new_empty(*lse.shape, 2),
    )
    read = (o, None, q, k, v, o, lse, *gradients, None, None, None, stats)
    return forward, kernels.module.attention_backward(*read, *last)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_attention_on_hopper(on_hopper, dtype, case):
    first, again = (check_attention(on_hopper, dtype, case) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], again[2], strict=True))
    q = torch.zeros(*case[:2], case[3], case[5], dtype=dtype, device=on_hopper.device)
    assert families(on_hopper, q, q, q) == ("sm90", "sm90")
    # Where dq is added up in any order, keys are still walked over in one.
    _, _, other = check_attention(on_hopper, dtype, case, deterministic=False)
    assert torch.equal(other[1], first[2][1]) and torch.equal(other[2], first[2][2])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["packed", "packed, window"])
def test_packed_sequences_on_hopper(on_hopper, dtype, name, deterministic):
    check_options(on_hopper, dtype, 64, 64, name, deterministic)


@pytest.mark.parametrize("width", [40, 128])
def test_sums_in_any_order_on_hopper(on_hopper, width):
    """dq comes from dq_sums, of which nothing is written beyond the tensor."""
    module, canaries = on_hopper.module, Canaries(on_hopper.device)
    q, k, v, do = (draw(1, 2, 130, width, dtype=torch.bfloat16, seed=i).to(on_hopper.device) for i in range(4))
    o, lse = on_hopper["attention"](q, k, v, *options(1))
    want = on_hopper["attention_backward"](do, None, q, k, v, o, lse, *options(1), [True] * 3 + [False] * 3)
    dq, dk, dv = (canaries.empty(1, 2, 130, width, dtype=torch.bfloat16) for _ in range(3))
    stats = canaries.empty(1, 2, 130, 2, dtype=torch.float32)
    dq_sums = canaries.empty(1, 2, 130, width, dtype=torch.float32).zero_()
    read, last = (do, None, q, k, v, o, lse), (*[None] * 7, (-(2**30), 0, 2**30), 1.0, 0.0, 0.0, on_hopper.stream())
    assert module.attention_backward(*read, dq, dk, dv, None, None, None, None, *last) == dq_sums.numel()
    for chosen in (None, dk, dv), (dq, None, None):  # for less there are other kernels
        assert module.attention_backward(*read, *chosen, None, None, None, None, *last) == 0
    assert module.attention_backward(*read, dq, dk, dv, None, None, None, None, *last[:-4], 0.0, *last[-3:]) == 0
    floats = [x.float() for x in (do, q, k, v, o)]
    full = (floats[0], None, *floats[1:], lse, *(x.float() for x in (dq, dk, dv)))
    assert module.attention_backward(*full, None, None, None, None, *last) == 0
    assert module.attention_backward(*read, dq, dk, dv, None, None, dq_sums, stats, *last) == "sm90"
    canaries.check()
    assert torch.equal(dq, dq_sums.bfloat16()) and torch.equal(dk, want[1]) and torch.equal(dv, want[2])
    assert_near(dq, want[0].cpu(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad, width", [(5, 128), (200, 64)])
def test_hidden_positions_do_not_count_on_hopper(on_hopper, dtype, value, bad, width, deterministic):
    q, k, v = (draw(1, 1, 260, width, dtype=dtype, seed=i).to(on_hopper.device) for i in range(3))
    o, lse = on_hopper["attention"](q, k, v, *options(1, (100, -1), scale=0.1))
    for t in (k, v):
        t[:, :, bad] = value
    o2, lse2 = on_hopper["attention"](q, k, v, *options(1, (100, -1), scale=0.1))
    seen = torch.zeros(260, dtype=torch.bool)
    seen[bad : bad + 101] = True
    assert_near(o2[:, :, ~seen], o[:, :, ~seen].cpu(), TOLERANCE[dtype])
    assert torch.equal(lse2[:, :, ~seen], lse[:, :, ~seen])
    assert not o2[:, :, seen].isfinite().all(-1).any()
    do = draw(1, 1, 260, width, dtype=dtype, seed=3).to(on_hopper.device)
    backward = (*options(1, (100, -1), scale=0.1, deterministic=deterministic), [True] * 3 + [False] * 3)
    clean = on_hopper["attention_backward"](do, None, q, *(t.nan_to_num(1, 1, 1) for t in (k, v)), o, lse, *backward)
    dq = on_hopper["attention_backward"](do, None, q, k, v, o2, lse2, *backward)[0]
    assert_near(dq[:, :, ~seen], clean[0][:, :, ~seen].cpu(), TOLERANCE[dtype])
    # Nor keys that a query does not see, of which nothing is a number.
    k, v = (t.nan_to_num(1, 1, 1) for t in (k, v))
    q2, do2 = q.clone(), do.clone()
    for t in (q2, do2):
        t[:, :, bad] = value
    o, lse = on_hopper["attention"](q, k, v, *options(1, (100, -1), scale=0.1))
    clean = on_hopper["attention_backward"](do, None, q, k, v, o, lse, *backward)
    o, lse = on_hopper["attention"](q2, k, v, *options(1, (100, -1), scale=0.1))
    _, dk, dv, *_ = on_hopper["attention_backward"](do2, None, q2, k, v, o, lse, *backward)
    hidden = torch.ones(260, dtype=torch.bool)
    hidden[max(bad - 100, 0) : bad + 1] = False
    assert_near(dk[:, :, hidden], clean[1][:, :, hidden].cpu(), TOLERANCE[dtype])
    assert_near(dv[:, :, hidden], clean[2][:, :, hidden].cpu(), TOLERANCE[dtype])
    assert not dv[:, :, ~hidden].isfinite().all(-1).any()


def test_a_family_that_does_not_exist(kernels, monkeypatch):
    monkeypatch.setenv("FASTLM_CUDA_FAMILY", "sm91")
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float16, device=kernels.device)
    with pytest.raises(ValueError, match="FASTLM_CUDA_FAMILY must be sm80 or sm90, got sm91"):
        families(kernels, q, q, q)


def test_what_hopper_kernels_leave_to_the_others(on_hopper):
    q = torch.zeros(1, 2, 20, 64, dtype=torch.float16, device=on_hopper.device)
    assert families(on_hopper, q, q, q) == ("sm90", "sm90")
    wide = torch.zeros(1, 2, 20, 136, dtype=torch.float16, device=on_hopper.device)
    shared = q[:, :1].expand(1, 2, 20, 64)
    misaligned = torch.zeros(1, 2, 20, 65, dtype=torch.float16, device=on_hopper.device)[..., 1:]
    others = [(wide, 1.0, wide), (q, -1.0, q), (q, 1.0, shared), (q, 1.0, misaligned)]
    found = [families(on_hopper, q, k, k, scale) for q, scale, k in others]
    assert found == [("sm80", "sm80")] * 4
    assert families(on_hopper, *[q.float()] * 3) == ("fp32", "fp32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_attention_computes_what_is_wanted(kernels, dtype, wanted):
    q, k, v = (draw(1, 2, 70, 32, dtype=dtype, seed=i).to(kernels.device) for i in range(3))
    o, lse = kernels["attention"](q, k, v, *options(1))
    flags = [False] * 3
    every = kernels["attention_backward"](None, lse, q, k, v, o, lse, *options(1), [True] * 3 + flags)
    some = kernels["attention_backward"](None, lse, q, k, v, o, lse, *options(1), [*wanted, *flags])
    for a, b, want in zip(every, some, wanted, strict=False):
        assert torch.equal(a, b) if want else b.numel() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("width", [64, 100])
def test_attention_hidden_positions_do_not_count(kernels, dtype, value, width):
    """What a row must not see stays out of its results, also where it is no number."""
    length, bad = 100, 70
    q, k, v, do = (draw(1, 1, length, width, dtype=dtype, seed=i).to(kernels.device) for i in range(4))
    backward = (*options(1, scale=0.1), [True] * 3 + [False] * 3)
    o, lse = kernels["attention"](q, k, v, *options(1, scale=0.1))
    clean = kernels["attention_backward"](do, None, q, k, v, o, lse, *backward)
    k2, v2, q2, do2 = k.clone(), v.clone(), q.clone(), do.clone()
    for t in (k2, v2):
        t[:, :, bad] = value
    o2, lse2 = kernels["attention"](q, k2, v2, *options(1, scale=0.1))
    assert_near(o2[:, :, :bad], o[:, :, :bad].cpu(), TOLERANCE[dtype])
    assert torch.equal(lse2[:, :, :bad], lse[:, :, :bad])
    assert not o2[:, :, bad:].isfinite().all(-1).any()
    # Queries before it do not feel it in their gradient.
    dq = kernels["attention_backward"](do, None, q, k2, v2, o2, lse2, *backward)[0]
    assert_near(dq[:, :, :bad], clean[0][:, :, :bad].cpu(), TOLERANCE[dtype])
    # Nor do keys after a query that is no number, nor one whose incoming gradient is none.
    for t in (q2, do2):
        t[:, :, 30] = value
    o2, lse2 = kernels["attention"](q2, k, v, *options(1, scale=0.1))
    _, dk, dv, *_ = kernels["attention_backward"](do2, None, q2, k, v, o2, lse2, *backward)
    assert_near(dk[:, :, 31:], clean[1][:, :, 31:].cpu(), TOLERANCE[dtype])
    assert_near(dv[:, :, 31:], clean[2][:, :, 31:].cpu(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sizes", [(70, 90), (65, 129), (1, 2)], ids=str)
def test_attention_keys_that_no_query_sees(kernels, dtype, value, sizes):
    """Top-left causal with more keys than queries: beside padding of the last tile of queries, they stay out too."""
    q_len, k_len = sizes
    q, do = (draw(1, 1, q_len, 64, dtype=dtype, seed=i).to(kernels.device) for i in (0, 3))
    k, v = (draw(1, 1, k_len, 64, dtype=dtype, seed=i).to(kernels.device) for i in (1, 2))
    for t in (k, v):
        t[:, :, q_len:] = value
    o, lse = kernels["attention"](q, k, v, *options(2, scale=0.1))
    wanted = [True] * 3 + [False] * 3
    dq, dk, dv, *_ = kernels["attention_backward"](do, None, q, k, v, o, lse, *options(2, scale=0.1), wanted)
    assert o.isfinite().all() and lse.isfinite().all() and dq.isfinite().all()
    assert (
        dk.isfinite().all() and dv.isfinite().all() and (dk[:, :, q_len:] == 0).all() and (dv[:, :, q_len:] == 0).all()
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_is_bitwise_repeatable(kernels, dtype):
    case = (1, 4, 2, 130, 150, 64, 64, 1, (-1, -1), "plain")
    first, second = (check_attention(kernels, dtype, case) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_extreme_scores(kernels, dtype):
    q, k, v = (draw(1, 1, 65, 64, dtype=dtype, seed=i) for i in range(3))
    for scale in (20.0, -3.0, 0.0):
        want, lse = exact_attention(q.double(), k.double(), v.double(), 1, (-1, -1), scale)
        got, got_lse = kernels["attention"](*(t.to(kernels.device) for t in (q, k, v)), *options(1, scale=scale))
        assert_near(got, want, TOLERANCE[dtype])
        assert_near(got_lse, lse, 1e-5)


def check_decode(kernels, dtype, case):
    arguments, o, lse = decode_case(case, dtype, kernels.device)
    got_o, got_lse = kernels["attention_decode"](*arguments)
    assert got_o.dtype == dtype and got_lse.dtype == torch.float32
    assert torch.equal(got_lse.cpu() == -math.inf, lse == -math.inf)
    assert_near(got_o, o, TOLERANCE[dtype])
    assert_near(got_lse.cpu().nan_to_num(neginf=0), lse.nan_to_num(neginf=0), 1e-5)
    return got_o, got_lse


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_attention_decode(kernels, dtype, case):
    first, again = (check_decode(kernels, dtype, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", DECODE[::3], ids=str)
def test_attention_decode_without_tensor_cores(kernels, dtype, case, monkeypatch):
    if not kernels.emulated:
        pytest.skip("the device decides")
    monkeypatch.setenv("EMULATED_COMPUTE_CAPABILITY", "75")
    check_decode(kernels, dtype, case)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_decode_unchecked_numbers_lead_nowhere_else(kernels, dtype):
    """Lengths and pages that nobody reads on a GPU before the kernel does: it stays inside the tensors."""
    canaries = Canaries(kernels.device)
    q, o = (canaries.empty(3, 2, 1, 32, dtype=dtype).zero_() for _ in range(2))
    k, v = (canaries.empty(4, 2, 8, 32, dtype=dtype).zero_() for _ in range(2))
    lse = canaries.empty(3, 2, 1, dtype=torch.float32)
    lens = torch.tensor([-5, 10**12, 17], device=kernels.device)
    pages = torch.tensor([[0, 1], [-7, 10**12], [3, 2]], device=kernels.device)
    last = (lens, pages, None, None, (-(2**30), 0, 2**30), 0.1, 0.0, kernels.stream())
    numel = kernels.module.attention_decode(q, k, v, o, lse, None, *last)
    partial = canaries.empty(numel, dtype=torch.float32)
    kernels.module.attention_decode(q, k, v, o, lse, partial, *last)
    canaries.check()
    assert (o == 0).all()


def test_attention_decode_of_nothing(kernels):
    q = torch.zeros(2, 2, 1, 16, device=kernels.device, dtype=torch.float16)
    cache, lens = q.new_empty(2, 2, 0, 16), torch.zeros(2, dtype=torch.int64, device=kernels.device)
    o, lse = kernels["attention_decode"](q, cache, cache, lens, None, None, None, -1, 0, 0.1, 0.0)
    assert (o == 0).all() and (lse == -math.inf).all()
    o, lse = kernels["attention_decode"](q[:0], cache[:0], cache[:0], lens[:0], None, None, None, -1, 0, 0.1, 0.0)
    assert o.shape == (0, 2, 1, 16) and lse.shape == (0, 2, 1)


def test_attention_refusals(kernels):
    q = torch.zeros(1, 1, 4, 16, device=kernels.device)
    assert kernels.refusal("attention", q, q, q, *options()) is None
    assert "float64" in kernels.refusal("attention", *[q.double()] * 3, *options())
    wide = torch.zeros(1, 1, 4, 257, device=kernels.device)
    assert "257" in kernels.refusal("attention", wide, wide, wide, *options())


# --- the memory around outputs ----------------------------------------------------------------------------------------
def bare(stream, bias=None, slopes=None, ends=None):
    """The bindings' last arguments: a causal mask."""
    return (None, bias, slopes, None, None, ends, ends, (-(2**30), 0, 2**30), 0.1, 0.0, 0.0, stream)


class Canaries:
    """Allocates tensors with a margin of sentinels on both sides, and looks whether they live."""

    MARGIN = 64

    def __init__(self, device):
        self.device = device
        self.buffers: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        buffer = torch.full((numel + 2 * self.MARGIN,), SENTINEL, dtype=dtype, device=self.device)
        if dtype.is_floating_point:
            buffer[self.MARGIN : self.MARGIN + numel] = math.nan
        self.buffers.append(buffer)
        return buffer[self.MARGIN : self.MARGIN + numel].view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[: self.MARGIN] == SENTINEL).all() and (buffer[-self.MARGIN :] == SENTINEL).all()
            assert not buffer.isnan().any(), "an element was not written"


def run_steps(module, stream: int, canaries: Canaries, x: Tensor, dy: Tensor) -> None:
    def made(dtype: torch.dtype, *shape: int) -> list[Tensor]:
        t = canaries.empty(*(shape or x.shape), dtype=dtype)
        return [t.fill_(1) if shape else t.copy_(x.abs())]

    step, zero = made(torch.float32, 1), torch.zeros((), device=x.device)
    workspace = canaries.empty(module.step_workspace, dtype=torch.float64).zero_()  # written in part
    for state in {torch.float32, x.dtype, torch.uint8} | ({torch.bfloat16} if x.dtype == torch.float32 else set()):
        p, packed = made(x.dtype), state == torch.uint8
        states, top = [made(state) for _ in range(2)], [] if packed else made(state)
        scales = [made(torch.float32, -(-x.numel() // 256)) if packed else [] for _ in range(2)]
        masters = made(torch.float32) if x.dtype != torch.float32 else []
        for extras in ((0.0, None, [], [], 0.0), (0.1, zero, masters, made(torch.float32), 0.9)):
            given = (0.1, 0.9, 0.99, 1e-6, 0.1, True, not packed, False, None, False, None, extras[1] is None, 0)
            module.adam_step(p, [dy], *states, top, step, *given, *extras, *scales, workspace, stream)
            if packed:
                continue
            l1, *extras = extras
            given = (0.0, 0.1, l1, False, False, None, None, *extras, False, 0)
            module.sgd_step(p, [dy], states[0], step, 0.1, 0.9, *given, workspace, stream)
            module.sgd_step(p, [dy], [], [], 0.1, 0.0, *given, None, stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 40, 64, 111, 128, 250])
def test_outputs_are_written_wholly_and_alone(kernels, dtype, width):
    module, stream = kernels.module, kernels.stream()
    canaries = Canaries(kernels.device)
    rows = 67
    x, dy = (draw(rows, width, dtype=dtype, seed=i).to(kernels.device) for i in range(2))
    bias = draw(width, dtype=dtype).to(kernels.device)
    wide = torch.cat([x, dy], -1)
    for act in range(len(module.acts)):
        y, dx = canaries.empty(rows, width, dtype=dtype), canaries.empty(rows, width, dtype=dtype)
        module.act_forward(x, y, act, stream)
        module.act_backward(dy, x, dx, act, stream)
        y, dx = canaries.empty(rows, width, dtype=dtype), canaries.empty(rows, width, dtype=dtype)
        sums = canaries.empty(width, dtype=torch.float32)
        partial = canaries.empty(module.bias_act_chunks(rows), width, dtype=torch.float32)
        module.bias_act_forward(x, bias, y, act, stream)
        module.bias_act_backward(dy, x, bias, dx, sums, partial, act, stream)
        for gate, up in ((x, dy), wide.chunk(2, -1)):
            y, dgate, dup = (canaries.empty(rows, width, dtype=dtype) for _ in range(3))
            module.glu_forward(gate, up, y, act, stream)
            module.glu_backward(dy, gate, up, dgate, dup, act, stream)
    module.dropout(x, canaries.empty(rows, width, dtype=dtype), 0.5, torch.tensor(1, device=kernels.device), stream)
    total = canaries.empty(dtype=torch.float32)
    module.mse_loss_forward(
        x, dy, total, canaries.empty(module.mse_loss_chunks(x.numel()), dtype=torch.float32), stream
    )
    module.mse_loss_backward(total, x, dy, canaries.empty(rows, width, dtype=dtype), stream)
    partial = canaries.empty(module.grad_norm_chunks([x, bias]), dtype=torch.float64)
    module.grad_norm([x, bias], canaries.empty(dtype=torch.float32), partial, stream)
    run_steps(module, stream, canaries, x, dy)
    q, k, v = (draw(1, 2, rows, width, dtype=dtype, seed=i).to(kernels.device) for i in range(3))
    o, dq, dk, dv = (canaries.empty(1, 2, rows, width, dtype=dtype) for _ in range(4))
    lse = canaries.empty(1, 2, rows, dtype=torch.float32)
    stats = canaries.empty(1, 2, rows, 2, dtype=torch.float32)
    dbias = canaries.empty(1, 2, rows, rows, dtype=torch.float32).zero_()
    dslopes = canaries.empty(1, 2, rows, dtype=torch.float32).zero_()
    slopes, scores = draw(1, 2).to(kernels.device), draw(1, 2, rows, rows).to(kernels.device)
    module.attention_forward(q, k, v, o, lse, *bare(stream))
    module.attention_backward(q, None, q, k, v, o, lse, dq, dk, dv, None, None, None, stats, *bare(stream))
    canaries.check()
    for t in (o, dq, dk, dv, lse, stats, dslopes):
        t.fill_(math.nan)
    with_terms = bare(stream, bias=scores, slopes=slopes)
    module.attention_forward(q, k, v, o, lse, *with_terms)
    module.attention_backward(q, None, q, k, v, o, lse, dq, dk, dv, dbias, dslopes, None, stats, *with_terms)
    canaries.check()


def test_what_the_sanitizer_watches_runs_emulated(monkeypatch):
    from sanitize import run_every_kernel, run_hoppers_kernels

    kernels = Kernels("emulated")
    run_every_kernel(kernels)
    monkeypatch.setenv("EMULATED_COMPUTE_CAPABILITY", "90")
    run_hoppers_kernels(kernels)


# --- far elements -----------------------------------------------------------------------------------------------------
def far_calls(kernels, cols: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Of kernels that do each row by itself: x, y and positions (rows, cols / 2) -> (rows, ...)."""
    draw_bias = draw(cols, dtype=torch.bfloat16).to(kernels.device)
    weight, seen = draw(cols).to(kernels.device), (None, -100, 0.1, 0.0)

    def targets(x: Tensor) -> Tensor:
        return torch.full((len(x),), cols - 1, device=x.device)

    def adam(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        lists = [x.clone()], [y], [y.clone()], [x.square()], [], [torch.tensor(1.0, device=x.device)]
        kernels["adam_"](*lists, 0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False, *NOTHING_MORE)
        return lists[0][0]

    def adam_8bit(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        """States of one size: it does not matter where blocks begin. The second step reads what the first wrote."""
        params, codes = [x.clone()], [[torch.zeros_like(x, dtype=torch.uint8)] for _ in range(2)]
        scales = [[torch.zeros(-(-x.numel() // 256), device=x.device)] for _ in range(2)]
        lists = params, [y.sign()], *codes, [], [torch.tensor(0.0, device=x.device)]
        for _ in range(2):
            kernels["adam_"](*lists, 0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False, *NOTHING_MORE[:-2], *scales)
        return params[0]

    def sgd(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        lists = [x.clone()], [y], [y.clone()], [torch.tensor(1.0, device=x.device)]
        kernels["sgd_"](*lists, 0.1, 0.9, 0.0, 0.1, 0.0, True, False, None, None, None, [], [], 0.0, False, 0)
        return lists[0][0]

    def entropy_backward(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        lse = kernels["cross_entropy"](x, targets(x), *seen)[1]
        return kernels["cross_entropy_backward"](torch.ones_like(lse), None, x, targets(x), None, lse, *seen[1:])

    return {
        "silu": lambda x, y, at: kernels["silu"](x),
        "silu_backward": lambda x, y, at: kernels["silu_backward"](y, x),
        "glu": lambda x, y, at: kernels["glu"](x, y, "silu"),
        "glu_backward": lambda x, y, at: kernels["glu_backward"](x, y, x, "gelu")[1],
        "bias_act": lambda x, y, at: kernels["bias_act"](x, draw_bias, "gelu", 0.0, None),
        "layer_norm": lambda x, y, at: kernels["layer_norm"](x, weight, weight, 1e-5),
        "add_rms_norm": lambda x, y, at: kernels["add_rms_norm"](x, y, weight, 1e-5)[1],
        "norm_backward": lambda x, y, at: kernels["norm_backward"](y, None, x, weight, 1e-5, True, [False] * 2)[0],
        "rope": lambda x, y, at: kernels["rope"](x[None, :, None], at.cos()[None], at.sin()[None], False)[0],
        "cross_entropy": lambda x, y, at: kernels["cross_entropy"](x, targets(x), *seen)[0],
        "cross_entropy_backward": entropy_backward,
        "adam_": adam,
        "adam_ in 8 bits": adam_8bit,
        "sgd_": sgd,
        "mse_loss_backward": lambda x, y, at: kernels["mse_loss_backward"](weight[0], x, y),
    }


FAR = (
    "silu", "silu_backward", "glu", "glu_backward", "bias_act", "layer_norm", "add_rms_norm", "norm_backward", "rope",
    "cross_entropy", "cross_entropy_backward", "adam_", "adam_ in 8 bits", "sgd_", "mse_loss_backward",
)  # fmt: skip


def check_last_rows(kernels, name: str, rows: int, cols: int) -> None:
    """The last rows of many are as those rows alone."""
    generator = torch.Generator(kernels.device).manual_seed(0)
    x, y = (torch.randn(rows, cols, dtype=torch.bfloat16, device=kernels.device, generator=generator) for _ in range(2))
    at = torch.arange(rows, device=kernels.device)[:, None] + torch.linspace(0, 1, cols // 2, device=kernels.device)
    call = far_calls(kernels, cols)[name]
    want = call(*(t[-5:].clone() for t in (x, y, at)))
    assert torch.equal(call(x, y, at)[-5:], want)


@pytest.mark.parametrize("name", FAR)
def test_last_rows_are_as_alone(kernels, name):
    check_last_rows(kernels, name, 300, 72)


@pytest.mark.parametrize("name", FAR)
def test_last_rows_are_as_alone_in_triton(name):
    check_last_rows(TritonKernels(), name, 300, 72)


def check_far_sums(kernels, rows: int, cols: int) -> None:
    """What is not row by row: sums of ones, dropout's share, the rows of a table."""
    ones = torch.ones(rows, cols, dtype=torch.bfloat16, device=kernels.device)
    numel = ones.numel()
    assert kernels["grad_norm"]([ones]).item() == pytest.approx(numel**0.5, rel=1e-6)
    assert kernels["mse_loss"](ones, torch.zeros_like(ones)).item() == pytest.approx(numel, rel=1e-6)
    last = kernels["dropout"](ones, 0.5, torch.tensor(3, device=kernels.device))[-16:]
    assert set(last.unique().tolist()) == {0.0, 2.0} and 0.3 < (last == 0).float().mean() < 0.7
    del last
    if isinstance(kernels, TritonKernels):  # which have no embedding
        return
    index = torch.tensor([rows - 1, 0, rows - 1], device=kernels.device)
    ones[-1] = 7
    assert kernels["embedding"](ones, index, -1)[:, -1].tolist() == [7, 1, 7]
    dweight = kernels["embedding_backward"](ones[-3:], index, rows, -1)
    assert dweight[[0, 1, -2, -1], -1].tolist() == [1, 0, 0, 8]


def test_far_sums(kernels):
    check_far_sums(kernels, 300, 72)


def test_far_sums_in_triton():
    check_far_sums(TritonKernels(), 300, 72)


# --- the check at first use -------------------------------------------------------------------------------------------
OPS = [n for n, op in _library._ops.items() if op.family in FAMILIES]


@pytest.mark.parametrize("name", OPS)
def test_self_check_tells_a_kernel_from_a_broken_one(kernels, name):
    op, kernel = _library._ops[name], kernels.kernels[name]
    assert op.mismatch(kernel, kernels.device.type) is None

    def broken(*args):
        out = kernel.run(*args)
        for t in _library._tensors([out, [args[i] for i in op.mutated]]):
            if t.is_floating_point():
                t.mul_(0.9)
        return out

    assert "off by" in op.mismatch(kernel._replace(run=broken), kernels.device.type)


# --- bad arguments ----------------------------------------------------------------------------------------------------
def test_bindings_refuse_what_they_cannot_do(kernels):
    module, stream = kernels.module, kernels.stream()
    x = torch.zeros(4, 6, device=kernels.device)
    relu = module.acts.index("relu")
    with pytest.raises(ValueError, match="act_forward: tensors must share dtype, sizes and strides"):
        module.act_forward(x, x.double(), relu, stream)
    with pytest.raises(ValueError, match="act_forward: tensors must be dense"):
        module.act_forward(x[:, ::2], x[:, ::2], relu, stream)
    for act in (-1, len(module.acts)):
        with pytest.raises(ValueError, match=f"act_forward: act must be an index into acts, got {act}"):
            module.act_forward(x, x, act, stream)
    with pytest.raises(ValueError, match="bias_act: bias must be contiguous"):
        module.bias_act_forward(x, x[0, :3], x, relu, stream)
    with pytest.raises(ValueError, match="glu: up must be a float32 matrix of the size of the others"):
        module.glu_forward(x, x[:, :5], x, relu, stream)
    with pytest.raises(ValueError, match=r"glu: gate must be .* with contiguous rows"):
        module.glu_forward(x.mT.contiguous().mT, x, x, relu, stream)
    with pytest.raises(ValueError, match="dropout: seed must be 1 contiguous int64"):
        module.dropout(x, x, 0.5, torch.zeros(2, dtype=torch.int64, device=kernels.device), stream)
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\), got 1"):
        module.dropout(x, x, 1.0, torch.zeros(1, dtype=torch.int64, device=kernels.device), stream)
    index, none = torch.zeros(4, dtype=torch.int64, device=kernels.device), x[:0]
    with pytest.raises(ValueError, match="embedding: index must be 4 contiguous int64"):
        module.embedding_forward(x, index[:3], x, stream)
    with pytest.raises(ValueError, match=r"embedding: y must be float32 \(n, 6\)"):
        module.embedding_forward(x, index, x.half(), stream)
    with pytest.raises(ValueError, match=r"embedding_backward: dweight must be float32 \(V, 6\)"):
        module.embedding_backward(x, index, index, x[:, :5].contiguous(), x[:2], -1, stream)
    with pytest.raises(ValueError, match="embedding_backward: partial must be 12 contiguous elements"):
        module.embedding_backward(x, index, index, x, none, -1, stream)
    with pytest.raises(ValueError, match="norm: residual and sum go together"):
        module.norm_forward(x, x, None, None, x, None, 1e-5, True, stream)
    with pytest.raises(ValueError, match="norm_backward: partial must be 12 contiguous elements"):
        module.norm_backward(x, None, x, None, x, x[0], x[1], x[:1], 1e-5, True, stream)
    q, lse = torch.zeros(1, 3, 4, 8, device=kernels.device), torch.zeros(1, 3, 4, device=kernels.device)
    with pytest.raises(ValueError, match="heads of q must be a multiple of those of k, got 3 and 2"):
        module.attention_forward(q, q[:, :2], q[:, :2], q, lse, *bare(stream))
    with pytest.raises(ValueError, match=r"attention: v must be float32 \(1, 3, 4, 8\)"):
        module.attention_forward(q, q, q[:, :, :2], q, lse, *bare(stream))
    with pytest.raises(ValueError, match="attention: lse must be contiguous float32"):
        module.attention_forward(q, q, q, q, lse.half(), *bare(stream))
    steps, more = [torch.tensor(0.0)], (None, False, None, False, 0, *NO_EXTRAS, None)
    with pytest.raises(ValueError, match=r"grads\[0\] must have dtype float32 and the sizes of params\[0\]"):
        module.adam_step([x], [x[:2]], [x], [x], [], steps, 1, 0.9, 0.9, 1e-8, 0, True, False, False, *more, stream)
    with pytest.raises(ValueError, match=r"params\[0\] is written, so no two of its elements"):
        e = x[:1].expand(4, 6)
        module.adam_step([e], [x], [x], [x], [], steps, 1, 0.9, 0.9, 1e-8, 0, True, False, False, *more, stream)
    plain, room = (1, 0.9, 0.9, 1e-8, 0, True, False, False), torch.empty(4, dtype=torch.float64, device=x.device)
    views = ([x], [x.clone()], [x.clone()], [x.clone()], [], [steps[0].to(x.device)])
    zero, packed = x[0, :1], [torch.zeros_like(x, dtype=torch.uint8) for _ in range(2)]
    for wrong, message in (
        ((x[0, :2], False, None, False, 0, *NO_EXTRAS, None), "scale must be one float32 or float64"),
        ((None, False, zero, False, 0, *NO_EXTRAS, None), "lr and found_inf can be on the device only where the steps"),
        ((None, False, None, False, 0, 0.0, zero, *NO_EXTRAS[2:], None), "lr and found_inf can be on the device only"),
        ((None, False, None, False, 0, *NO_EXTRAS, room[:3]), "workspace must be 4 float64 per parameter"),
        ((None, False, None, False, 0, 0.0, None, [x.clone()], *NO_EXTRAS[3:], None), "masters are for 16-bit"),
        (
            (None, False, None, False, 0, 0.0, None, [], [x.double()], *NO_EXTRAS[4:], None),
            r"emas\[0\] must have dtype",
        ),
    ):
        with pytest.raises(ValueError, match=f"adam_: {message}"):
            module.adam_step(*views, *plain, *wrong, stream)
    with pytest.raises(ValueError, match="adam_: scales of exp_avgs must hold 1 tensors, got 0"):
        module.adam_step(*views[:2], *([t] for t in packed), *views[4:], *plain, *more, stream)
    with pytest.raises(ValueError, match="sgd_: momentum_buffers must hold 1 tensors, got 0"):
        module.sgd_step(*views[:2], [], [], 0.1, 0.9, 0.0, 0.0, 0.0, False, False, *more[:1], None, None, [], [], 0.0,
                        False, 0, None, stream)  # fmt: skip
    with pytest.raises(ValueError, match="sgd_: workspace must be 4 float64 per parameter that counts its steps"):
        module.sgd_step(*views[:2], [], [], 0.1, 0.0, 0.0, 0.0, 0.0, False, False, *more[:1], None, None, [], [], 0.0,
                        False, 0, room, stream)  # fmt: skip
    with pytest.raises(ValueError, match="partial must be 1 contiguous float64"):
        module.grad_norm([x], room[0].float(), room, stream)
    assert steps[0] == 0
