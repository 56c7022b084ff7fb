"""The Triton rope kernel against the reference in float64."""

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
from fastlm.kernels.triton import rope as kernels

# (N, T, H, D), and R: all of a row and a part of it, an odd half, more columns than a program's, empty ones.
SHAPES = [
    ((2, 5, 3, 8), 8), ((2, 7, 3, 10), 6), ((1, 1, 1, 2), 2), ((3, 20, 12, 64), 64), ((1, 70, 5, 40), 32),
    ((1, 3, 2, 700), 600), ((0, 5, 3, 8), 8), ((2, 0, 3, 8), 4), ((2, 5, 0, 8), 8),
]  # fmt: skip


def tables(N, T, R):
    angle = 3 * randn(N, T, R // 2)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_values(dtype, interleaved):
    for shape, R in SHAPES:
        x = randn(*shape, dtype=dtype)
        for N in {1, shape[0]} - {0}:  # tables of all sequences, or of each
            cos, sin = tables(N, shape[1], R)
            assert_exact(kernels.rope, "rope", x, cos, sin, interleaved)
        for table in (torch.float16, torch.float64):
            if table != dtype:
                y = kernels.rope(x, cos.to(table), sin.to(table), interleaved)
                want = reference("rope", x, cos.to(table), sin.to(table), interleaved)
                torch.testing.assert_close(y, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(interleaved):
    cos, sin = tables(1, 6, 8)
    x = randn(2, 6, 3, 20)
    transposed = randn(2, 3, 6, 20).transpose(1, 2)
    wide = randn(2, 6, 3, 3, 20)
    for t in (
        transposed,
        wide[:, :, 1],
        x[..., :10],
        x[..., ::2],
        x[:, :, :1].expand(2, 6, 5, 20),
        x.permute(3, 1, 2, 0),
    ):
        c, s = (cos, sin) if t.shape[-1] >= 8 else (cos[..., :1], sin[..., :1])
        y = kernels.rope(t, c, s, interleaved)
        assert y.is_contiguous()
        assert torch.equal(y, kernels.rope(t.contiguous(), c, s, interleaved))
    c, s = (t.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2] for t in (cos, sin))
    assert torch.equal(kernels.rope(x, c, s, interleaved), kernels.rope(x, c.contiguous(), s.contiguous(), interleaved))


def test_what_is_not_turned_is_copied():
    x, (cos, sin) = randn(1, 4, 2, 30), tables(1, 4, 8)
    x[..., 20] = float("nan")
    y = kernels.rope(x, cos, sin, False)
    torch.testing.assert_close(y[..., 8:], x[..., 8:], rtol=0, atol=0, equal_nan=True)
    assert y[..., :8].isfinite().all()


def test_tables_of_another_size_are_refused():
    x, (cos, sin) = randn(2, 5, 3, 8), tables(1, 4, 8)
    for c, s in ((cos, sin), (cos, sin[..., :2]), (tables(3, 5, 8)), (tables(1, 5, 10))):
        with pytest.raises(ValueError, match=r"rope: cos and sin must be \(1 or N, T, R/2\)"):
            kernels.rope(x, c, s, False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_op_runs_on_this_kernel(interleaved):
    x, (cos, sin) = randn(2, 3, 5, 12).transpose(1, 2), (t[0] for t in tables(1, 9, 8))
    positions = torch.tensor([8, 0, 3, 3, 5], device=DEVICE)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with fastlm.use_backend(backend):
            y = fastlm.rope(leaf, cos.to(dtype), sin.to(dtype), interleaved=interleaved, positions=positions)
        y.sin().sum().backward()
        results.append((y.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_self_checks():
    assert_self_checks("rope")


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import rope as kernels
for dtype in (torch.float32, torch.bfloat16):
    x = torch.empty(2, 512, 12, 64, dtype=dtype)
    for table in (torch.empty(1, 512, 32), torch.empty(1, 512, 16)):
        for interleaved in (False, True):
            kernels.rope(x, table, table, interleaved)
""")
    assert len(compiled) == 2 * 2 * 4
    assert_lean(compiled)
