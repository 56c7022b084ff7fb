"""The Triton attention kernels against the formula in float64, and against the same formula in plain torch."""

import math

import pytest
import torch
from attention_cases import OPTIONS, option_case
from triton_testing import DEVICE, HALVES, assert_close, compile_for_gpu, randn

from fastlm.kernels.triton import attention as kernels
from fastlm.kernels.triton.attention_decode import attention_decode
from fastlm.ops.attention import _fake, attention_backward_reference, attention_reference

# NumPy's, from the interpreter: what a GPU does without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ALL = [True, True, True, False, False, False]


def options(causal=0, left=-1, right=-1, scale=0.3, softcap=0.0):
    """The schema's arguments after q, k, v."""
    return (*[None] * 7, 0, 0, causal, left, right, scale, softcap, 0.0, False)


def visible(T, S, causal=0, left=-1, right=-1):
    i = torch.arange(T)[:, None] + S - T
    j = torch.arange(S)[None, :]
    seen = torch.ones(T, S, dtype=torch.bool)
    if causal:
        seen &= j <= (i if causal == 1 else i - S + T)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen.to(DEVICE)


def formula(q, k, v, causal=0, left=-1, right=-1, scale=0.3, softcap=0.0):
    """Attention by definition, in the dtype of its inputs."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    seen = visible(q.shape[2], k.shape[2], causal, left, right)
    some = seen.any(-1, keepdim=True)
    s = s.masked_fill(~seen & some, -math.inf).masked_fill(~some, 0)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse[..., None]).masked_fill(~some, 0)
    return p @ v, lse.masked_fill(~some[..., 0], -math.inf)


def gradients(q, k, v, do, dlse, dtype, **kwargs):
    """(o, lse, dq, dk, dv) by the definition, differentiated by torch."""
    at = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
    o, lse = formula(*at, **kwargs)
    total = (o * do.to(dtype)).sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse.to(dtype)).sum()
    return o.detach(), lse.detach(), *torch.autograd.grad(total, at)


# B, H, Hk, T, S, D, DV
CASES = [
    ((1, 1, 1, 1, 1, 1, 1), {}),
    ((8, 4, 2, 1, 63, 40, 24), {}),  # many heads: the error of one row of plain torch is a matter of luck
    ((1, 2, 2, 64, 64, 64, 64), {"causal": 1}),
    ((1, 1, 1, 65, 65, 16, 16), {"causal": 1}),
    ((1, 4, 2, 63, 97, 32, 48), {"causal": 1}),
    ((1, 3, 1, 97, 63, 32, 16), {"causal": 1}),
    ((2, 1, 1, 70, 100, 111, 111), {"causal": 2}),
    ((1, 1, 1, 100, 70, 24, 24), {"causal": 2}),
    ((1, 1, 1, 40, 70, 16, 16), {"causal": 2, "left": 35}),
    ((1, 1, 1, 40, 33, 16, 16), {"causal": 2, "right": 3}),
    ((1, 1, 1, 130, 130, 16, 16), {"causal": 1, "left": 33}),
    ((1, 1, 1, 130, 97, 16, 16), {"left": 20, "right": 40, "softcap": 2.0}),
    ((1, 1, 1, 40, 40, 16, 16), {"left": 0, "right": 0}),
    ((1, 1, 1, 17, 70, 256, 20), {"causal": 1, "scale": -0.05}),
    ((1, 1, 1, 130, 33, 16, 16), {"softcap": 30.0, "right": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("sizes", "kwargs"), CASES)
def test_values_and_gradients(sizes, kwargs, dtype):
    B, H, Hk, T, S, D, DV = sizes
    q, k, v = (randn(B, h, n, d, dtype=dtype) for h, n, d in ((H, T, D), (Hk, S, D), (Hk, S, DV)))
    do, dlse = randn(B, H, T, DV, dtype=dtype), randn(B, H, T)
    want = gradients(q, k, v, do, dlse, torch.float64, **kwargs)
    stock = gradients(q, k, v, do, dlse, dtype, **kwargs)
    o, lse = kernels.attention(q, k, v, *options(**kwargs))
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close(o, want[0], stock=stock[0])
    assert torch.equal(lse == -math.inf, want[1] == -math.inf)
    assert_close(lse, want[1], ulps=16)
    got = kernels.attention_backward(do, dlse, q, k, v, o, lse, *options(**kwargs), ALL)
    # A query that sees one key has p = 1, and do v - do o is 0: plain torch takes a number from itself, the kernel the
    # same sum in another order. `noise`, (B, H, T, S), holds these sums without their signs, for such queries alone.
    seen = visible(T, S, *(kwargs.get(name, default) for name, default in (("causal", 0), ("left", -1), ("right", -1))))
    alone = seen & (seen.sum(-1, keepdim=True) == 1)
    q_abs, k_abs, v_abs, do_abs = (t.double().abs().repeat_interleave(H // t.shape[1], 1) for t in (q, k, v, do))
    noise = (do_abs @ v_abs.mT * abs(kwargs.get("scale", 0.3))).masked_fill(~alone, 0)
    cancelled = (noise @ k_abs, (noise.mT @ q_abs).unflatten(1, (Hk, -1)).sum(2), torch.zeros_like(want[4]))
    for mine, exact, plain, terms in zip(got[:3], want[2:], stock[2:], cancelled, strict=True):
        assert mine.dtype == dtype
        assert_close(mine, exact, stock=plain, factor=3, cancelled=terms)
    assert [t.numel() for t in got[3:]] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    """Against the reference in float64, and beside that of the reference in the same dtype."""
    case, stock = option_case(name, dtype, 16, 16, DEVICE), option_case(name, dtype, 16, 16, "cpu")
    plain_o, plain_lse = attention_reference(*stock.qkv, *stock.options)
    plain = attention_backward_reference(
        stock.do, stock.dlse, *stock.qkv, plain_o, plain_lse, *stock.options, stock.wanted
    )
    o, lse = kernels.attention(*case.qkv, *case.options)
    assert torch.equal(lse.cpu() == -math.inf, case.lse == -math.inf)
    assert_close(o, case.o, stock=plain_o.to(DEVICE))
    assert_close(lse.nan_to_num(neginf=0), case.lse.nan_to_num(neginf=0), ulps=16)
    got = kernels.attention_backward(case.do, case.dlse, *case.qkv, o, lse, *case.options, case.wanted)
    for mine, exact, theirs in zip(got, case.gradients, plain, strict=True):
        assert mine.shape == exact.shape and mine.dtype == theirs.dtype
        assert_close(mine, exact, stock=theirs.to(DEVICE), factor=3, ulps=16)


def test_a_sink_that_takes_all_of_the_weight():
    q, sinks = randn(1, 2, 20, 16), torch.tensor([math.inf, 0.5], device=DEVICE)
    o, lse = kernels.attention(q, q, q, *options()[:3], sinks, *options()[4:])
    assert not o[:, 0].any() and (lse[:, 0] == math.inf).all() and o[:, 1].isfinite().all()
    lens = torch.tensor([20], device=DEVICE)
    o, lse = attention_decode(q, q, q, lens, None, None, sinks, -1, 0, 0.1, 0.0)
    assert not o[:, 0].any() and (lse[:, 0] == math.inf).all() and o[:, 1].isfinite().all()


@pytest.mark.parametrize(("T", "S", "B"), [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_nothing(T, S, B):
    q, k, v = randn(B, 2, T, 8), randn(B, 2, S, 8), randn(B, 2, S, 8)
    o, lse = kernels.attention(q, k, v, *options(causal=1))
    assert o.shape == q.shape and not o.any()
    assert torch.equal(lse, torch.full((B, 2, T), -math.inf, device=DEVICE))
    gradients = kernels.attention_backward(o, lse, q, k, v, o, lse, *options(causal=1), ALL)
    for got, like in zip(gradients, (q, k, v), strict=False):
        assert got.shape == like.shape and not got.any()


def test_rows_that_see_nothing():
    q, k, v, do, dlse = (
        randn(1, 1, 50, 16),
        randn(1, 1, 8, 16),
        randn(1, 1, 8, 16),
        randn(1, 1, 50, 16),
        randn(1, 1, 50),
    )
    o, lse = kernels.attention(q, k, v, *options(causal=1))
    dq = kernels.attention_backward(do, dlse, q, k, v, o, lse, *options(causal=1), ALL)[0]
    assert not o[:, :, :42].any() and not dq[:, :, :42].any()
    assert torch.equal(lse[0, 0] == -math.inf, torch.arange(50, device=DEVICE) < 42)


def test_strides():
    T, S, D = 37, 45, 24
    q = randn(2, T, 2, D).transpose(1, 2)
    k = randn(2, 1, S, 2 * D)[..., D:].expand(2, 2, S, D)
    v = randn(2, 2, D, S).transpose(2, 3)
    do = torch.ones((), device=DEVICE).expand(2, 2, T, D)
    dlse = randn(2, T, 2).transpose(1, 2)
    want = gradients(q, k, v, do, dlse, torch.float64, causal=1)
    o, lse = kernels.attention(q, k, v, *options(causal=1))
    got = kernels.attention_backward(do, dlse, q, k, v, o, lse, *options(causal=1), ALL)
    assert o.stride() == torch.empty_like(q).stride()
    for mine, like in zip(got, (q, k, v), strict=False):
        assert mine.stride() == _fake(like, like, like)[0].stride()
    for mine, exact in zip((o, lse, *got[:3]), want, strict=True):
        assert_close(mine, exact, ulps=16)
    narrow, _ = kernels.attention(q, k, v[..., :8], *options(causal=1))
    assert narrow.transpose(1, 2).is_contiguous()
    assert_close(narrow, want[0][..., :8], ulps=16)
    # a query whose rows are not contiguous gives an output and a gradient of the same layout
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    o, _ = kernels.attention(q, k, v, *options(causal=1))
    assert o.stride() == q.stride()
    assert_close(o, want[0], ulps=16)
    dq = kernels.attention_backward(do, dlse, q, k, v, o, lse, *options(causal=1), ALL)[0]
    assert dq.stride() == q.stride()
    assert_close(dq, want[2], ulps=16)


def test_only_what_is_wanted():
    q, k, v, do = (randn(1, 1, 20, 16) for _ in range(4))
    dlse = randn(1, 1, 20)
    o, lse = kernels.attention(q, k, v, *options())
    every = kernels.attention_backward(do, dlse, q, k, v, o, lse, *options(), ALL)
    for wanted in ([True, False, False], [False, True, False], [False, False, True], [False] * 3):
        got = kernels.attention_backward(do, dlse, q, k, v, o, lse, *options(), wanted + [False] * 3)
        for mine, whole, asked in zip(got, every, wanted, strict=False):
            assert torch.equal(mine, whole) if asked else mine.numel() == 0


def test_gradients_of_one_output():
    q, k, v, do = (randn(1, 1, 40, 16) for _ in range(4))
    dlse = randn(1, 1, 40)
    o, lse = kernels.attention(q, k, v, *options(causal=1))
    for given in ((do, None), (None, dlse), (None, None)):
        got = kernels.attention_backward(*given, q, k, v, o, lse, *options(causal=1), ALL)
        zeros = (torch.zeros_like(do) if given[0] is None else do, torch.zeros_like(dlse) if given[1] is None else dlse)
        for mine, exact in zip(got, gradients(q, k, v, *zeros, torch.float64, causal=1)[2:], strict=False):
            assert_close(mine, exact, ulps=16)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masked_positions_do_not_contribute(value):
    """Non-finite values reach exactly the rows and columns that see them."""
    T, D = 40, 16
    kwargs = {"causal": 1, "left": 25}
    q, k, v, do = (randn(1, 1, T, D) for _ in range(4))
    seen = visible(T, T, **kwargs)
    clean, clean_lse = kernels.attention(q, k, v, *options(**kwargs))
    clean_dq, *_ = kernels.attention_backward(do, None, q, k, v, clean, clean_lse, *options(**kwargs), ALL)

    v[0, 0, 5, 3] = v[0, 0, 20, 5] = value
    o, lse = kernels.attention(q, k, v, *options(**kwargs))
    hit = torch.zeros_like(o[0, 0], dtype=torch.bool)
    hit[:, 3], hit[:, 5] = seen[:, 5], seen[:, 20]
    torch.testing.assert_close(o[0, 0][hit], torch.full_like(o[0, 0][hit], value), equal_nan=True)
    torch.testing.assert_close(o[0, 0][~hit], clean[0, 0][~hit])
    torch.testing.assert_close(lse, clean_lse)

    k[0, 0, 5, 3] = value
    o, lse = kernels.attention(q, k, v, *options(**kwargs))
    torch.testing.assert_close(lse[0, 0][~seen[:, 5]], clean_lse[0, 0][~seen[:, 5]])
    dq, *_ = kernels.attention_backward(do, None, q, k, v, o, lse, *options(**kwargs), [True] + [False] * 5)
    unhit = ~(seen[:, 5] | seen[:, 20])
    assert unhit.any()
    torch.testing.assert_close(dq[0, 0][unhit], clean_dq[0, 0][unhit])
    assert dq[0, 0, :, 3][seen[:, 5]].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_queries_reach_only_the_keys_they_see(value):
    T, D = 40, 16
    q, k, v, do = (randn(1, 1, T, D) for _ in range(4))
    o, lse = kernels.attention(q, k, v, *options(causal=1))
    clean = kernels.attention_backward(do, None, q, k, v, o, lse, *options(causal=1), ALL)
    q[0, 0, 10, 1] = do[0, 0, 20, 2] = value
    o, lse = kernels.attention(q, k, v, *options(causal=1))
    got = kernels.attention_backward(do, None, q, k, v, o, lse, *options(causal=1), [False, True, True] + [False] * 3)
    for mine, whole in zip(got[1:3], clean[1:3], strict=True):
        torch.testing.assert_close(mine[0, 0, 21:], whole[0, 0, 21:])
    assert not got[1][0, 0, :11, 1].isfinite().any()
    assert not got[2][0, 0, :21, 2].isfinite().any()


def test_rows_far_apart_in_memory():
    stride = 2**27
    try:
        memory = torch.empty(17 * stride, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 4.3 GiB of address space: {error}")
    near = randn(1, 1, 17, 16, dtype=torch.float16)
    far = memory.as_strided((1, 1, 17, 16), (0, 0, stride, 1)).copy_(near)
    o, lse = kernels.attention(near, near, near, *options())
    got, _ = kernels.attention(far, far, far, *options())
    assert torch.equal(got, o)
    want = kernels.attention_backward(near, None, near, near, near, o, lse, *options(), ALL)
    got = kernels.attention_backward(far, None, far, far, far, o, lse, *options(), ALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs programs in one order")
def test_the_same_in_every_run():
    q, k, v, do = (randn(2, 4, 1000, 64, dtype=torch.bfloat16) for _ in range(4))
    o, lse = kernels.attention(q, k[:, :2], v[:, :2], *options(causal=1))
    runs = [
        kernels.attention_backward(do, None, q, k[:, :2], v[:, :2], o, lse, *options(causal=1), ALL) for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_what_it_refuses():
    q = randn(1, 1, 4, 16)
    arguments = [q, q, q, *options()]
    assert kernels.unsupported(*arguments) is None
    assert kernels._unsupported_backward(q, None, q, q, q, q, q, *options(), ALL) is None
    for position, value, reason in (
        (
            0,
            q.double(),
            "takes q, k and v of one dtype, float32, bfloat16 or float16, not torch.float64, torch.float32"
            " and torch.float32",
        ),
        (2, randn(1, 1, 4, 257), "takes head dims from 1 to 256, not 16 and 257"),
    ):
        changed = [*arguments[:position], value, *arguments[position + 1 :]]
        assert kernels.unsupported(*changed) == reason


# What a block may have: of the GPUs from sm_80 on the least, and what lists for Hopper alone may count on.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
# Every configuration that the tuner may take, not the default alone; with all options at once that one.
EVERY = """
def every(key, candidates, run, device):
    for candidate in candidates[: 1 if softcap else None]:
        run(candidate)
    return candidates[0]
