"""The C++ attention against the plain formula in a wider type, on every instruction set that this machine runs."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlm import _native
from fastlm.kernels.native import attention as native

pytestmark = pytest.mark.skipif(_native.cpu is None, reason=_native.reasons.get("cpu", ""))
ISAS = _native.cpu.usable_isas() if _native.cpu is not None else []
NONE, BOTTOM_RIGHT, TOP_LEFT = 0, 1, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ["o", "lse", "dq", "dk", "dv"]

# (B, Hq, Hk, Tq, Tk, D, Dv, causal)
SHAPES = [
    (2, 3, 3, 64, 64, 64, 64, BOTTOM_RIGHT),
    (1, 2, 2, 1, 1, 1, 1, NONE),
    (1, 4, 2, 257, 257, 40, 40, BOTTOM_RIGHT),
    (2, 6, 1, 63, 65, 64, 40, BOTTOM_RIGHT),
    (1, 2, 2, 65, 63, 111, 111, BOTTOM_RIGHT),  # the first two queries see nothing
    (1, 2, 2, 65, 257, 128, 128, TOP_LEFT),
    (1, 1, 1, 257, 64, 256, 111, TOP_LEFT),
    (8, 16, 4, 1, 257, 64, 64, BOTTOM_RIGHT),  # one query each: many heads, so that no error is one draw's luck
    (1, 2, 2, 257, 1, 40, 128, BOTTOM_RIGHT),
    (4, 4, 4, 64, 65, 1, 256, NONE),
    (1, 1, 1, 200, 1100, 64, 64, BOTTOM_RIGHT),  # few heads and many keys: the backward works in parts
]


@pytest.fixture(params=ISAS)
def isa(request):
    before = _native.cpu.active_isa()
    _native.cpu.select_isa(request.param)
    assert _native.cpu.active_isa() == request.param
    yield request.param
    _native.cpu.select_isa(before)


@pytest.fixture(params=[1, 2, 7])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(shape, dtype, seed=0):
    """q, k, v, do, dlse"""
    b, hq, hk, tq, tk, d, dv, _ = shape
    g = torch.Generator().manual_seed(seed)
    sizes = [(b, hq, tq, d), (b, hk, tk, d), (b, hk, tk, dv), (b, hq, tq, dv)]
    tensors = [torch.randn(size, generator=g).to(dtype) for size in sizes]
    return *tensors, torch.randn((b, hq, tq), generator=g).to(dtype if dtype == torch.float64 else torch.float32)


def visible(tq, tk, causal):
    i, j = torch.arange(tq)[:, None], torch.arange(tk)
    return j <= i + native.band_of(causal, -1, -1, tq, tk)[1]


def plain(q, k, v, do, dlse, causal, scale):
    """The formula in q's dtype: o, lse, dq, dk, dv."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    seen = visible(q.shape[2], k.shape[2], causal)
    s = q @ k.repeat_interleave(group, 1).mT * scale
    s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)
    p = torch.where(seen.any(-1)[:, None], s, 0).softmax(-1).where(seen, 0)
    o = p @ v.repeat_interleave(group, 1)
    finite = torch.where(lse == -math.inf, 0, lse)
    (o * do).sum().add((finite * dlse.to(lse.dtype)).sum()).backward()
    return o.detach(), lse.detach(), q.grad, k.grad, v.grad


def run(q, k, v, do, dlse, causal, scale):
    """The kernels, through their wrappers: o, lse, dq, dk, dv."""
    options = (None,) * 7 + (0, 0, causal, -1, -1, scale, 0.0, 0.0, True)
    assert native.unsupported(q, k, v, *options) is None
    o, lse = native.attention(q, k, v, *options)
    grads = native.attention_backward(do, dlse, q, k, v, o, lse, *options, [True] * 3 + [False] * 3)
    assert [g.numel() for g in grads[3:]] == [0, 0, 0]
    return o, lse, *grads[:3]


