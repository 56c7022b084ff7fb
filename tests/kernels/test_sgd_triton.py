"""The Triton SGD kernel against the reference in float64, and against the reference in the same dtype."""

import itertools
import math

import pytest
import torch
from triton_testing import DEVICE, HALVES, assert_close, assert_self_checks, compile_for_gpu, randn

from fastlm.kernels.triton import _step
from fastlm.kernels.triton import sgd as kernels
from fastlm.ops.sgd import sgd_reference

# Nothing, one element, around a block and a chunk, and multiples of 16, which take the vectorised path.
SIZES = [(0,), (1,), (1025,), (64, 16), (7, 5, 3), (8193,)]
NOTHING_MORE = (None, None, None, [], [], 0.0, False, 0)  # numbers on the device, masters, averages, nothing at random


def state(sizes, dtype, momentum=True, first_steps=(0.0, 41.0)):
    steps = [torch.tensor(t) for t, _ in zip(itertools.cycle(first_steps), sizes, strict=False)]
    params, grads, buffers = ([randn(*size, dtype=dtype) for size in sizes] for _ in range(3))
    return [params, grads, buffers if momentum else [], steps]


def copy(lists, dtype=None):
    # clone keeps the strides of dense tensors; steps keep their dtype
    return [[x.clone() if i == 3 or dtype is None else x.to(dtype, copy=True) for x in p] for i, p in enumerate(lists)]


