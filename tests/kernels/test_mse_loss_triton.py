"""The Triton mse_loss kernels against their references in float64."""

import math

import pytest
import torch
from triton_testing import (
    DEVICE,
    HALVES,
    SIZES,
    assert_close,
    assert_exact,
    assert_lean,
    assert_self_checks,
    compile_for_gpu,
    randn,
)

import fastlm
from fastlm.kernels.triton import mse_loss as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_values_and_gradients(dtype):
    g = torch.tensor(0.3, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    for n in (*SIZES, 16 * 1024, 40_000):  # a program's part, and more
        x, target = randn(n, dtype=dtype), randn(n, dtype=dtype)
        assert_exact(kernels.mse_loss, "mse_loss", x, target)
        assert_exact(kernels.mse_loss_backward, "mse_loss_backward", g, x, target)


def test_long_sums_are_exact():
    x = torch.full((300_000,), 0.1, device=DEVICE)
    want = x.double().square().sum()
    assert_close(kernels.mse_loss(x, torch.zeros_like(x)), want, ulps=2)


def test_layouts():
    x, target = randn(6, 5, 70), randn(70, 5, 6).permute(2, 1, 0)
    for a, b in ((x, target), (target, x), (x[:, :, ::2], x[:, :, 1::2]), (x, x[:1, :1, :1].expand(x.shape))):
        dense = a.contiguous(), b.contiguous()
        assert torch.equal(kernels.mse_loss(a, b), kernels.mse_loss(*dense))
        g = torch.ones(3, device=DEVICE)[1]
        dx = kernels.mse_loss_backward(g, a, b)
        assert dx.is_contiguous() and torch.equal(dx, 2 * (dense[0] - dense[1]))


def test_what_is_not_finite():
    x, target = randn(3000), randn(3000)
    x[2500] = math.inf
    assert kernels.mse_loss(x, target) == math.inf
    target[7] = math.nan
    assert kernels.mse_loss(x, target).isnan()
    dx = kernels.mse_loss_backward(torch.ones((), device=DEVICE), x, target)
    assert (~dx.isfinite()).nonzero().flatten().tolist() == [7, 2500]


def test_the_op_runs_on_these_kernels():
    results = []
    tensors = randn(9, 70), randn(9, 70)
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x, target = (t.to(dtype, copy=True).requires_grad_() for t in tensors)
        with fastlm.use_backend(backend):
            loss = fastlm.mse_loss(x, target)
        (3 * loss).backward()
        results.append((loss.detach(), x.grad, target.grad))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_self_checks():
    assert_self_checks("mse_loss")


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import mse_loss as kernels
for dtype in (torch.float32, torch.bfloat16):
    x = torch.empty(4096, dtype=dtype)
    kernels.mse_loss(x, x)
    kernels.mse_loss_backward(torch.empty(()), x, x)
""")
    assert len(compiled) == 2 * 2 * 2
    # The forward adds up its threads' sums in float64.
    assert_lean(compiled, but_for="mse_loss_fwd_kernel")