def extended(q, k, v, do, dlse, causal, scale):
    """The formula and its gradients written out in numpy's longdouble, 80 bits on x86: o, lse, dq, dk, dv."""
    group, seen = q.shape[1] // k.shape[1], visible(q.shape[2], k.shape[2], causal).numpy()
    q, k, v, do, dlse = (t.numpy().astype(np.longdouble) for t in (q, k, v, do, dlse))
    wide_k, wide_v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = np.where(seen, scale * (q @ wide_k.swapaxes(2, 3)), -np.inf)  # (B, Hq, Tq, Tk)
    top = s.max(-1, keepdims=True)
    e = np.exp(s - np.where(top == -np.inf, 0, top))
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    lse = (top + np.log(np.where(total == 0, 1, total)))[..., 0]
    dp = do @ wide_v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[..., None])
    dk, dv = scale * (ds.swapaxes(2, 3) @ q), p.swapaxes(2, 3) @ do
    dk, dv = (x.reshape(k.shape[0], k.shape[1], group, *x.shape[2:]).sum(2) for x in (dk, dv))
    return p @ wide_v, lse, scale * (ds @ wide_k), dk, dv


def cancelled(q, k, v, do, causal, scale):
    """How far dq and dk may be off where no query sees a second key, by what is lost in dp - delta.

    There the weight is 1 and dp = delta. Plain torch subtracts dp from itself, without an error. A kernel has delta
    from o, so it subtracts two sums of the same products, each good to an ulp of the sum of their absolute values.
    """
    seen = visible(q.shape[2], k.shape[2], causal)
    if seen.sum(-1).max() > 1:
        return {}
    eps = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    q, k, v, do = (t.double().abs() for t in (q, k, v, do))
    products = (do @ v.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).where(seen, 0).max()
    lost = (2 * eps * abs(scale) * products).item()
    return {"dq": lost * k.max().item(), "dk": lost * q.max().item()}


def compare(tensors, causal, scale):
    """Error at most 2x (gradients 3x) that of the plain formula in the same dtype, plus 4 ulps of the largest value."""
    if tensors[0].dtype != torch.float64:
        exact = [t.numpy() for t in plain(*(t.double() for t in tensors), causal, scale)]
    elif np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
        exact = extended(*tensors, causal, scale)
    else:
        pytest.skip("longdouble is no wider than double here, so nothing is more exact than float64")
    at_least = cancelled(*tensors[:4], causal, scale)
    got, same_dtype = run(*tensors, causal, scale), plain(*tensors, causal, scale)
    for name, a, b, c in zip(NAMES, got, exact, same_dtype, strict=True):
        eps = torch.finfo(a.dtype).eps
        a, c = a.double().numpy(), c.double().numpy()
        assert not np.isnan(a).any(), name
        empty = b == -np.inf
        assert np.array_equal(a == -np.inf, empty), name
        if a.size == 0:
            continue
        a, b, c = (np.where(empty, 0, x) for x in (a, b, c))
        error, plain_error, largest = (np.abs(x).max() for x in (a - b, c - b, b))
        allowed = (3 if name.startswith("d") else 2) * plain_error + 4 * eps * largest + at_least.get(name, 0)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(isa, dtype, shape):
    if dtype == torch.float64 and isa != ISAS[0]:
        pytest.skip("float64 is compiled once")
    # At D = 1 a scale of 1 would give single keys the whole weight, and all errors would be those of a few of them.
    compare(make(shape, dtype), shape[-1], min(0.25, shape[5] ** -0.5))


@pytest.mark.parametrize("tk", [1, 63, 64, 65, 257])
@pytest.mark.parametrize("tq", [1, 63, 64, 65, 257])
def test_every_tail(isa, tq, tk):
    for causal in (NONE, BOTTOM_RIGHT, TOP_LEFT):
        compare(make((1, 1, 1, tq, tk, 24, 24, causal), torch.float32), causal, 0.2)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_scale(isa, scale):
    compare(make((1, 2, 2, 70, 70, 32, 32, BOTTOM_RIGHT), torch.float32), BOTTOM_RIGHT, scale)


