"""attention_decode against attention on the keys that are there, in every layout of the cache."""

import pytest
import torch
from op_testing import BACKENDS, DTYPES, ISAS, assert_as_exact_as_torch, numbers, overload, poisoned  # noqa: F401
from torch.autograd import gradcheck

import fastlm

# (Hq, Hk, Tq, capacity, D, Dv, page size, filled)
SIZES = [
    (4, 2, 1, 24, 8, 8, 4, [24, 1, 13]), (2, 2, 3, 300, 70, 90, 50, [300, 3, 129]),
    (6, 1, 9, 160, 16, 16, 16, [33, 9, 160]),
    (2, 2, 70, 256, 40, 24, 128, [256, 70, 131]),
]  # fmt: skip
OPTIONS = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": (40, 0)},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "everything": {"window": 100, "softcap": 1.5, "alibi_slopes": True, "sinks": True, "scale": 0.4},
}


def caches(sizes, dtype, paged):
    """q, the caches, filled, the page table; and the keys and values of each row, one behind the other."""
    Hq, Hk, Tq, capacity, D, Dv, page, filled = sizes
    B = len(filled)
    q, k, v = (
        numbers((B, h, t, d), torch.float64, i).to(dtype)
        for i, (h, t, d) in enumerate([(Hq, Tq, D), (Hk, capacity, D), (Hk, capacity, Dv)])
    )
    dense = [(k[b : b + 1, :, :n], v[b : b + 1, :, :n]) for b, n in enumerate(filled)]
    lens = torch.tensor(filled, dtype=torch.int32, device=q.device)
    for t in (k, v):  # what is not filled must not count
        for b, n in enumerate(filled):
            t[b, :, n:] = float("nan")
    if not paged:
        return q, k, v, lens, None, dense
    pages = capacity // page
    order = torch.randperm(B * pages, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(q.device)
    in_pages = [t.unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)[order] for t in (k, v)]
    table = order.argsort().view(B, pages).int()
    for b, n in enumerate(filled):
        table[b, -(-n // page) :] = -7  # is not looked at
    return q, *in_pages, lens, table, dense


def given(name, sizes, dtype):
    options = dict(OPTIONS[name])
    for extra in ("alibi_slopes", "sinks"):
        if extra in options:
            options[extra] = (numbers((sizes[0],), seed=23) / 8).to(dtype)
    return options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_exact_as_attention(name, paged, dtype, backend, poisoned):  # noqa: F811
    for sizes in SIZES:
        q, k, v, lens, table, dense = caches(sizes, dtype, paged)
        options = given(name, sizes, dtype)
        o, lse = fastlm.attention_decode(q, k, v, cache_seqlens=lens, page_table=table, **options, return_lse=True)
        causal = options.pop("causal", True)
        for b, (keys, values) in enumerate(dense):
            with fastlm.use_backend("reference"):
                exact, plain = (
                    fastlm.attention(
                        *(t.to(of) for t in (q[b : b + 1], keys, values)), causal=causal, return_lse=True, **options
                    )
                    for of in (torch.float64, dtype)
                )
            assert_as_exact_as_torch(o[b : b + 1], exact[0], plain[0], 3, f"o of {name} at {sizes}, row {b}")
            torch.testing.assert_close(lse[b : b + 1].double(), exact[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_new_keys_go_behind_the_others(paged, backend):
    sizes = (4, 2, 3, 24, 8, 8, 4, [20, 1, 13])
    q, k, v, lens, table, _ = caches(sizes, torch.float32, paged)
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    if paged:  # no page twice
        table = torch.arange(table.numel(), device=q.device).view(table.shape)
    new_k, new_v = numbers((3, 2, 3, 8), seed=8), numbers((3, 2, 3, 8), seed=9)
    rows = (lambda c: c[table.long()].transpose(1, 2).flatten(2, 3)) if paged else (lambda c: c)
    want = [rows(c).clone() for c in (k, v)]
    for b, n in enumerate(lens.tolist()):
        want[0][b, :, n : n + 3], want[1][b, :, n : n + 3] = new_k[b], new_v[b]
    versions = [t._version for t in (k, v, q, lens, new_k, new_v)]
    o = fastlm.attention_decode(q, k, v, cache_seqlens=lens, k=new_k, v=new_v, page_table=table)
    risen = [t._version > was for t, was in zip((k, v, q, lens, new_k, new_v), versions, strict=True)]
    assert risen == [True, True, False, False, False, False]
    for cache, expected in zip((k, v), want, strict=True):
        torch.testing.assert_close(rows(cache), expected)
    torch.testing.assert_close(o, fastlm.attention_decode(q, k, v, cache_seqlens=lens + 3, page_table=table))
    assert lens.tolist() == [20, 1, 13]


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_by_step_equals_all_at_once(backend):
    q, k, v = (numbers((2, 4, 12, 16), seed=i) for i in range(3))
    want = fastlm.attention(q, k, v, causal=True)
    k_cache, v_cache = (torch.empty(2, 16, 4, 16, device=q.device).transpose(1, 2) for _ in range(2))
    at = 0
    for step in (5, 1, 1, 4, 1):
        new = [t[:, :, at : at + step] for t in (q, k, v)]
        lens = torch.full((2,), at, device=q.device)
        o = fastlm.attention_decode(new[0], k_cache, v_cache, cache_seqlens=lens, k=new[1], v=new[2])
        torch.testing.assert_close(o, want[:, :, at : at + step])
        at += step


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_cache_and_rows_that_see_nothing(backend):
    q, k, v = (numbers((2, 2, 3, 8), seed=i) for i in range(3))
    o, lse = fastlm.attention_decode(q, k, v, cache_seqlens=torch.tensor([0, 2], device=q.device), return_lse=True)
    assert not o[0].any() and (lse[0] == -torch.inf).all()
    assert not o[1, :, 0].any() and o[1, :, 1:].all() and (lse[1, :, 0] == -torch.inf).all()
    assert (
        fastlm.attention_decode(q[:0], k[:0], v[:0], cache_seqlens=torch.zeros(0, dtype=torch.int32)).shape
        == q[:0].shape
    )


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(paged, backend):
    q, k, v, lens, table, _ = caches(SIZES[0], torch.float32, paged)
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    table = None if table is None else table.clamp(min=0).long()
    torch.library.opcheck(
        overload("attention_decode", backend), (q, k, v, lens.long(), table, None, None, -1, 0, 0.3, 0.0)
    )


def test_gradients():
    q, k, v, lens, table, _ = caches(SIZES[0], torch.float64, True)
    leaves = [t.nan_to_num(0).requires_grad_() for t in (q, k, v)]
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda q, k, v, s: fastlm.attention_decode(q, k, v, cache_seqlens=lens, page_table=table, sinks=s),
        (*leaves, sinks),
    )


def test_compile():
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, lens, k, v):
        return fastlm.attention_decode(q, k_cache, v_cache, cache_seqlens=lens, k=k, v=v) * 2

    compiled = torch.compile(step, fullgraph=True)
    for T in (1, 1, 2):
        q, k, v = (numbers((2, 2, T, 8), seed=i) for i in range(3))
        a, b = ([numbers((2, 2, 9, 8), seed=i) for i in (3, 4)] for _ in range(2))
        lens = torch.tensor([3, 5])
        torch.testing.assert_close(compiled(q, *a, lens, k, v), step(q, *b, lens, k, v))
        for ours, theirs in zip(a, b, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
def test_the_kernel_takes_it_and_checks_what_it_reads():
    q, k, v, lens, table, _ = caches(SIZES[0], torch.float32, True)
    op = torch.ops.fastlm_native.attention_decode
    last = (None, None, -1, 0, 0.3, 0.0)
    with pytest.raises(ValueError, match=r"pages\[0, 2\] must be from 0 to 17, got 18"):
        op(q, k, v, lens.long(), torch.where(torch.arange(6) == 2, 18, table.long()), *last)
    with pytest.raises(ValueError, match=r"k_lens\[1\] must be from 0 to 24, got 25"):
        op(q, k, v, torch.tensor([1, 25, 1]), table.long(), *last)


Q, CACHE, LENS = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 6, 8), torch.tensor([3, 6])
TABLE = torch.tensor([[0, 1], [0, 0]])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": Q[0]}, ValueError, "q must have 4 dimensions, got (4, 1, 8)"),
        ({"q": Q.long()}, TypeError, "q must be floating point, got torch.int64"),
        ({"k_cache": CACHE.half()}, TypeError, "k_cache must have the dtype of q, torch.float32, got torch.float16"),
        ({"k_cache": CACHE[:1]}, ValueError, "k_cache must be (B, Hk, S, D) with B = 2 of q, got (1, 2, 6, 8)"),
        ({"k_cache": CACHE[..., :4]}, ValueError, "k_cache must have the head dim of q, 8, at least 1"),
        ({"v_cache": CACHE[:, :1]}, ValueError, "v_cache must have the sizes of k_cache but the last"),
        ({"q": Q[:, :3]}, ValueError, "the heads of q must be a multiple of those of k_cache, got 3 and 2"),
        ({"cache_seqlens": LENS.float()}, ValueError, "cache_seqlens must be (B,) = (2,) of int32 or int64"),
        ({"cache_seqlens": torch.tensor([3, 7])}, ValueError, "cache_seqlens[1] must be from 0 to 6, for 0 more keys"),
        ({"k": CACHE}, ValueError, "k and v must be given together"),
        ({"k": CACHE[:, :, :1], "v": CACHE[:, :, :1]}, ValueError, "cache_seqlens[1] must be from 0 to 5, for 1 more"),
        ({"k": CACHE[:, :1], "v": CACHE[:, :1]}, ValueError, "k must be (B, Hk, T, D) = (2, 2, T, 8)"),
        ({"page_table": TABLE.float()}, ValueError, "page_table must be (B, n) of int32 or int64 with B = 2"),
        ({"page_table": 2 - TABLE}, ValueError, "page_table[0] must hold pages, 0 to 1, got 2"),
        ({"window": (1, 2, 3)}, ValueError, "window must be an int or (left, right), -1 or more each, got (1, 2, 3)"),
        ({"causal": "top_left"}, ValueError, "causal must be True, 'bottom_right' or False, got 'top_left'"),
        ({"sinks": torch.ones(4, dtype=torch.bool)}, TypeError, "sinks must be floating point, got torch.bool"),
        ({"softcap": 0.0}, ValueError, "softcap must be from 1e-30 to 1e30, or None, got 0.0"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes must be (Hq,) = (4,) or (B, Hq) = (2, 4)"),
        ({"sinks": torch.ones(3)}, ValueError, "sinks must be (Hq,) = (4,), got (3,)"),
        ({"cache_seqlens": LENS.to("meta")}, ValueError, "cache_seqlens must be on the device of q, cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_input(change, error, words):
    arguments = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "cache_seqlens": LENS} | change
    with pytest.raises(error) as raised:
        fastlm.attention_decode(**arguments)
    assert str(raised.value).startswith(f"fastlm.attention_decode: {words}")


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    """Pages end within tiles of keys, and the height of a block of queries follows the number of threads."""
    q, k, v, lens, table, _ = caches((2, 2, 300, 1000, 16, 16, 200, [1000]), dtype, True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(fastlm.attention_decode(q, k, v, cache_seqlens=lens, page_table=table, window=(100, 0)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(not ISAS, reason="no compiled CPU module")
def test_a_call_that_cannot_run_writes_nothing():
    q, cache, new = torch.ones(1, 1, 1, 300), torch.zeros(1, 1, 4, 300), torch.ones(1, 1, 1, 300)
    lens = torch.tensor([1])
    with fastlm.use_backend("native"), pytest.raises(NotImplementedError, match="from 1 to 256, not 300"):
        fastlm.attention_decode(q, cache, cache, cache_seqlens=lens, k=new, v=new)
    assert not cache.any()
    asked = fastlm.backends("attention_decode", q=q, k_cache=cache, v_cache=cache, cache_seqlens=lens, k=new, v=new)
    assert (asked[0].backend, asked[0].usable) == ("native", False) and not cache.any()
