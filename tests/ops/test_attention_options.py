"""Masks, biases, windows and dropout in attention's kernels, against the reference in float64."""

import pytest
import torch
from op_testing import BACKENDS, DTYPES, ISAS, assert_as_exact_as_torch, numbers, poisoned  # noqa: F401
from torch.autograd import gradcheck

import fastlm

# (B, Hq, Hk, Tq, Tk, D, Dv): within a tile, over several, uneven, one query and few
SIZES = [
    (2, 4, 2, 5, 7, 3, 4), (1, 2, 2, 130, 300, 16, 16), (2, 2, 1, 257, 129, 8, 8), (3, 2, 2, 1, 140, 8, 8),
    (2, 2, 1, 3, 150, 70, 90),
]  # fmt: skip


def block_mask(B, Hq, Tq, Tk):
    """Tiles that are empty, full and mixed."""
    row, col = torch.arange(Tq)[:, None] // 50, torch.arange(Tk)[None, :] // 90
    some = numbers((B, Hq, Tq, Tk), seed=21) > 0
    return torch.where((row + col) % 3 == 0, False, torch.where((row + col) % 3 == 1, True, some))


def packed(Tq, Tk):
    """Sequences of which one has no queries and one no keys."""
    ends_q, ends_k = [0, Tq // 3, Tq // 3, Tq // 2, Tq], [0, Tk // 2, Tk * 2 // 3, Tk * 2 // 3, Tk]
    return {"cu_seqlens_q": torch.tensor(ends_q), "cu_seqlens_k": torch.tensor(ends_k, dtype=torch.int32)}


# Tensors among the options that have a gradient.
WITH_GRADIENT = ("bias", "alibi_slopes", "sinks")

# name -> (B, Hq, Tq, Tk) -> options
OPTIONS = {
    "mask": lambda B, H, Tq, Tk: {"mask": numbers((B, H, Tq, Tk), seed=20) > -0.5},
    "tiles": lambda B, H, Tq, Tk: {"mask": block_mask(B, H, Tq, Tk)},
    "padding": lambda B, H, Tq, Tk: {"mask": (torch.arange(Tk) < (Tk + 1) // 2)[None, None, None]},
    "rows that see nothing": lambda B, H, Tq, Tk: {"mask": (torch.arange(Tq) % 3 != 1)[:, None], "causal": True},
    "mask, turned": lambda B, H, Tq, Tk: {"mask": (numbers((1, H, Tk, Tq), seed=20) > 0).mT},
    "bias": lambda B, H, Tq, Tk: {"bias": numbers((B, H, Tq, Tk), seed=22)},
    "bias of all heads": lambda B, H, Tq, Tk: {"bias": numbers((Tq, Tk), seed=22), "causal": True},
    "bias of keys": lambda B, H, Tq, Tk: {"bias": numbers((B, 1, 1, Tk), seed=22)},
    "bias of queries": lambda B, H, Tq, Tk: {"bias": numbers((1, H, Tq, 1), seed=22)},
    "window": lambda B, H, Tq, Tk: {"window": (40, 3)},
    "causal window": lambda B, H, Tq, Tk: {"window": 70, "causal": True},
    "narrow window": lambda B, H, Tq, Tk: {"window": 0},
    "one-sided window": lambda B, H, Tq, Tk: {"window": (-1, 2)},
    "dropout": lambda B, H, Tq, Tk: {"dropout_p": 0.3, "seed": torch.tensor(-5)},
    "softcap": lambda B, H, Tq, Tk: {"softcap": 0.8, "causal": True, "scale": 1.0},
    "alibi": lambda B, H, Tq, Tk: {"alibi_slopes": numbers((H,), seed=23).abs() / 8, "causal": True},
    "alibi of each row": lambda B, H, Tq, Tk: {"alibi_slopes": numbers((B, H), seed=23) / 8},
    "alibi of nothing": lambda B, H, Tq, Tk: {"alibi_slopes": torch.zeros(H)},
    "sinks": lambda B, H, Tq, Tk: {"sinks": numbers((H,), seed=24), "window": 3},
    "sinks and rows that see nothing": lambda B, H, Tq, Tk: {
        "sinks": numbers((H,), seed=24), "mask": (torch.arange(Tq) % 3 != 1)[:, None],
    },
    "packed": lambda B, H, Tq, Tk: {"causal": True, **packed(Tq, Tk)},
    "everything": lambda B, H, Tq, Tk: {
        "mask": block_mask(B, H, Tq, Tk), "bias": numbers((1, H, Tq, Tk), seed=22), "causal": "top_left",
        "window": (100, -1), "dropout_p": 0.1, "seed": torch.tensor(2**40 + 3), "scale": 0.7, "softcap": 1.5,
        "alibi_slopes": numbers((H,), seed=23) / 8, "sinks": numbers((H,), seed=24),
    },
    "everything, packed": lambda B, H, Tq, Tk: {
        "mask": block_mask(B, H, Tq, Tk), "bias": numbers((B, H, Tq, Tk), seed=22), "causal": True,
        "window": (60, -1), "dropout_p": 0.1, "seed": torch.tensor(7), "softcap": 2.0,
        "alibi_slopes": numbers((B, H), seed=23) / 8, "sinks": numbers((H,), seed=24), **packed(Tq, Tk),
    },
}  # fmt: skip


def fits(options, B):
    return B == 1 or "cu_seqlens_q" not in options


def operands(B, Hq, Hk, Tq, Tk, D, Dv, dtype):
    shapes = ((B, Hq, Tq, D), (B, Hk, Tk, D), (B, Hk, Tk, Dv))
    return [numbers(shape, torch.float64, seed).to(dtype) for seed, shape in enumerate(shapes)]


def run(given, options, dtype, do, dlse):
    """o, lse and the gradients of q, k, v and of what else has one."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in given]
    options = dict(options)
    for name in WITH_GRADIENT:
        if name in options:
            options[name] = options[name].to(dtype).requires_grad_()
            leaves.append(options[name])
    o, lse = fastlm.attention(*leaves[:3], **options, return_lse=True)
    finite = lse.isfinite()  # a query that sees nothing has no lse to differentiate
    loss = (o * do.to(o.dtype)).sum() + torch.where(finite, lse * dlse.to(lse.dtype), 0).sum()
    return [o.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_exact_as_the_reference(name, dtype, backend, poisoned):  # noqa: F811
    for sizes in SIZES:
        B, Hq, _, Tq, Tk, *_ = sizes
        options, given = OPTIONS[name](B, Hq, Tq, Tk), operands(*sizes, dtype)
        if not fits(options, B):
            continue
        extras = [name for name in WITH_GRADIENT if name in options]
        for extra in extras:
            options[extra] = options[extra].to(dtype)
        do, dlse = numbers((B, Hq, Tq, sizes[-1]), dtype, 7), numbers((B, Hq, Tq), seed=8)
        ours = run(given, options, dtype, do, dlse)
        with fastlm.use_backend("reference"):
            exact, plain = (run(given, options, of, do, dlse) for of in (torch.float64, dtype))
        names = ("o", "lse", "dq", "dk", "dv", *extras)
        for what, *values in zip(names, ours, exact, plain, strict=True):
            if what == "lse":
                torch.testing.assert_close(values[0].double(), values[1], atol=2e-5, rtol=1e-5)
            else:
                assert_as_exact_as_torch(*values, 3, f"{what} of {name} at {sizes}")


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_kernel_takes_it(name):
    sizes = SIZES[1]
    B, Hq, _, Tq, Tk, *_ = sizes
    options = OPTIONS[name](B, Hq, Tq, Tk)
    statuses = fastlm.backends("attention", **dict(zip("qkv", operands(*sizes, torch.float32), strict=True)), **options)
    assert statuses[0] == ("native", True, "")


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.parametrize(
    "name",
    ["tiles", "bias", "bias of all heads", "causal window", "dropout", "softcap", "alibi", "alibi of each row", "sinks",
     "packed", "everything", "everything, packed"],
)  # fmt: skip
def test_gradients_through_the_kernel(name):
    B, *rest = SIZES[0]
    B = B if fits(OPTIONS[name](B, 4, 5, 7), B) else 1
    options = OPTIONS[name](B, 4, 5, 7)
    extras = {n: options.pop(n).double().requires_grad_() for n in WITH_GRADIENT if n in options}
    given = [t.requires_grad_() for t in operands(B, *rest, torch.float64)]

    def attend(q, k, v, *values):
        return fastlm.attention(q, k, v, **options, **dict(zip(extras, values, strict=True)))

    with fastlm.use_backend("native"):
        assert gradcheck(attend, (*given, *extras.values()))


@pytest.mark.parametrize(
    "name", ["mask", "tiles", "window", "causal window", "softcap", "alibi", "sinks", "packed", "everything"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Tq", [70, 4])
def test_what_is_not_seen_does_not_leak(name, bad, backend, Tq):
    """A key that no query sees, and one that some do not: those get what they get without it."""
    sizes = (1, 2, 2, Tq, 150, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        options = OPTIONS[name](1, 2, Tq, 150)
        options.pop("dropout_p", None)
        hidden = torch.zeros(Tq, 150, dtype=torch.bool)
        hidden[:, 140], hidden[::2, 3] = True, True  # of key 3, by every other query
        options["mask"] = options.get("mask", torch.ones(Tq, 150, dtype=torch.bool)) & ~hidden
        q, k, v = operands(*sizes, dtype)
        spoiled_k, spoiled_v = k.clone(), v.clone()
        spoiled_k[:, :, 140], spoiled_v[:, :, 140], spoiled_v[:, :, 3] = bad, bad, bad
        do, dlse = numbers((1, 2, Tq, 8), dtype, 7), numbers((1, 2, Tq), seed=8)
        do[:, :, 1::2] = 0  # of those that may see key 3
        clean, spoiled = (
            run([q, k, v], options, dtype, do, dlse),
            run([q, spoiled_k, spoiled_v], options, dtype, do, dlse),
        )
        assert torch.equal(clean[0][:, :, ::2], spoiled[0][:, :, ::2])
        assert torch.equal(clean[2][:, :, ::2], spoiled[2][:, :, ::2])  # dq
        for i in (3, 4):  # no gradient of key 140
            assert not spoiled[i][:, :, 140].any()


@pytest.mark.parametrize("Tq", [1, 4, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_seen_and_not_a_number_shows(backend, Tq):
    q, k, v = operands(1, 2, 2, Tq, 300, 8, 8, torch.float32)
    assert fastlm.attention(torch.full_like(q, float("nan")), k, v).isnan().all()
    for t in (k, v):
        before = t.clone()
        t[:, :, :128] = float("nan")
        assert fastlm.attention(q, k, v).isnan().all()
        t.copy_(before)


@pytest.mark.parametrize("sizes", [(1, 0, 2, 8, 8, 16, 16), (0, 2, 2, 8, 8, 16, 16), (2, 2, 1, 0, 8, 16, 16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_nothing(backend, sizes):
    leaves = [t.requires_grad_() for t in operands(*sizes, torch.float32)]
    leaves.append(torch.zeros(sizes[3], sizes[4], requires_grad=True))
    o = fastlm.attention(*leaves[:3], bias=leaves[3])
    assert o.numel() == 0
    assert not any(g.any() for g in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("name", ["everything", "everything, packed"])
def test_bits_do_not_depend_on_threads(name, threads):
    sizes, before = (1, 2, 1, 300, 600, 16, 16), torch.get_num_threads()
    options, given = OPTIONS[name](1, 2, 300, 600), operands(*sizes, torch.float32)
    do, dlse = numbers((1, 2, 300, 16), seed=7), numbers((1, 2, 300), seed=8)
    try:
        results = []
        for n in (threads, 1):
            torch.set_num_threads(n)
            results.append(run(given, options, torch.float32, do, dlse))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(2, 1, 70), (1, 3, 70), (1, 1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_lse_in_any_order_of_strides(backend, sizes):
    """A size-1 dimension may have any stride in what autograd hands back."""
    B, H, T = sizes
    weight = numbers((H, B, T), seed=5)
    for turned, w in (((0, 1), weight), ((1, 2), weight.permute(1, 2, 0)), (None, None)):
        found = []
        for of in (torch.float32, torch.float64):
            q, k, v = (numbers((B, H, T, 8), seed=i).to(of).requires_grad_() for i in range(3))
            _, lse = fastlm.attention(q, k, v, causal=True, return_lse=True)
            loss = lse.sum() if turned is None else (lse.transpose(*turned) * w.to(of)).sum()
            found.append(torch.autograd.grad(loss, (q, k)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("Tq", [3, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_without_bounds(backend, Tq):
    """-inf is no sink, also for a query that sees no key; +inf has all of the weight."""
    q, k, v = (t.requires_grad_() for t in operands(1, 2, 2, Tq, 90, 8, 8, torch.float32))
    sinks = torch.tensor([float("-inf"), float("inf")])
    mask = (torch.arange(Tq) != 1)[:, None]
    o, lse = fastlm.attention(q, k, v, sinks=sinks, mask=mask, return_lse=True)
    want, want_lse = fastlm.attention(q, k, v, mask=mask, return_lse=True)
    torch.testing.assert_close(o[:, 0], want[:, 0])
    torch.testing.assert_close(lse[:, 0], want_lse[:, 0])
    assert not o[:, 1].any() and (lse[:, 1] == float("inf")).all()
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in (dq, dk, dv)) and not dq[:, 1].any()
    none = torch.full((2,), float("-inf"), requires_grad=True)
    o = fastlm.attention(q, k, v, sinks=none, mask=mask)
    assert torch.equal(torch.autograd.grad(o.sum(), none)[0], torch.zeros(2))
