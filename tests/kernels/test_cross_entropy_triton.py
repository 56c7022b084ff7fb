"""The Triton cross-entropy kernels against their references in float64."""

import math

import pytest
import torch
from triton_testing import (
    DEVICE,
    HALVES,
    assert_close,
    assert_exact,
    assert_lean,
    assert_self_checks,
    compile_for_gpu,
    randn,
    reference,
)

import fastlm
from fastlm.kernels import linear_cross_entropy
from fastlm.kernels.triton import cross_entropy as kernels

DTYPES = [torch.float32, *HALVES]
# Rows that begin at every place within 16 elements, of one tile and of two.
SHAPES = [(0, 5), (1, 1), (3, 2), (17, 63), (5, 64), (3, 513), (2, 1024)]
# (label_smoothing, softcap)
OPTIONS = [(0.0, 0.0), (0.1, 0.0), (1.0, 0.0), (0.0, 2.0), (0.2, 30.0)]
IGNORED = -100
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter


def drawn(R, C, dtype):
    """Logits, classes of which one is ignored, gradients of loss and log-sum-exp."""
    x, target = 3 * randn(R, C, dtype=dtype), torch.randint(0, C, (R,), device=DEVICE)
    if R > 2:
        target[1] = IGNORED
    return x, target, randn(R), randn(R)


def check_all(R, C, dtype, smoothing, softcap):
    x, target, g, dlse = drawn(R, C, dtype)
    options = (IGNORED, smoothing, softcap)
    assert_exact(kernels.cross_entropy, "cross_entropy", x, target, None, *options)
    lse = kernels.cross_entropy(x, target, None, *options)[1]
    # In float32 a probability is taken from 1: ulps of float32, at what is multiplied by the difference.
    ulp = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for more in (None, dlse):
        terms = (g.abs() + dlse.abs())[:, None].expand(R, C).double() * ulp
        assert_exact(
            kernels.cross_entropy_backward, "cross_entropy_backward", g, more, x, target, None, lse, *options,
            cancelled=terms,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("smoothing", "softcap"), OPTIONS)
def test_values_and_gradients(smoothing, softcap, dtype):
    for R, C in SHAPES:
        check_all(R, C, dtype, smoothing, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_many_tiles(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "_SHORT", 32)
    monkeypatch.setattr(kernels, "_TILES", {way: [{"BC": 64, "num_warps": 4}] for way in ("fwd", "bwd")})
    for R, C in ((5, 63), (2, 64), (3, 65), (2, 128), (3, 129), (3, 300)):
        check_all(R, C, dtype, 0.1, 2.0)
    check_all(3, 300, dtype, 0.0, 0.0)


def test_every_configuration_of_long_rows():
    for i in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "pick", lambda key, candidates, run, device, i=i: candidates[i])
            check_all(2, 9001, torch.float32, 0.1, 0.0)


def test_what_is_at_the_ends_of_memory_is_not_touched():
    """Tiles begin before a row and end after it."""
    R, C = 5, 37
    x, target, g, _ = drawn(R, C, torch.float32)
    padded = torch.full((R * C + 64,), math.nan, device=DEVICE)
    padded[32 : 32 + R * C] = x.flatten()
    inner = padded[32 : 32 + R * C].view(R, C)
    want = kernels.cross_entropy(x, target, None, IGNORED, 0.1, 0.0)
    assert all(map(torch.equal, kernels.cross_entropy(inner, target, None, IGNORED, 0.1, 0.0), want))
    dx = kernels.cross_entropy_backward(g, None, inner, target, None, want[1], IGNORED, 0.1, 0.0)
    assert torch.equal(dx, kernels.cross_entropy_backward(g, None, x, target, None, want[1], IGNORED, 0.1, 0.0))


def test_an_ignored_row_may_hold_anything():
    x, target, g, dlse = drawn(4, 70, torch.float32)
    x[1, ::3], x[1, 1::3] = math.nan, math.inf
    loss, lse = kernels.cross_entropy(x, target, None, IGNORED, 0.1, 2.0)
    assert loss[1] == lse[1] == 0
    dx = kernels.cross_entropy_backward(g, dlse, x, target, None, lse, IGNORED, 0.1, 2.0)
    assert (dx[1] == 0).all() and dx.isfinite().all()
    # A class may be the one that is ignored.
    loss, _ = kernels.cross_entropy(randn(3, 5), torch.tensor([4, 0, 4], device=DEVICE), None, 4, 0.0, 0.0)
    assert (loss == 0).tolist() == [True, False, True]


@pytest.mark.parametrize("wrong", [-1, 70, 2**40])
def test_a_target_that_is_no_class_gives_nan(wrong):
    x, target, g, _ = drawn(4, 70, torch.float32)
    target[2] = wrong
    loss, lse = kernels.cross_entropy(x, target, None, IGNORED, 0.0, 0.0)
    assert loss.isnan().tolist() == [False, False, True, False] and lse.isfinite().all()
    dx = kernels.cross_entropy_backward(g, None, x, target, None, lse, IGNORED, 0.0, 0.0)
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == [False, False, True, False]


