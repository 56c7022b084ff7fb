"""The Triton norm kernels against their references in float64."""

import itertools

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
)

import fastlm
from fastlm.kernels.triton import norm as kernels

EPS = 1e-5
# Short rows, several to a tile; a tile's size and one off it; more rows than the backward has programs.
SHAPES = [(0, 5), (5, 0), (1,), (3, 1), (2, 3, 63), (9, 64), (7, 65), (3, 1024), (2, 1500), (1100, 3)]
DTYPES = [torch.float32, *HALVES]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter


def drawn(shape, dtype, count):
    return [3 * (i == 0) + randn(*shape, dtype=torch.float32).to(dtype) for i in range(count)]


def parameters(n, dtype=torch.float32):
    return (1 + 0.3 * randn(n)).to(dtype), randn(n, dtype=dtype)


def check_all(shape, dtype):
    """Every op and every choice of what may be left out."""
    x, residual, dy, dsum = drawn(shape, dtype, 4)
    weight, bias = parameters(shape[-1], dtype)
    for w, b in ((weight, bias), (None, None)):
        assert_exact(kernels.layer_norm, "layer_norm", x, w, b, EPS)
        assert_exact(kernels.rms_norm, "rms_norm", x, w, EPS)
    assert_exact(kernels.add_layer_norm, "add_layer_norm", x, residual, weight, bias, EPS)
    assert_exact(kernels.add_rms_norm, "add_rms_norm", x, residual, weight, EPS)
    for centred, ds, w in ((True, dsum, weight), (False, None, weight), (True, None, None), (False, dsum, None)):
        wanted = [w is not None, centred]
        assert_exact(kernels.norm_backward, "norm_backward", dy, ds, x, w, EPS, centred, wanted, ulps=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    check_all(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_too_long_to_be_kept(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "_KEPT_FORWARD", 100)
    monkeypatch.setattr(kernels, "_KEPT_BACKWARD", 100)
    monkeypatch.setattr(kernels, "_LONG", 128)
    monkeypatch.setattr(kernels, "_ROWS", 16)
    for shape in ((0, 300), (3, 101), (18, 130)):
        check_all(shape, dtype)


def test_every_configuration():
    x, dy = randn(5, 70), randn(5, 70)
    weight, bias = parameters(70)
    for configuration in kernels.configurations(70):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "pick", lambda key, candidates, run, device, c=configuration: c)
            assert_exact(kernels.layer_norm, "layer_norm", x, weight, bias, EPS)
            assert_exact(kernels.norm_backward, "norm_backward", dy, None, x, weight, EPS, True, [True, True])
    for D in (1, 2, 64, 767, 1024, 5000, 8192, 16384):
        for c in kernels.configurations(D):
            assert c["BD"] >= D and 1 <= c["num_warps"] <= 16 and c["BT"] * c["BD"] <= 32 * 32 * c["num_warps"]


def test_float32_weights_beside_float16():
    x, dy = drawn((6, 40), torch.float16, 2)
    weight, bias = parameters(40)
    assert_exact(kernels.layer_norm, "layer_norm", x, weight, bias, EPS)
    dx, dweight, dbias = kernels.norm_backward(dy, None, x, weight, EPS, True, [True, True])
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (torch.float16, torch.float32, torch.float32)


def test_what_is_normalised_is_the_sum_that_is_returned(monkeypatch):
    """As it is rounded: what the gradient takes, too."""
    x, residual = drawn((3, 150), torch.float16, 2)
    for longest in (kernels._KEPT_FORWARD, 100):
        monkeypatch.setattr(kernels, "_KEPT_FORWARD", longest)
        y, s = kernels.add_rms_norm(x, residual, None, EPS)
        assert torch.equal(s, x + residual) and torch.equal(y, kernels.rms_norm(s, None, EPS))


def test_layouts():
    weight, bias = parameters(66)
    x, residual, dy = (
        randn(9, 70, 4)[:, :66].transpose(1, 2),
        randn(66, 4, 9).permute(2, 1, 0),
        randn(9, 4, 132)[..., ::2],
    )
    dense = [t.contiguous() for t in (x, residual, weight, bias)]
    found = kernels.add_layer_norm(x, residual, weight, bias, EPS)
    assert all(t.is_contiguous() for t in found)
    assert all(map(torch.equal, found, kernels.add_layer_norm(*dense, EPS)))
    for g in (dy, torch.ones((), device=DEVICE).expand(x.shape)):
        found = kernels.norm_backward(g, dy, x, weight, EPS, True, [True, True])
        wanted = kernels.norm_backward(g.contiguous(), dy.contiguous(), dense[0], weight, EPS, True, [True, True])
        assert found[0].is_contiguous()
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    x, weight, bias = randn(9, 40), *parameters(40)
    x[3, 7] = value
    for centred in (True, False):
        y = kernels.layer_norm(x, weight, bias, EPS) if centred else kernels.rms_norm(x, weight, EPS)
        dx, *_ = kernels.norm_backward(randn(9, 40), None, x, weight, EPS, centred, [True, True])
        for t in (y, dx):
            assert t.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_without_eps_rows_that_are_not_there_give_nothing():
    """Of 0 / sqrt(0): a tile of short rows is not full, nor is a program's last."""
    x, dy = randn(3, 40), randn(3, 40)
    assert_exact(kernels.norm_backward, "norm_backward", dy, None, x, None, 0.0, True, [True, True])


def test_sums_over_many_rows():
    x, dy = randn(3000, 2), torch.full((3000, 2), 0.1, device=DEVICE)
    _, dweight, dbias = kernels.norm_backward(dy, None, x, None, EPS, False, [True, True])
    assert_close(dbias, dy.double().sum(0), ulps=4)
    unit = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    assert_close(dweight, (dy.double() * unit).sum(0), ulps=16)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_the_ops_run_on_these_kernels(kind, residual):
    """Through autograd, with what the ops save; each output alone and both."""
    tensors = [*drawn((4, 3, 33), torch.float32, 1 + residual), *parameters(33)[: 2 if kind == "layer_norm" else 1]]
    for used in itertools.product([False, True], repeat=2) if residual else [(True,)]:
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
            x, *more = leaves
            added = {"residual": more.pop(0)} if residual else {}
            with fastlm.use_backend(backend):
                out = getattr(fastlm, kind)(x, (33,), *more, eps=EPS, **added)
            out = out if residual else (out,)
            chosen = [y.sin().sum() for y, u in zip(out, used, strict=True) if u]
            if chosen:
                sum(chosen).backward()
            results.append([*(y.detach() for y in out), *(t.grad for t in leaves)])
        for got, want in zip(*results, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                assert_close(got, want, ulps=16)


def test_what_it_refuses():
    with fastlm.use_backend("triton"), pytest.raises(NotImplementedError, match="triton does not take"):
        fastlm.layer_norm(randn(2, 3, dtype=torch.float64), 3)


def test_self_checks():
    assert_self_checks("norm")


def test_compiles_for_gpus():
    """The defaults, at widths of language models."""
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import norm as kernels
for dtype, widths in ((torch.bfloat16, (128, 768, 4096, 8192, 32768)), (torch.float32, (768, 4096, 16384))):
    for D in widths:
        x, weight = torch.empty(4096, D, dtype=dtype), torch.empty(D)
        kernels.add_layer_norm(x, x, weight, weight, 1e-5)
        kernels.norm_backward(x, x, x, weight, 1e-5, True, [True, True])
""")
    kernels_of = {c["kernel"] for c in compiled}
    assert kernels_of == {
        "norm_fwd_kernel", "norm_fwd_long_kernel", "norm_bwd_kernel", "norm_bwd_long_kernel", "norm_sums_kernel"
    }  # fmt: skip
    assert_lean(compiled)
    for c in compiled:
        assert c["registers"] * 32 * c["constants"].get("num_warps", 4) <= 65536  # of a multiprocessor