softcap, kernels.pick = 0.0, every
"""
CODE = """
from fastlm.kernels.triton import attention as kernels
from fastlm.ops.attention import _fake
EVERY
for D, dtype in CASES:
    q = torch.empty(1, 2, 500, D, dtype=dtype)
    options = (*[None] * 7, 0, 0, 1, -1, -1, 0.1, 0.0, 0.0, False)
    o, lse = kernels.attention(q, q, q, *options)
    kernels.attention_backward(q, None, q, q, q, o, lse, *options, [True] * 3 + [False] * 3)
"""
WITH_OPTIONS = """
from fastlm.kernels.triton import attention as kernels
EVERY
q, heads, ends = torch.empty(1, 2, 500, 64, dtype=torch.bfloat16), torch.ones(2), torch.tensor([0, 200, 500])
mask, bias, seed = torch.ones(1, 2, 500, 500, dtype=torch.bool), torch.ones(2, 500, 500), torch.tensor(4)
for options in (
    (mask, bias, heads, heads, seed, ends, ends, 0, 0, 1, 9, -1, 0.1, 2.0, 0.1, True),
    (None, None, None, None, None, ends, ends, 0, 0, 2, -1, -1, 0.1, 0.0, 0.0, True),
    (None, None, None, None, seed, None, None, 0, 0, 1, -1, -1, 0.1, 0.0, 0.1, True),
    (None, bias, heads, None, None, None, None, 0, 0, 1, -1, -1, 0.1, 0.0, 0.0, True),
):
    wanted, softcap = [True] * 3 + [x is not None for x in options[1:4]], options[13]
    o, lse = kernels.attention(q, q, q, *options)
    kernels.attention_backward(q, None, q, q, q, o, lse, *options, wanted)