def test_large_scores(isa):
    """Scores of a hundred: exponentials relative to the row's largest neither overflow nor all vanish."""
    q, k, v, do, dlse = make((1, 2, 2, 100, 100, 64, 64, BOTTOM_RIGHT), torch.float32)
    compare((5 * q, 5 * k, v, do, dlse), BOTTOM_RIGHT, 0.125)


def views(tensors):
    """The same values in other layouts: (B, T, H, D) in memory, slices of longer rows, a last dimension with steps."""
    yield [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    yield [torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]] for t in tensors]
    yield [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    yield [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v_dim", [40, 33])
def test_strides(dtype, v_dim):
    *tensors, dlse = make((2, 4, 2, 65, 70, 40, v_dim, BOTTOM_RIGHT), dtype)
    dense = run(*tensors, dlse, BOTTOM_RIGHT, 0.2)
    for same in views(tensors):
        got = run(*same, dlse, BOTTOM_RIGHT, 0.2)
        for name, a, b in zip(NAMES, got, dense, strict=True):
            assert torch.equal(a, b), name
        for gradient, tensor in zip(got[2:], same, strict=False):
            assert gradient.stride() == torch.empty_like(tensor).stride()
        q_order = sorted(range(4), key=torch.empty_like(same[0]).stride)
        assert sorted(range(4), key=got[0].stride) == q_order


def test_expanded_inputs():
    """A gradient of .sum() has stride 0 everywhere."""
    q, k, v, do, dlse = make((2, 2, 2, 33, 33, 16, 16, TOP_LEFT), torch.float32)
    k, v, do = k[:1].expand_as(k), v[:, :1].expand_as(v), torch.ones(()).expand_as(do)
    got = run(q, k, v, do, dlse, TOP_LEFT, 0.25)
    want = run(q, k.contiguous(), v.contiguous(), do.contiguous(), dlse, TOP_LEFT, 0.25)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_queries_that_see_nothing(isa):
    q, k, v, do, dlse = make((1, 2, 2, 150, 20, 32, 32, BOTTOM_RIGHT), torch.float32)
    o, lse, dq, dk, dv = run(q, k, v, do, dlse, BOTTOM_RIGHT, 0.2)
    assert (o[:, :, :130] == 0).all() and (lse[:, :, :130] == -math.inf).all() and (dq[:, :, :130] == 0).all()
    assert (o[:, :, 130:] != 0).any() and dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 5), (2, 0, 0, 5, 5), (1, 2, 2, 0, 5), (1, 2, 2, 5, 0)], ids=str)
def test_empty(sizes):
    tensors = make((*sizes, 8, 8, NONE), torch.float32)
    o, lse, dq, dk, dv = run(*tensors, NONE, 1.0)
    assert o.shape == tensors[3].shape and (o == 0).all() and (lse == -math.inf).all()
    assert (dq == 0).all() and (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [0, 40, 63, 64, 130, 149])
def test_hidden_rows_contribute_nothing(isa, dtype, row, bad):
    """A NaN or inf in row t of k, v, q or do changes nothing at the positions that do not see it."""
    shape = (1, 2, 1, 150, 150, 40, 40, BOTTOM_RIGHT)
    clean = make(shape, dtype)
    reference = run(*clean, BOTTOM_RIGHT, 0.2)
    for which in range(4):
        spoiled = [t.clone() for t in clean]
        spoiled[which][..., row, 3] = bad
        o, lse, dq, dk, dv = run(*spoiled, BOTTOM_RIGHT, 0.2)
        unaffected_keys = slice(row + 1, None)  # no query up to `row` sees these keys
        if which in (1, 2):  # queries before the row do not see it
            before = slice(0, row)
            for a, b in zip((o, lse, dq), reference, strict=False):
                assert torch.equal(a[:, :, before], b[:, :, before])
            if math.isnan(bad):
                assert o[:, :, row:].isnan().any(-1).all()
        else:  # one query is spoiled: the others, and the keys after it, know nothing of it
            others = torch.arange(150) != row
            assert torch.equal(o[:, :, others], reference[0][:, :, others])
            assert torch.equal(dq[:, :, others], reference[2][:, :, others])
            for a, b in zip((dk, dv), reference[3:], strict=True):
                assert torch.equal(a[:, :, unaffected_keys], b[:, :, unaffected_keys])
            if math.isnan(bad):
                assert dq[:, :, row].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(65, 129), (70, 90), (1, 2)], ids=str)
