"""The Triton Adam kernel against the reference in float64, and against the reference in the same dtype."""

import itertools
import math

import pytest
import torch
from triton_testing import DEVICE, HALVES, assert_close, assert_self_checks, compile_for_gpu, randn

from fastlm._eight_bit import quantized
from fastlm.kernels._common import flat
from fastlm.kernels.triton import _step
from fastlm.kernels.triton import adam as kernels
from fastlm.ops.adam import adam_reference

# Nothing, one element, around a block and a chunk, and multiples of 16, which take the vectorised path.
SIZES = [(0,), (1,), (1023,), (1025,), (64, 16), (7, 5, 3), (8192,), (8193,)]
NO_EXTRAS = (0.0, None, [], [], 0.0, [], [])  # l1, found_inf, masters, averages of weights and their decay, scales
NOTHING_MORE = (None, False, None, False, 0, *NO_EXTRAS)  # no scale, nothing at random, lr a number
NAMES = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"]


def state(sizes, dtype, amsgrad, first_steps=(0.0, 41.0)):
    steps = [torch.tensor(t) for t, _ in zip(itertools.cycle(first_steps), sizes, strict=False)]
    params, grads, exp_avgs, exp_avg_sqs, tops = ([randn(*size, dtype=dtype) for size in sizes] for _ in range(5))
    squares = [[x.square() for x in tensors] for tensors in (exp_avg_sqs, tops if amsgrad else [])]
    return [params, grads, exp_avgs, *squares, steps]


def copy(lists, dtype=None):
    # clone keeps the strides of dense tensors; steps keep their dtype
    return [[x.clone() if x is lists[5] or dtype is None else x.to(dtype, copy=True) for x in part] for part in lists]