def test_special_values():
    target = torch.tensor([0, 1, 0, 1, 2, 0], device=DEVICE)
    x = torch.zeros(6, 70, device=DEVICE)
    x[0, 5], x[1, 5], x[2, 5], x[3] = math.nan, math.inf, -math.inf, -math.inf
    x[4], x[5] = 3e38, -3e38
    for smoothing in (0.0, 0.1):
        loss, lse = kernels.cross_entropy(x, target, None, IGNORED, smoothing, 0.0)
        wanted = reference("cross_entropy", x.double(), target, None, IGNORED, smoothing, 0.0)
        for got, want in zip((loss, lse), wanted, strict=True):
            torch.testing.assert_close(got[:4], want.float()[:4], equal_nan=True)
    loss, _ = kernels.cross_entropy(x[4:], target[4:], None, IGNORED, 0.0, 0.0)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(70)))


def test_layouts():
    x, target = randn(70, 6).t(), torch.arange(12, device=DEVICE)[::2]
    found = kernels.cross_entropy(x, target, None, IGNORED, 0.1, 0.0)
    assert all(map(torch.equal, found, kernels.cross_entropy(x.contiguous(), target.clone(), None, IGNORED, 0.1, 0.0)))
    one = torch.ones((), device=DEVICE)
    for g in (one.expand(6), randn(12)[::2]):
        dx = kernels.cross_entropy_backward(g, g, x, target, None, found[1], IGNORED, 0.1, 0.0)
        dense = [t.contiguous() for t in (g, g, x, target)]
        assert dx.is_contiguous()
        assert torch.equal(dx, kernels.cross_entropy_backward(*dense, None, found[1], IGNORED, 0.1, 0.0))


@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 1e-2, "softcap": 3.0, "label_smoothing": 0.1}, {"reduction": "sum"}]
)
def test_the_op_runs_on_these_kernels(options):
    x, target, *_ = drawn(5, 63, torch.float32)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with fastlm.use_backend(backend):
            loss = fastlm.cross_entropy(leaf, target, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, ulps=8)


@pytest.mark.parametrize("options", [(IGNORED, 0.0, 0.0, 0.0, True), (IGNORED, 0.1, 0.01, 2.0, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(monkeypatch, bias, options):
    """Its logits 128 rows at a time: the gradients overwrite them, so no tile is tried twice."""
    monkeypatch.setattr(linear_cross_entropy, "_MOST_BYTES", 1)
    monkeypatch.setattr(
        kernels, "pick", lambda key, candidates, *_: candidates[0] if "fwd" in key[0] else pytest.fail()
    )
    x, weight, offset = randn(300, 24), randn(70, 24), randn(70) if bias else None
    target = torch.randint(0, 70, (300,), device=DEVICE)
    target[::7] = IGNORED
    args = (x, weight, offset, target, *options, [True, True, bias])
    assert kernels._unsupported_linear(*args) is None
    assert_exact(kernels.linear_cross_entropy, "linear_cross_entropy", *args)
    none = kernels.linear_cross_entropy(*args[:-1], [False] * 3)
    assert torch.equal(none[0], kernels.linear_cross_entropy(*args)[0]) and all(g.numel() == 0 for g in none[1:])


def test_what_it_refuses():
    x, target = randn(3, 5), torch.tensor([0, 1, 2], device=DEVICE)
    refused = {
        "does not take torch.float64": (x.double(), target),
        "does not do probabilities as targets": (x, x.softmax(1)),
        "does not do class weights with label smoothing": (
            x, target, torch.ones(5, device=DEVICE), None, -100, None, "mean", 0.1
        ),
    }  # fmt: skip
    for sentence, args in refused.items():
        with fastlm.use_backend("triton"), pytest.raises(NotImplementedError, match=f"triton {sentence}"):
            fastlm.cross_entropy(*args)
    wide = torch.empty(1, device=DEVICE).expand(1, 2**30 + 1)
    assert kernels._unsupported(wide, target, None) == "takes at most 1073741824 classes, not 1073741825"


def test_self_checks():
    assert_self_checks("cross_entropy")


def test_compiles_for_gpus():
    """Rows of few classes, of a number that Triton knows to be a multiple of 16, and of an odd one."""
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import cross_entropy as kernels
target, rows = torch.empty(64, dtype=torch.int64), torch.empty(64)
for C, dtype, smoothing, softcap in (
    (1024, torch.bfloat16, 0.0, 0.0), (50304, torch.bfloat16, 0.0, 0.0), (50257, torch.bfloat16, 0.0, 0.0),
    (50257, torch.bfloat16, 0.1, 30.0), (50257, torch.float32, 0.1, 30.0),
):
    x = torch.empty(64, C, dtype=dtype)
    kernels.cross_entropy(x, target, None, -100, smoothing, softcap)
    kernels.cross_entropy_backward(rows, rows, x, target, None, rows, -100, smoothing, softcap)
""")
    assert len(compiled) == 2 * 2 * 5
    assert_lean(compiled)
    for c in compiled:
        if c["kernel"] == "cross_entropy_bwd_kernel":
            assert ".v4.b32 [" in c["ptx"].split("st.global", 1)[1], c["constants"]  # whole vectors are stored too