def test_keys_that_no_query_sees_contribute_nothing(isa, dtype, sizes, bad):
    """An odd number of queries leaves half of a word of two bf16 to padding, which must not see them either."""
    q, k, v, do, dlse = make((1, 2, 1, *sizes, 40, 40, TOP_LEFT), dtype)
    for t in (k, v):
        t[:, :, sizes[0] :] = bad
    *rest, dk, dv = run(q, k, v, do, dlse, TOP_LEFT, 0.2)
    assert all(t.isfinite().all() for t in (*rest, dk, dv))
    assert (dk[:, :, sizes[0] :] == 0).all() and (dv[:, :, sizes[0] :] == 0).all()


def test_visible_nan_propagates(isa):
    q, k, v, do, dlse = make((1, 1, 1, 70, 70, 16, 16, BOTTOM_RIGHT), torch.float32)
    v[0, 0, 30, 5] = math.nan
    k[0, 0, 50, 2] = math.nan
    o, lse, *_ = run(q, k, v, do, dlse, BOTTOM_RIGHT, 0.25)
    assert o[0, 0, 30:, 5].isnan().all() and o[0, 0, :30].isfinite().all() and o[0, 0, 50:].isnan().all()
    assert lse[0, 0, 50:].isnan().all() and lse[0, 0, :50].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[-1]], ids=str)
def test_bits_do_not_depend_on_threads(threads, dtype, shape):
    tensors = make(shape, dtype)
    got = run(*tensors, shape[-1], 0.1)
    torch.set_num_threads(1)
    for name, a, b in zip(NAMES, got, run(*tensors, shape[-1], 0.1), strict=True):
        assert torch.equal(a, b), name


def test_the_missing_gradients():
    """do or dlse not given means zero; gradients not wanted are empty."""
    q, k, v, do, dlse = make((1, 2, 2, 40, 40, 16, 16, TOP_LEFT), torch.float32)
    options = (None,) * 7 + (0, 0, TOP_LEFT, -1, -1, 0.25, 0.0, 0.0, True)
    o, lse = native.attention(q, k, v, *options)

    def backward(do, dlse, wanted=(True, True, True)):
        return native.attention_backward(do, dlse, q, k, v, o, lse, *options, [*wanted, False, False, False])[:3]

    for given, zeros in (((None, dlse), (torch.zeros_like(do), dlse)), ((do, None), (do, torch.zeros_like(dlse)))):
        for a, b in zip(backward(*given), backward(*zeros), strict=True):
            assert torch.equal(a, b)
    assert [g.numel() for g in backward(do, dlse, (True, False, True))] == [q.numel(), 0, v.numel()]


def test_float64_passes_gradcheck():
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            o, lse = native.attention(q, k, v, *options)
            ctx.save_for_backward(q, k, v, o, lse)
            return o, lse

        @staticmethod
        def backward(ctx, do, dlse):
            return native.attention_backward(do, dlse, *ctx.saved_tensors, *options, [True] * 3 + [False] * 3)[:3]

    options = (None,) * 7 + (0, 0, BOTTOM_RIGHT, -1, -1, 0.3, 0.0, 0.0, True)
    q, k, v, *_ = make((1, 2, 1, 7, 9, 5, 3, BOTTOM_RIGHT), torch.float64)
    assert torch.autograd.gradcheck(Attention.apply, [t.requires_grad_() for t in (q, k, v)])