def check(lists, *options, more=NOTHING_MORE):
    """Step in Triton on `lists`; the reference on copies says what is right, and what the dtype allows."""
    exact, plain = copy(lists, torch.float64), copy(lists)
    addresses = [[x.data_ptr() for x in part] for part in lists]
    grads = [g.clone() for g in lists[1]]
    adam_reference(*exact, *options, *more)
    adam_reference(*plain, *options, *more)
    kernels.adam_(*lists, *options, *more)
    assert addresses == [[x.data_ptr() for x in part] for part in lists]
    for name, mine, right, stock in zip(NAMES, lists, exact, plain, strict=True):
        for a, b, c in zip(mine, right, stock, strict=True):
            if name == "steps":
                assert a.item() == b.item()
            else:
                assert_close(a, b.double(), stock=c)
    assert all(torch.equal(a, b) for a, b in zip(lists[1], grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("decoupled", "amsgrad", "maximize"), [(True, False, False), (False, True, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_step(dtype, decoupled, amsgrad, maximize, weight_decay):
    check(state(SIZES, dtype, amsgrad), 0.1, 0.9, 0.999, 1e-8, weight_decay, decoupled, amsgrad, maximize)


def test_many_steps_stay_with_torch():
    lists = state([(33, 16)], torch.float32, False, (0.0,))
    for part in lists[2:4]:
        part[0].zero_()
    p = lists[0][0].double().requires_grad_()
    optimizer = torch.optim.AdamW([p], lr=0.01, weight_decay=0.1)
    for _ in range(10):
        lists[1][0].copy_(lists[0][0] * 2 + 1)
        p.grad = lists[1][0].double()
        optimizer.step()
        kernels.adam_(*lists, 0.01, 0.9, 0.999, 1e-8, 0.1, True, False, False, *NOTHING_MORE)
    assert_close(lists[0][0], p.detach(), ulps=32)


def test_layouts_are_updated_in_place():
    """Parameters that are transposed, sliced, or laid out unlike their state; two gradients that must be copied."""
    lists = state([(24, 40)] * 4, torch.float32, False, (3.0,))
    memory = randn(24, 80)
    untouched = memory[:, 1::2].clone()
    lists[0][0] = memory[:, ::2]
    lists[0][1] = randn(40, 24).t()
    lists[2][2] = randn(40, 24).t().copy_(lists[2][2])
    lists[1][2] = randn(40, 24).t()
    lists[1][3] = torch.tensor(0.5, device=DEVICE).expand(24, 40)
    check(lists, 0.1, 0.9, 0.999, 1e-8, 0.1, True, False, False)
    assert torch.equal(memory[:, 1::2], untouched)


def test_misaligned():
    memory = [randn(4 * 1001) for _ in range(4)]
    lists = [[m[1 + 1000 * i : 1 + 1000 * i + n] for i, n in enumerate((1000, 992))] for m in memory]
    lists[3] = [x.square_() for x in lists[3]]
    check(
        [*lists, [], [torch.tensor(1.0), torch.tensor(1.0)]],
        0.1,
        0.9,
        0.999,
        1e-8,
        0.1,
        True,
        False,
        False,
    )


def test_two_dtypes_in_one_call():
    halves, floats = state([(100,)], torch.float16, False, (2.0,)), state([(100,)], torch.float32, False, (2.0,))
    check([a + b for a, b in zip(halves, floats, strict=True)], 0.1, 0.9, 0.99, 1e-6, 0.0, True, False, False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradients_stay_where_they_are(value):
    lists = state([(50,)], torch.float32, True, (2.0,))
    lists[1][0][7] = value
    kernels.adam_(*lists, 0.1, 0.9, 0.99, 1e-8, 0.1, True, True, False, *NOTHING_MORE)
    assert lists[0][0].isnan().nonzero().tolist() == [[7]]
    assert torch.equal(lists[4][0][7].isnan(), torch.tensor(math.isnan(value), device=DEVICE))


@pytest.mark.parametrize("on_device", [False, True])
def test_scale_lr_and_steps_that_are_tensors(on_device):
    """Parameters at different steps, in one launch."""
    lists = state([(1000,), (33, 16), (7,)], torch.float32, False, (0.0, 41.0, 3.0))
    device = DEVICE if on_device else "cpu"
    lists[5] = [step.to(device) for step in lists[5]]
    lr = torch.tensor([0.05], device=DEVICE) if on_device else None
    scale = torch.tensor(0.25, dtype=torch.float64 if on_device else torch.bfloat16, device=DEVICE)
    check(lists, 0.1, 0.9, 0.99, 1e-8, 0.1, True, False, False, more=(scale, False, lr, False, 0, *NO_EXTRAS))
    assert [step.item() for step in lists[5]] == [1, 42, 4]


@pytest.mark.parametrize("dtype, state_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_rounds_at_random_as_the_reference(dtype, state_dtype):
    lists = state([(3,), (40_000,)], dtype, True)
    lists[2:5] = [[x.to(state_dtype) for x in part] for part in lists[2:5]]
    want, options = copy(lists), (0.01, 0.9, 0.999, 1e-8, 0.1, True, True, False)
    nearest = copy(lists)
    kernels.adam_(*lists, *options, None, True, None, True, 12345, *NO_EXTRAS)
    adam_reference(*want, *options, None, True, None, True, 12345)
    kernels.adam_(*nearest, *options, *NOTHING_MORE)
    at_random = 0 if dtype == torch.bfloat16 else 3
    # Of the others the interpreter cuts off what bfloat16 cannot hold.
    assert (lists[at_random][1] != want[at_random][1]).float().mean() < 2e-3
    assert 0.1 < (lists[at_random][1] != nearest[at_random][1]).float().mean() < 0.8


def test_grad_norm():
    grads = [randn(*size, dtype=dtype) for size in SIZES for dtype in (torch.float32, torch.float16)]
    grads += [randn(40, 30).t()[::2], randn(1001)[1:]]
    norm = kernels.grad_norm(grads)
    assert norm.dtype == torch.float32 and norm.shape == ()
    want = torch.cat([g.double().flatten() for g in grads]).norm()
    assert norm.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.equal(norm, kernels.grad_norm(grads))
    grads[-1][17] = math.nan
    assert kernels.grad_norm(grads).isnan()
    assert kernels.grad_norm([torch.zeros(3, device=DEVICE), torch.ones(0, device=DEVICE)]) == 0


@pytest.mark.parametrize("run", ["adam_", "grad_norm"])
def test_nothing_is_captured(monkeypatch, run):
    monkeypatch.setattr(_step, "capturing", lambda x: True)
    lists = state([(3,)], torch.float32, False)
    args = (lists[1],) if run == "grad_norm" else (*lists, 0.1, 0.9, 0.99, 1e-8, 0.1, True, False, False, *NOTHING_MORE)
    with pytest.raises(RuntimeError, match=f"fastlm.{run} in Triton sends addresses from the host"):
        getattr(kernels, run)(*args)


EXTRAS = [{"l1": 0.01}, {"masters": True}, {"emas": True}, {"found": 0.0}, {"wide_states": True}]
TOGETHER = {"l1": 0.01, "masters": True, "emas": True, "found": 0.0}


@pytest.mark.parametrize("extras", [*EXTRAS, TOGETHER, TOGETHER | {"wide_states": True, "amsgrad": True}], ids=str)
def test_extras(extras):
    """Each alone and together: in float16, where the reference in float64 has no masters but is one."""
    amsgrad = extras.get("amsgrad", False)
    lists = state([(7, 5), (64, 16), (8193,)], torch.float16, amsgrad)
    lists[5] = [step.to(DEVICE) for step in lists[5]]
    if "wide_states" in extras:
        lists[2:5] = [[x.float() * 1.01 for x in part] for part in lists[2:5]]
    l1, found = extras.get("l1", 0.0), extras.get("found")
    found = None if found is None else torch.tensor(found, device=DEVICE)
    masters = [p.float() * 1.0001 for p in lists[0]] if "masters" in extras else []
    emas = [randn(*p.shape) for p in lists[0]] if "emas" in extras else []
    emas[1:2] = [randn(*reversed(ema.shape)).t() for ema in emas[1:2]]  # laid out unlike its parameter
    exact, plain = copy(lists, torch.float64), copy([*lists, masters, emas])
    exact_emas = [x.double() for x in emas]
    if masters:
        exact[0] = [x.double() for x in masters]
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, False, amsgrad, False, None, False, None, False, 0, l1, found)
    adam_reference(*exact, *options, [], exact_emas, 0.75)
    adam_reference(*plain[:6], *options, *plain[6:], 0.75)
    kernels.adam_(*lists, *options, masters, emas, 0.75, [], [])
    for mine, right, stock in zip(
        [*lists[:1], *lists[2:], masters, emas],
        [*exact[:1], *exact[2:], exact[0] if masters else [], exact_emas],
        [*plain[:1], *plain[2:]],
        strict=True,
    ):
        for a, b, c in zip(mine, right, stock, strict=True):
            assert_close(a, b.double(), stock=c)
    if masters:
        assert all(torch.equal(p, master.half()) for p, master in zip(lists[0], masters, strict=True))


def eight_bit(sizes, dtype):
    """As `state`, and scales for exp_avgs and exp_avg_sqs."""
    lists = state(sizes, dtype, False, (3.0,))
    scales = []
    for i, signed in ((2, True), (3, False)):
        packed = [quantized(x.float().flatten(), signed) for x in lists[i]]
        lists[i] = [codes.view(x.shape) for (codes, _), x in zip(packed, lists[i], strict=True)]
        scales.append([scale for _, scale in packed])
    return lists, scales


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about what is not finite
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_states_of_eight_bits(dtype):
    """The reference's codes and scales, but for where a last bit of what is rounded differs."""
    lists, scales = eight_bit([(1,), (255,), (4096,), (8193,), (40, 48)], dtype)
    for part in (lists[0], *lists[2:4]):  # transposed all three
        part[4] = part[4].t().contiguous().t()
    lists[1][3][300:600] = 0  # with averages that are 0 as well
    for i in (2, 3):
        lists[i][3][256:512], scales[i - 2][3][1] = 0, 0
    lists[1][2][7], lists[1][2][1000] = math.nan, -math.inf
    want, want_scales = copy(lists), copy(scales + [[]] * 6)[:2]
    want[0][4], want[2][4], want[3][4] = (x[4].clone() for x in (lists[0], lists[2], lists[3]))
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False, None, False, None, False, 9, 0.0, None, [], [], 0.0)
    adam_reference(*want, *options, *want_scales)
    kernels.adam_(*lists, *options, *scales)
    for got_scales, right in zip(scales, want_scales, strict=True):
        for a, b in zip(got_scales, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
    assert scales[0][2].isnan().nonzero().flatten().tolist() == [0, 3]  # what is not finite stays in its block
    for i in (2, 3):
        for a, b, scale in zip(lists[i], want[i], scales[i - 2], strict=True):
            known = ~scale.isnan().repeat_interleave(256)[: a.numel()]
            off = (flat(a).int() - flat(b).int())[known].abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 2e-3
    for a, b in zip(lists[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_that_is_skipped_writes_nothing(packed):
    sizes = [(1000,), (64, 32)]
    lists, scales = eight_bit(sizes, torch.float16) if packed else (state(sizes, torch.float16, True), [[], []])
    lists[5] = [step.to(DEVICE) for step in lists[5]]
    lists[1][1] = randn(32, 64, dtype=torch.float16).t()
    masters, emas = ([p.float() * factor for p in lists[0]] for factor in (1.0001, 0.5))
    if not packed:  # of which the step runs on a copy
        masters[1] = randn(32, 64).t()
    everything = [*lists, masters, emas, *scales]
    before = copy(everything)
    options = (0.1, 0.9, 0.99, 1e-6, 0.1, True, not packed, False, None, False, None, False, 0, 0.1)
    kernels.adam_(*lists, *options, torch.tensor(math.nan, device=DEVICE), masters, emas, 0.9, *scales)
    for part, old in zip(everything, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, old, strict=True))
    kernels.adam_(*lists, *options, torch.tensor(0.0, device=DEVICE), masters, emas, 0.9, *scales)
    for i, (part, old) in enumerate(zip(everything, before, strict=True)):
        assert i == 1 or not any(torch.equal(a, b) for a, b in zip(part, old, strict=True))


def test_what_it_refuses():
    x = [randn(3)]
    assert _step.unsupported(x, x, x) is None
    wide = [randn(3), randn(3).double()]
    assert _step.unsupported(wide, wide, wide) == "does not take torch.float64"


def test_self_checks():
    assert_self_checks("adam")


def test_compiles_for_gpus():
    compiled = compile_for_gpu("""
from fastlm.kernels.triton import adam as kernels
hyper, no_extras = (0.1, 0.9, 0.99, 1e-8, 0.1), (0.0, None, [], [], 0.0, [], [])
off, on = (True, False, False, None, False, None, False, 0), (False, True, True, torch.ones(()), True, None)
for dtype in (torch.float32, torch.bfloat16):
    for n in (4096, 4095):
        x, steps = [torch.empty(n, dtype=dtype)], [torch.tensor(0.0)]
        wide, codes, scales = [torch.empty(n)], [torch.empty(n, dtype=torch.uint8)], [torch.empty(16)]
        states, masters = ([x[0].bfloat16()], []) if dtype == torch.float32 else (wide, wide)
        extras = (0.1, torch.ones(()), masters, wide, 0.9)
        kernels.adam_(x, x, x, x, [], steps, *hyper, *off, *no_extras)
        kernels.adam_(x, x, states, states, states, steps, *hyper, *on, True, 1, *no_extras)
        kernels.adam_(x, x, states, states, states, steps, *hyper, *on, False, 1, *extras, [], [])
        kernels.adam_(x, x, codes, codes, [], steps, *hyper, *off, *no_extras[:5], scales, scales)
        kernels.adam_(x, x, codes, codes, [], steps, *hyper, False, *off[1:], *extras, scales, scales)
        kernels.grad_norm(x)
""")
    assert len(compiled) == 2 * 2 * 2 * (5 + 1)
    for c in compiled:
        what = c["kernel"], c["constants"], c["architecture"]
        assert c["spilled"] == 0, what
        assert ("ld.global.v" in c["ptx"]) == c["constants"]["ALIGNED"], what  # 128-bit loads
        assert c["kernel"] == "grad_norm_kernel" or ".f64" not in c["ptx"], what
