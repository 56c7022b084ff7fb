"""The Triton dropout kernel against the reference, whose random bits it has to draw."""

import math

import pytest
import torch
import triton
import triton.language as tl
from triton_testing import (
    DEVICE,
    HALVES,
    SIZES,
    assert_exact,
    assert_lean,
    assert_self_checks,
    compile_for_gpu,
    randn,
    reference,
)

import fastlm
from fastlm._dropout import philox
from fastlm.kernels.triton import dropout as kernels


def seed_of(number):
    return torch.tensor(number, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("p", [0.3, 0.9, 1e-9, 0.9999999999])
def test_values(p, dtype):
    """The last two are as far as a threshold of 32 bits goes."""
    for n, number in zip(SIZES, (0, 1, -1, 2**40 + 5, 2**63 - 1, -(2**63), 7, 2**32, 2**31), strict=True):
        x = 1 + randn(n, dtype=dtype).abs()
        assert_exact(kernels.dropout, "dropout", x, p, seed_of(number))
        assert torch.equal(
            kernels.dropout(x, p, seed_of(number)) == 0, reference("dropout", x, p, seed_of(number)) == 0
        )


def test_what_is_dropped_may_be_nan():
    x = torch.full((500,), math.nan, device=DEVICE)
    y = kernels.dropout(x, 0.5, seed_of(3))
    assert torch.equal(y.isnan(), reference("dropout", torch.ones_like(x), 0.5, seed_of(3)) != 0)
    assert 200 < y.isnan().sum() < 300 and (y[~y.isnan()] == 0).all()


def test_elements_have_numbers_in_row_major_order():
    x = randn(40, 33).t()
    y = kernels.dropout(x, 0.4, seed_of(9))
    assert y.is_contiguous() and torch.equal(y, kernels.dropout(x.contiguous(), 0.4, seed_of(9)))


@triton.jit
def words_kernel(p_words, p_seed, i_counter):
    b_words = kernels.random_words(i_counter + tl.arange(0, 4), p_seed, 4)
    tl.store(p_words + tl.arange(0, 16), b_words.to(tl.int64))


def test_numbers_past_32_bits():
    """As in one of the last programs of a tensor of 2^35 elements, which no test can hold."""
    words = torch.empty(16, dtype=torch.int64, device=DEVICE)
    counter = 2**33 + 5
    words_kernel[(1,)](words, seed_of(77), counter)
    want = torch.stack(philox(counter + torch.arange(4, device=DEVICE), seed_of(77)), dim=-1).flatten()
    assert torch.equal(words, want)


def test_gradients_and_what_it_refuses():
    x = randn(5, 70).requires_grad_()
    with fastlm.use_backend("triton"):
        y = fastlm.dropout(x, 0.4, seed=seed_of(9))
        y.sum().backward()
        with pytest.raises(NotImplementedError, match="triton does not take"):
            fastlm.dropout(x.double(), 0.4, seed=seed_of(9))
    assert torch.equal(x.grad, kernels.dropout(torch.ones_like(x), 0.4, seed_of(9)))


def test_self_checks():
    assert_self_checks("dropout")


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import dropout as kernels
for dtype, p in ((torch.float32, 0.9), (torch.bfloat16, 0.9), (torch.bfloat16, 0.1)):  # thresholds of 64 and 32 bits
    kernels.dropout(torch.empty(4096, dtype=dtype), p, torch.tensor(0))
""")
    assert len(compiled) == 2 * 3
    assert_lean(compiled)
    for c in compiled:
        assert c["shared"] == 0  # words lie in the registers of the threads that use them
