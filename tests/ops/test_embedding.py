"""embedding: every test on every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import BACKENDS, DTYPES, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

import fastlm

# V, N, places: rows of whole vectors and not, more columns than a task has, rows that nothing names, one that most do
SIZES = [(5, 3, 40), (65, 384, 2000), (1000, 70, 300), (3, 600, 4000), (1, 1, 1)]


def places(V, count):
    return (torch.rand(count, generator=torch.Generator().manual_seed(0)).pow(4) * V).long()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_value_and_gradient(backend, dtype, padding_idx, poisoned):  # noqa: F811
    for V, N, count in SIZES:
        index = places(V, count)
        weight, plain, exact = (numbers((V, N), dtype).to(t).requires_grad_() for t in (dtype, dtype, torch.float64))
        dy = numbers((count, N), dtype, seed=1)
        y = fastlm.embedding(index, weight, padding_idx)
        stock, wide = (F.embedding(index, w, padding_idx) for w in (plain, exact))
        assert torch.equal(y, stock)
        (dweight,), (dstock,) = torch.autograd.grad(y, weight, dy), torch.autograd.grad(stock, plain, dy)
        (dexact,) = torch.autograd.grad(wide, exact, dy.double())
        assert dweight.dtype == dtype and dweight.is_contiguous()
        assert_as_exact_as_torch(dweight, dexact, dstock, 2, f"{V}x{N}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_in_16_bits_do_not_stall(backend):
    weight = torch.zeros(2, 40, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(1000, dtype=torch.int64)
    (dweight,) = torch.autograd.grad(
        fastlm.embedding(index, weight), weight, torch.ones(1000, 40, dtype=torch.bfloat16)
    )
    assert (dweight[0] == 1000).all() and (dweight[1] == 0).all()  # torch's sum stops at 256


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_index_types(backend):
    weight = numbers((7, 5))
    for shape in ((), (4,), (2, 3), (0,), (2, 0, 3)):
        index = torch.zeros(shape, dtype=torch.int32)
        assert torch.equal(fastlm.embedding(index, weight), F.embedding(index, weight))
    index = torch.arange(6).view(2, 3)
    turned = numbers((5, 7)).t().requires_grad_()  # neither of them contiguous
    y = fastlm.embedding(index.t(), turned)
    (dweight,) = torch.autograd.grad(y, turned, torch.ones_like(y).transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(y, F.embedding(index.t(), turned)) and (dweight[:6] == 1).all() and (dweight[6] == 0).all()
    (none,) = torch.autograd.grad(fastlm.embedding(index[:0], turned).sum(), turned)
    assert none.shape == (7, 5) and not none.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_and_transforms(backend):
    weight, index = numbers((4, 3), torch.float64).requires_grad_(), torch.tensor([[0, 3, 1], [3, 3, 0]])
    call = lambda w: fastlm.embedding(index, w)  # noqa: E731
    assert gradcheck(call, weight, check_forward_ad=True, check_batched_grad=True)
    for padding_idx in (None, 3):  # no derivative of the first order is the one by definition where a row has none
        assert gradgradcheck(lambda w, p=padding_idx: fastlm.embedding(index, w, p).square(), weight)
    each = torch.stack([fastlm.embedding(i, weight) for i in index])
    assert torch.equal(vmap(lambda i: fastlm.embedding(i, weight))(index), each)
    counts = grad(lambda w: fastlm.embedding(index, w).sum())(weight.detach())
    assert torch.equal(counts[:, 0], torch.tensor([2.0, 1, 0, 3], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    weight, index = numbers((4, 8)).requires_grad_(), torch.tensor([1, 3, 1])
    torch.library.opcheck(overload("embedding", backend), (weight, index, -1))
    torch.library.opcheck(overload("embedding_backward", backend), (numbers((3, 8)).requires_grad_(), index, 4, 1))


def test_compiled():
    weight, index = numbers((4, 8)), torch.tensor([1, 3, 1])
    compiled = torch.compile(fastlm.embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index, weight), weight[index])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [4, -1])
def test_an_index_that_is_no_row(backend, wrong):
    with pytest.raises(IndexError):
        fastlm.embedding(torch.tensor([0, wrong]), numbers((4, 3)))
    if backend != "reference":  # whose gradient leaves such an index out, as torch's
        with pytest.raises(IndexError):
            overload("embedding_backward", backend)(numbers((2, 3)), torch.tensor([0, wrong]), 4, -1)


WRONG = [
    ({"input": torch.ones(3)}, TypeError, "input must be int32 or int64, got torch.float32"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must be \(V, N\), got \(4,\)"),
    ({"weight": torch.ones(4, 2, dtype=torch.int64)}, TypeError, "weight must be floating point"),
    ({"weight": torch.ones(4, 2, device="meta")}, ValueError, "weight must be on the device of input"),
    ({"padding_idx": 4}, ValueError, "padding_idx must be a row of weight, -4 to 3, or None, got 4"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change, error, message):
    given = {"input": torch.zeros(3, dtype=torch.int64), "weight": torch.ones(4, 2)} | change
    with pytest.raises(error, match=f"fastlm.embedding: {message}"):
        fastlm.embedding(**given)