MEASURE = """
import torch
from fastlm.kernels.native import attention as native

def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

torch.set_num_threads({threads})
q, k, v = (torch.randn(1, 1, {length}, 64) for _ in range(3))
options = (None,) * 7 + (0, 0, 1, -1, -1, 0.125, 0.0, 0.0, True)
short = q[:, :, :256].contiguous()
o, lse = native.attention(short, short, short, *options)  # what the first call costs is not at issue
native.attention_backward(o, None, short, short, short, o, lse, *options, [True] * 3 + [False] * 3)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
o, lse = native.attention(q, k, v, *options)
if {backward}:
    native.attention_backward(o, None, q, k, v, o, lse, *options, [True] * 3 + [False] * 3)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_does_not_grow_with_the_square(backward):
    """At 16,384 positions everything allocated, workspaces and outputs, stays within 4 times the outputs."""
    length, dim = 16384, 64
    code = MEASURE.format(length=length, backward=backward, threads=7)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    outputs = (length * dim + length) * 4 + (3 * length * dim * 4 if backward else 0)
    assert outputs <= int(printed) <= 4 * outputs


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({0: torch.ones(1, 1, 2, 257), 1: torch.ones(1, 1, 2, 257)}, "257"),
        ({0: torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)}, "dtype"),
    ],
)
def test_refuses_what_it_does_not_do(changed, word):
    x = torch.ones(1, 1, 2, 4)
    args = [x, x, x, *(None,) * 7, 0, 0, 0, -1, -1, 1.0, 0.0, 0.0, False]
    assert native.unsupported(*args) is None
    for i, value in changed.items():
        args[i] = value
    assert word in native.unsupported(*args)
    assert word in native._unsupported_backward(None, None, *args[:3], None, None, *args[3:], [True] * 6)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({0: torch.ones(1, 1, 2, 4, dtype=torch.float64)}, "float64"),
        ({0: torch.ones(1, 1, 2, 257), 1: torch.ones(1, 1, 2, 257)}, "257"),
    ],
)
def test_what_cuda_refuses(changed, word):
    x = torch.ones(1, 1, 2, 4)
    args = [x, x, x, *(None,) * 7, 0, 0, 0, -1, -1, 1.0, 0.0, 0.0, False]
    assert native.unsupported_cuda(*args) is None
    for i, value in changed.items():
        args[i] = value
    assert word in native.unsupported_cuda(*args)


LAST = (
    -3,
    0,
    1.0,
    0.0,
    0.0,
    0,
    (0, 18, 9, 3),
    1,
)  # lower, diagonal, scale, softcap, dropout_p, seed, elements, threads


def test_border_checks():
    x, lse = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3)
    forward, rest = _native.cpu.attention_forward, (*[None] * 4, *LAST)
    with pytest.raises(ValueError, match=r"attention: k must be float32 \(1, 2, 3, 4\)"):
        forward(x, torch.ones(1, 2, 3, 5), x, x, lse, *rest)
    with pytest.raises(ValueError, match="a multiple of those of k"):
        forward(x, torch.ones(1, 3, 3, 4), x, x, lse, *rest)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        forward(x.mT.contiguous().mT, x, x, x, lse, *rest)
    with pytest.raises(ValueError, match="lse must be float32"):
        forward(x, x, x, x, lse.double(), *rest)
    seen = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask must be bool \(1, 2, 3, 3\)"):
        forward(x, x, x, x, lse, seen[..., :2], *rest[1:])
    with pytest.raises(ValueError, match=r"bias must be float32 \(1, 2, 3, 3\) with a contiguous last dimension"):
        forward(x, x, x, x, lse, seen, seen.float().mT.contiguous().mT, *rest[2:])
    with pytest.raises(ValueError, match=r"slopes must be contiguous float64 \(1, 2\)"):
        forward(x, x, x, x, lse, None, None, torch.ones(1, 2), *rest[3:])
    with pytest.raises(ValueError, match=r"sinks must be contiguous float64 \(1, 2\)"):
        forward(x, x, x, x, lse, None, None, None, torch.ones(2).double(), *rest[4:])
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\)"):
        forward(x, x, x, x, lse, seen, *[None] * 3, -3, 0, 1.0, 0.0, 1.0, *LAST[5:])