"""


def test_compiles_for_gpus():
    """Tensor cores for 16 bits and none, so no TF32, for float32; what fits into every GPU from sm_80 on."""
    # Not 256: minutes of compilation.
    cases = [(64, torch.bfloat16), (128, torch.float16), (32, torch.float32), (64, torch.float32)]
    compiled = compile_for_gpu(CODE.replace("EVERY", EVERY).replace("CASES", str(cases)))
    names = {
        "fwd": "attention_fwd_kernel",
        "dkdv": "attention_bwd_dkdv_kernel",
        "dq": "attention_bwd_dq_kernel",
    }
    assert {c["kernel"] for c in compiled} == {"attention_delta_kernel", *names.values()}
    for kernel, name in names.items():
        lists = [kernels.configurations(kernel, sm, dtype, D) for sm in ((8, 0), (9, 0)) for D, dtype in cases]
        assert len([c for c in compiled if c["kernel"] == name]) == sum(map(len, lists))
    for c in compiled:
        what = c["kernel"], c["dtype"], c["constants"], c["architecture"]
        # A frame of 8 bytes on the stack is no spill where registers are left.
        assert c["spilled"] == 0 or (c["spilled"] <= 8 and c["registers"] < 128), what
        assert c["shared"] <= SHARED[c["architecture"]], what
        if c["dtype"] == "fp32":
            assert "tf32" not in c["ptx"] and "mma" not in c["ptx"], what
        elif c["kernel"] != "attention_delta_kernel":
            rows = c["constants"]["BS" if "dkdv" in c["kernel"] else "BT"]  # Hopper's own products have 64 at least
            instruction = "wgmma.mma_async.sync" if c["architecture"] == 90 and rows >= 64 else "mma.sync"
            assert f"{instruction}.aligned" in c["ptx"], what


def test_options_compile_for_gpus():
    """On tensor cores too, within the same shared memory; all of them at once may spill."""
    compiled = [c for c in compile_for_gpu(WITH_OPTIONS.replace("EVERY", EVERY)) if "delta" not in c["kernel"]]
    lists = [
        kernels.configurations(kernel, sm, torch.bfloat16, 64, terms)
        for kernel in ("fwd", "dkdv", "dq")
        for sm in ((8, 0), (9, 0))
        for terms in (False, True, True)
    ]
    assert len(compiled) == 2 * 3 + sum(map(len, lists))
    for c in compiled:
        what = c["kernel"], c["constants"], c["architecture"]
        assert c["spilled"] <= (512 if c["constants"]["SOFTCAP"] else 8), what
        assert c["shared"] <= SHARED[c["architecture"]], what
        assert "mma" in c["ptx"], what