def check(lists, options, numbers=(None, None, None), masters=False, emas=False):
    """Step in Triton on `lists`; the reference on copies says what is right, and what the dtype allows. In float64 it
    has no masters but is one."""
    masters = [p.float() * 1.0001 for p in lists[0]] if masters else []
    emas = [randn(*p.shape[::-1]).t() for p in lists[0]] if emas else []  # laid out unlike their parameters
    exact, plain = copy([masters or lists[0], *lists[1:], [], emas], torch.float64), copy([*lists, masters, emas])
    grads = [g.clone() for g in lists[1]]
    for run, (*state, masters_of, emas_of) in (
        (sgd_reference, exact), (sgd_reference, plain), (kernels.sgd_, [*lists, masters, emas])
    ):  # fmt: skip
        run(*state, *options, *numbers, masters_of, emas_of, 0.75, False, 0)
    exact[4] = exact[0] if masters else []
    for i, (mine, right, stock) in enumerate(zip([*lists, masters, emas], exact, plain, strict=True)):
        for a, b, c in zip(mine, right, stock, strict=True):
            if i == 3:
                assert a.item() == b.item()
            else:
                assert_close(a, b.double(), stock=c)
    assert all(torch.equal(a, b) for a, b in zip(lists[1], grads, strict=True))
    assert all(torch.equal(p, master.half()) for p, master in zip(lists[0], masters, strict=bool(masters)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
# lr, momentum, dampening, weight_decay, l1, nesterov, maximize
@pytest.mark.parametrize(
    "options",
    [
        (0.1, 0.0, 0.0, 0.0, 0.0, False, False),
        (0.1, 0.0, 0.0, 0.1, 0.01, False, True),
        (0.1, 0.9, 0.0, 0.0, 0.0, False, False),
        (0.1, 0.9, 0.5, 0.1, 0.0, False, True),
        (0.1, 0.9, 0.0, 0.0, 0.01, True, False),
    ],
    ids=str,
)
def test_one_step(dtype, options):
    check(state(SIZES, dtype, options[1] != 0), options)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("extras", [{}, {"masters": True}, {"emas": True}, {"masters": True, "emas": True}], ids=str)
def test_numbers_on_the_device_masters_and_averages(stepped, extras):
    """Without momentum steps may be missing."""
    lists = state([(7, 5), (64, 16), (1, 8193)], torch.float16, stepped)
    lists[3] = [step.to(DEVICE) for step in lists[3]] if stepped else []
    scale, lr, found = (torch.tensor([x], device=DEVICE) for x in (0.5, 0.1, 0.0))
    options = (1.0, 0.9 if stepped else 0.0, 0.0, 0.1, 0.01, stepped, False)
    check(lists, options, (scale, lr, found), **extras)


def test_the_first_step_ignores_what_the_buffer_held():
    lists = state([(50,), (50,)], torch.float32, True, (0.0, 1.0))
    for buffer in lists[2]:
        buffer.fill_(math.nan)
    kernels.sgd_(*lists, 0.1, 0.9, 0.5, 0.0, 0.0, False, False, *NOTHING_MORE)
    assert torch.equal(lists[2][0], lists[1][0]) and lists[2][1].isnan().all()


def test_many_steps_stay_with_torch():
    lists = state([(33, 16)], torch.float32, True, (0.0,))
    p = lists[0][0].double().requires_grad_()
    optimizer = torch.optim.SGD([p], 0.01, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(8):
        lists[1][0].copy_(lists[0][0] * 2 + 1)
        p.grad = lists[1][0].double()
        optimizer.step()
        kernels.sgd_(*lists, 0.01, 0.9, 0.0, 0.1, 0.0, True, False, *NOTHING_MORE)
    assert_close(lists[0][0], p.detach(), ulps=32)


def test_layouts_are_updated_in_place():
    """Parameters that are transposed, sliced, or laid out unlike their state; two gradients that must be copied."""
    lists = state([(24, 40)] * 4, torch.float32, True, (3.0,))
    memory = randn(24, 80)
    untouched = memory[:, 1::2].clone()
    lists[0][0] = memory[:, ::2]
    lists[0][1] = randn(40, 24).t()
    lists[2][2] = randn(40, 24).t()
    lists[1][2] = randn(40, 24).t()
    lists[1][3] = torch.tensor(0.5, device=DEVICE).expand(24, 40)
    check(lists, (0.1, 0.9, 0.0, 0.1, 0.0, False, False))
    assert torch.equal(memory[:, 1::2], untouched)


def test_rounds_at_random_as_the_reference():
    lists = state([(3,), (20_000,)], torch.bfloat16, False)
    want, options = copy(lists), (0.01, 0.0, 0.0, 0.1, 0.0, False, False, None, None, None, [], [], 0.0)
    nearest = copy(lists)
    kernels.sgd_(*lists, *options, True, 12345)
    sgd_reference(*want, *options, True, 12345)
    kernels.sgd_(*nearest, *options, False, 0)
    assert (lists[0][1] != want[0][1]).float().mean() < 2e-3
    assert 0.1 < (lists[0][1] != nearest[0][1]).float().mean() < 0.8


def test_a_step_that_is_skipped_writes_nothing():
    lists = state([(1000,), (64, 32)], torch.float16)
    lists[3] = [step.to(DEVICE) for step in lists[3]]
    masters, emas = [randn(1000), randn(32, 64).t()], [randn(1000), randn(64, 32)]  # the step runs on copies of some
    everything = [*lists, masters, emas]
    before = copy(everything)
    options = (0.1, 0.9, 0.0, 0.1, 0.01, True, False)
    for found in (math.inf, 0.0):
        kernels.sgd_(
            *lists, *options, None, None, torch.tensor(found, device=DEVICE), masters, emas, 0.9, False, 0
        )  # fmt: skip
        for i, (part, old) in enumerate(zip(everything, before, strict=True)):
            kept = found != 0 or i == 1
            assert all(torch.equal(a, b) == kept for a, b in zip(part, old, strict=True))


def test_nothing_is_captured(monkeypatch):
    monkeypatch.setattr(_step, "capturing", lambda x: True)
    with pytest.raises(RuntimeError, match=r"fastlm\.sgd_ in Triton sends addresses from the host"):
        kernels.sgd_(*state([(3,)], torch.float32), 0.1, 0.9, 0.0, 0.0, 0.0, False, False, *NOTHING_MORE)


def test_self_checks():
    assert_self_checks("sgd")


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import sgd as kernels
one = torch.ones(())
for dtype in (torch.float32, torch.bfloat16):
    for n in (4096, 4095):
        x, wide, steps = [torch.empty(n, dtype=dtype)], [torch.empty(n)], [torch.tensor(0.0)]
        masters = [] if dtype == torch.float32 else wide
        buffers = [x[0].bfloat16()] if dtype == torch.float32 else wide
        nothing_more = (None, None, None, [], [], 0.0)
        kernels.sgd_(x, x, [], [], 0.1, 0.0, 0.0, 0.0, 0.0, False, False, *nothing_more, False, 0)
        kernels.sgd_(x, x, x, steps, 0.1, 0.9, 0.5, 0.1, 0.0, True, False, *nothing_more, True, 0)
        extras = (one, one, one, masters, wide, 0.9)
        kernels.sgd_(x, x, buffers, steps, 0.1, 0.9, 0.0, 0.1, 0.1, False, True, *extras, False, 0)
""")
    assert len(compiled) == 2 * 2 * 2 * 3
    for c in compiled:
        what = c["kernel"], c["constants"], c["architecture"]
        assert c["spilled"] == 0, what
        assert ("ld.global.v" in c["ptx"]) == c["constants"]["ALIGNED"], what  # 128-bit loads
        assert ".f64" not in c["ptx"], what
