"""attention through the op: every option, gradient and transform on the reference, and the other backends beside it."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import BACKENDS, DTYPES, ISAS, assert_as_exact_as_torch, numbers, overload
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

import fastlm


def qkv(B=2, Hq=4, Hk=2, Tq=5, Tk=7, D=3, Dv=4, dtype=torch.float64):
    shapes = ((B, Hq, Tq, D), (B, Hk, Tk, D), (B, Hk, Tk, Dv))
    return [numbers(s, dtype, seed).requires_grad_() for seed, s in enumerate(shapes)]


MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(9)) > 0.4
OPTIONS = {
    "plain": {},
    "bottom right": {"causal": True},
    "top left": {"causal": "top_left"},
    "more queries than keys": {"causal": True, "lengths": (7, 5)},  # the first two queries see nothing
    "window": {"window": (2, 1)},
    "causal window": {"causal": True, "window": 2},
    "mask": {"mask": MASK},
    "row without a key": {"mask": MASK & (torch.arange(5) != 2)[:, None]},
    "softcap": {"softcap": 1.5, "causal": True},
    "dropout": {"dropout_p": 0.3, "seed": torch.tensor(5)},
    "scale": {"scale": 0.3},
    "packed": {"cu_seqlens_q": torch.tensor([0, 2, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 4, 7]), "causal": True},
}


def problem(name):
    options = dict(OPTIONS[name])
    Tq, Tk = options.pop("lengths", (5, 7))
    return qkv(B=1 if name == "packed" else 2, Tq=Tq, Tk=Tk), options


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_every_order(name):
    inputs, options = problem(name)

    def f(*t):
        return fastlm.attention(*t, **options, return_lse=True)

    def finite(*t):
        o, lse = f(*t)
        return o, torch.where(lse.isfinite(), lse, 0)

    assert gradcheck(finite, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(finite, inputs)


@pytest.mark.parametrize("backend", ["native-baseline", "reference"] if ISAS else ["reference"])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_gradients_through_the_kernels(causal, backend):
    inputs = qkv()
    assert gradcheck(lambda *t: fastlm.attention(*t, causal=causal, return_lse=True), inputs)
    assert gradgradcheck(lambda *t: fastlm.attention(*t, causal=causal, return_lse=True), inputs)


def test_gradients_of_bias_slopes_and_sinks():
    q, k, v = qkv()
    extras = [numbers(s, torch.float64, i).requires_grad_() for i, s in enumerate([(1, 4, 5, 7), (4,), (4,), (5, 1)])]

    def f(q, k, v, bias, slopes, sinks, row_bias):
        o = fastlm.attention(
            q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, causal=True, softcap=2.0, dropout_p=0.2,
            seed=torch.tensor(3), return_lse=True,
        )  # fmt: skip
        return *o, fastlm.attention(q, k, v, bias=row_bias)

    assert gradcheck(f, (q, k, v, *extras), check_forward_ad=True)
    assert gradgradcheck(f, (q, k, v, *extras))


@pytest.mark.parametrize("always", [False, True])
def test_deterministic_algorithms_overrule_the_option(always):
    """What kernels are told: only an explicit False lets bits differ, and not where torch is to be deterministic."""
    from fastlm.ops.attention import _arguments

    traced = []

    def record(graph, _inputs):
        traced.extend(n.args[-1] for n in graph.graph.nodes if n.target is torch.ops.fastlm.attention.default)
        return graph

    @torch.compile(backend=record, fullgraph=True)
    def attend(*qkv):
        return [fastlm.attention(*qkv, deterministic=given) for given in (None, True, False)]

    inputs = [t.detach() for t in qkv()]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(always)
    try:
        eager = [_arguments(*inputs, deterministic=given)[-1] for given in (None, True, False)]
        with fastlm.use_backend("auto"):  # the reference is traced into
            attend(*inputs)
    finally:
        torch.use_deterministic_algorithms(before)
    assert eager == traced == [True, True, always]


def test_third_derivative():
    q, k, v = qkv(B=1, Hq=1, Hk=1, Tq=3, Tk=3, D=2, Dv=2)

    def third(attend):
        g = attend(q, k, v).pow(3).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), q, create_graph=True)
        return g

    def plain(q, k, v):
        s = (q @ k.mT * 2**-0.5).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
        return s.softmax(-1) @ v

    torch.testing.assert_close(third(lambda *t: fastlm.attention(*t, causal=True)), third(plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_exact_as_torch(backend, dtype):
    for B, Hq, Hk, Tq, Tk, D, causal in [
        (2, 4, 4, 65, 65, 64, True), (1, 4, 1, 63, 130, 40, False),
        (8, 4, 4, 1, 77, 111, False),  # one query: over two heads, the largest errors would be a matter of luck
        (2, 2, 1, 129, 129, 128, True), (0, 2, 2, 3, 3, 8, True), (1, 2, 2, 0, 3, 8, False), (1, 1, 1, 3, 0, 8, False),
    ]:  # fmt: skip
        inputs = [t.detach() for t in qkv(B, Hq, Hk, Tq, Tk, D, D, torch.float32)]
        do = numbers((B, Hq, Tq, D), dtype, 7)
        results = []
        theirs = F.scaled_dot_product_attention
        for attend, of in (
            (fastlm.scaled_dot_product_attention, dtype), (theirs, torch.float64), (theirs, dtype)
        ):  # fmt: skip
            leaves = [t.to(dtype).to(of, copy=True).requires_grad_() for t in inputs]
            o = attend(*leaves, is_causal=causal, enable_gqa=Hq != Hk)
            o.backward(do.to(of))
            results.append([o.detach(), *(t.grad for t in leaves)])
        for what, factor, *values in zip(("o", "dq", "dk", "dv"), (2, 3, 3, 3), *results, strict=True):
            assert_as_exact_as_torch(*values, factor, f"{what} at {(B, Hq, Hk, Tq, Tk, D, causal)}")


def test_drop_in_shapes_and_masks():
    q, k, v = (numbers((2, 3, 4, 9, 8), seed=i) for i in range(3))
    mask = numbers((9, 9), seed=4) > -0.5
    for lead in (..., 0, (0, 0), (0, 0, 0)):
        for attn_mask in (None, mask, mask.float(), mask[:1], numbers((9, 1), seed=3)):
            ours, theirs = (
                f(q[lead], k[lead], v[lead], attn_mask)
                for f in (fastlm.scaled_dot_product_attention, F.scaled_dot_product_attention)
            )
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        fastlm.scaled_dot_product_attention(q, k[:1], v[:, :1, :1], is_causal=True, scale=0.2),
        F.scaled_dot_product_attention(q, k[:1].expand_as(q), v[:, :1, :1].expand_as(q), is_causal=True, scale=0.2),
    )
    past, bias = torch.ones(9, 9).tril().bool(), mask.float()
    for attn_mask, both in ((mask, mask & past), (bias, bias.masked_fill(~past, -torch.inf))):
        torch.testing.assert_close(
            fastlm.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=True),
            F.scaled_dot_product_attention(q, k, v, both).nan_to_num(0),  # rows that see nothing
        )
    for empty in (q[:0, 0, 0], q[:, 0, :0]):  # as three dimensions the first are heads
        assert fastlm.scaled_dot_product_attention(empty, empty, empty).shape == empty.shape
    dropped = fastlm.scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=0.5)
    assert abs(dropped.mean().item() - 1) < 0.1 and dropped.std() > 0.1


def test_packed_sequences_equal_separate_ones():
    q, k, v = (t.detach() for t in qkv(B=1, Tq=9, Tk=9, D=8, Dv=8))
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    packed = fastlm.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5)
    apart = [fastlm.attention(*(t[:, :, a:b] for t in (q, k, v)), causal=True) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(packed, torch.cat(apart, dim=2))


def test_alibi_and_sinks_mean_what_they_say():
    q, k, v = (t.detach() for t in qkv())
    i, j = torch.arange(5)[:, None], torch.arange(7)
    slopes, sinks = torch.rand(4).double(), torch.randn(4).double()
    torch.testing.assert_close(
        fastlm.attention(q, k, v, alibi_slopes=slopes),
        fastlm.attention(q, k, v, bias=-slopes[:, None, None] * (i + 2 - j).abs()),
    )
    o, lse = fastlm.attention(q, k, v, return_lse=True)
    with_sink, lse_sink = fastlm.attention(q, k, v, sinks=sinks, return_lse=True)
    torch.testing.assert_close(lse_sink, torch.logaddexp(lse, sinks[:, None].expand_as(lse)))
    torch.testing.assert_close(with_sink, o * (lse - lse_sink).exp()[..., None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_seen_does_not_leak(backend):
    q, k, v = (t.detach().float() for t in qkv(B=1, Hq=2, Hk=2, Tq=70, Tk=70, D=16, Dv=16))
    clean = [t.clone().requires_grad_() for t in (q, k, v)]
    dirty = [t.clone() for t in (q, k, v)]
    dirty[1][:, :, 66], dirty[2][:, :, 67], dirty[2][:, :, 68] = float("nan"), float("inf"), float("nan")
    dirty = [t.requires_grad_() for t in dirty]
    results = []
    for inputs in (clean, dirty):
        o = fastlm.attention(*inputs, causal=True)
        results.append((o[:, :, :66], *torch.autograd.grad(o[:, :, :66].sum(), inputs)))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1][:, :, :66], results[0][1][:, :, :66])
    assert fastlm.attention(*dirty, causal=True)[:, :, 66:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(backend):
    q, k, v = (t.detach().float().requires_grad_() for t in qkv(Tq=7, Tk=5, D=8, Dv=8))
    o, lse = fastlm.attention(q, k, v, causal=True, return_lse=True)
    assert (o[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all()
    (dq,) = torch.autograd.grad(o.sum(), q)
    assert (dq[:, :, :2] == 0).all() and dq.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_strides(backend):
    packed = numbers((2, 65, 3, 4, 24))  # (B, T, 3, H, D), as a fused projection gives it
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    before = packed.clone()
    o = fastlm.attention(q, k, v, causal=True)
    want = fastlm.attention(*(t.contiguous() for t in (q, k, v)), causal=True)
    torch.testing.assert_close(o, want)
    assert o.transpose(1, 2).is_contiguous()
    last = numbers((2, 4, 24, 65)).transpose(-1, -2)
    torch.testing.assert_close(fastlm.attention(last, k, v), fastlm.attention(last.contiguous(), k, v))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    fastlm.attention(*leaves).sum().backward()  # an expanded gradient
    want = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    F.scaled_dot_product_attention(*want).sum().backward()
    for ours, theirs in zip(leaves, want, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=1e-4)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    inputs = [t.detach().float().requires_grad_() for t in qkv(D=8, Dv=8)]
    torch.library.opcheck(overload("attention", backend), inputs)
    o, lse = (t.detach() for t in fastlm.attention(*inputs, return_lse=True))
    torch.library.opcheck(overload("attention_backward", backend), (o, None, *inputs, o, lse))


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_compile(choice):
    torch._dynamo.reset()
    with fastlm.use_backend(choice):
        compiled = torch.compile(lambda q, k, v: fastlm.attention(q * 2, k, v, causal=True).sin(), fullgraph=True)
        for T in (16, 24, 33):
            a, b = ([t.detach().float().requires_grad_() for t in qkv(Tq=T, Tk=T, D=8, Dv=8)] for _ in range(2))
            out = compiled(*a)
            want = fastlm.attention(b[0] * 2, b[1], b[2], causal=True).sin()
            out.sum().backward()
            want.sum().backward()
            torch.testing.assert_close(out, want)
            for ours, theirs in zip(a, b, strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=1e-4)


def test_transforms():
    q, k, v = (t.detach() for t in qkv(Hq=2, Hk=2, Tq=4, Tk=4, D=3, Dv=3))

    def ours(q):
        return fastlm.attention(q[None], k[:1], v[:1], causal=True).pow(2).sum()

    def theirs(q):
        s = (q[None] @ k[:1].mT * 3**-0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
        return (s.softmax(-1) @ v[:1]).pow(2).sum()

    for transform, x in (
        (grad, q[0]),
        (hessian, q[0]),
        (lambda f: vmap(grad(f)), q),
        (lambda f: grad(lambda t: vmap(f)(t).sum()), q),
        (lambda f: lambda t: jvp(f, (t,), (t.flip(0),))[1], q[0]),
    ):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))


def test_autocast_and_checkpointing():
    q, k, v = (t.detach().float().requires_grad_() for t in qkv(D=8, Dv=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastlm.attention(q, k, v).dtype == torch.bfloat16

    def f(q, k, v):
        return fastlm.attention(q, k, v, dropout_p=0.4)

    torch.manual_seed(0)
    want = torch.autograd.grad(f(q, k, v).sum(), v)
    torch.manual_seed(0)
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, q, k, v, use_reentrant=False).sum(), v)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.ones(5, 3)}, ValueError, "q must have 4 dimensions (B, H, T, D), got (5, 3)"),
        ({"k": torch.ones(2, 2, 7, 4)}, ValueError,
         "k must be (B, Hk, Tk, D) = (2, 2, 7, 3) to match q, got (2, 2, 7, 4)"),
        ({"k": torch.ones(2, 3, 7, 3)}, ValueError, "the heads of q must be a multiple of those of k, got 4 and 3"),
        ({"v": torch.ones(2, 2, 6, 3)}, ValueError,
         "v must be (B, Hk, Tk, Dv) = (2, 2, 7, Dv) to match k, got (2, 2, 6, 3)"),
        ({"v": torch.ones(2, 2, 7, 3).half()}, TypeError,
         "v must have the dtype of q, torch.float32, got torch.float16"),
        ({"q": torch.ones(2, 4, 5, 3).long()}, TypeError, "q must be floating point, got torch.int64"),
        ({"k": torch.ones(2, 2, 7, 3, device="meta")}, ValueError, "k must be on the device of q, cpu, got meta"),
        ({"causal": "left"}, ValueError,
         "causal must be False, True, 'bottom_right' or 'top_left', got 'left'"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be from 1e-30 to 1e30, or None, got -1.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be from 1e-30 to 1e30, or None, got inf"),
        ({"q": torch.ones(2, 4, 5, 0), "k": torch.ones(2, 2, 7, 0)}, ValueError,
         "q must have a head dim D of at least 1, got (2, 4, 5, 0)"),
        ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
        ({"mask": [True]}, TypeError, "mask must be a tensor, got list"),
        ({"seed": 3, "dropout_p": 0.1}, TypeError, "seed must be one int64 in a tensor, got 3"),
        ({"max_seqlen_q": -7}, ValueError,
         "max_seqlen_q and max_seqlen_k belong to packed sequences, given by cu_seqlens_q"),
        ({"mask": torch.ones(5, 7)}, TypeError,
         "mask must be bool (True: visible), got torch.float32; an additive mask is called bias"),
        ({"bias": torch.ones(5, 6)}, ValueError,
         "bias must broadcast to (B, Hq, Tq, Tk) = (2, 4, 5, 7), got (5, 6)"),
        ({"alibi_slopes": torch.ones(3)}, ValueError,
         "alibi_slopes must be (Hq,) = (4,) or (B, Hq) = (2, 4), got (3,)"),
        ({"sinks": torch.ones(2)}, ValueError, "sinks must be (Hq,) = (4,), got (2,)"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, "cu_seqlens_q and cu_seqlens_k must be given together"),
        ({"cu_seqlens_q": torch.tensor([0, 5]), "cu_seqlens_k": torch.tensor([0, 7])}, ValueError,
         "packed sequences must come as one batch, q (1, H, total, D), got B = 2"),
        ({"window": (1, 2, 3)}, ValueError,
         "window must be an int or (left, right), -1 or more each, got (1, 2, 3)"),
        ({"window": -5}, ValueError, "window must be an int or (left, right), -1 or more each, got -5"),
        ({"window": True}, ValueError, "window must be an int or (left, right), -1 or more each, got True"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(change, error, text):
    arguments = {"q": torch.ones(2, 4, 5, 3), "k": torch.ones(2, 2, 7, 3), "v": torch.ones(2, 2, 7, 3), **change}
    with pytest.raises(error) as caught:
        fastlm.attention(**arguments)
    assert str(caught.value) == f"fastlm.attention: {text}"


@pytest.mark.parametrize(
    ("starts", "options", "text"),
    [
        ([2, 5], {}, "cu_seqlens_q must rise from 0 to the total of 5, got [2, 5]"),
        ([0, 4, 2, 5], {}, "cu_seqlens_q must rise from 0 to the total of 5, got [0, 4, 2, 5]"),
        ([0, 9], {}, "cu_seqlens_q must rise from 0 to the total of 5, got [0, 9]"),
        ([0, 3], {}, "cu_seqlens_q must rise from 0 to the total of 5, got [0, 3]"),
        ([0, 2, 5], {"max_seqlen_q": 2}, "max_seqlen_q must be at least the longest sequence, 3, got 2"),
        ([0, 2, 5], {"max_seqlen_k": -1}, "max_seqlen_k must be an int of at least 0, got -1"),
        ([0, 2, 5], {"max_seqlen_q": True}, "max_seqlen_q must be an int of at least 0, got True"),
    ],
)
def test_packed_sequences_that_do_not_fit_get_a_sentence(starts, options, text):
    q = torch.ones(1, 2, 5, 3)
    whole = torch.tensor([0, *[5] * (len(starts) - 1)])
    with pytest.raises(ValueError) as caught:
        fastlm.attention(q, q, q, cu_seqlens_q=torch.tensor(starts), cu_seqlens_k=whole, **options)
    assert str(caught.value) == f"fastlm.attention: {text}"


@pytest.mark.parametrize("starts", [[2, 5], [0, 3], [0, 9], [7, 9], [0, 4, 2, 5]], ids=str)
def test_unchecked_packed_sequences_stay_within_bounds(starts):
    """As on a GPU: what lies outside of all sequences sees nothing and is seen by nothing. The CPU's kernels look."""
    q, k, v = (t.detach() for t in qkv(B=1, Hk=4, Tq=5, Tk=5, D=3, Dv=3))
    cu = torch.tensor(starts)
    o, lse = torch.ops.fastlm_reference.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=0.5)
    if ISAS:
        with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to the total of 5, got"):
            torch.ops.fastlm_native.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=0.5)
    if len(starts) == 2:
        inside = slice(*starts)
        want = fastlm.attention(*(t[:, :, inside] for t in (q, k, v)), scale=0.5)
        torch.testing.assert_close(o[:, :, inside], want)
        outside = torch.ones(5, dtype=torch.bool)
        outside[inside] = False
        assert (o[:, :, outside] == 0).all() and (lse[:, :, outside] == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
        ({"value": torch.ones(3)}, ValueError, "value must have at least 2 dimensions, got (3,)"),
        ({"key": torch.ones(2, 4, 7, 3).double()}, TypeError,
         "key must have the dtype of query, torch.float32, got torch.float64"),
        ({"key": torch.ones(2, 4, 7, 2)}, ValueError,
         "sizes must be query (..., Tq, D), key (..., Tk, D), value (..., Tk, Dv), "
         "got query (2, 4, 5, 3), key (2, 4, 7, 2), value (2, 4, 7, 3)"),
        ({"key": torch.ones(2, 3, 7, 3)}, ValueError,
         "leading dimensions must broadcast, got query (2, 4, 5, 3), key (2, 3, 7, 3), value (2, 4, 7, 3)"),
        ({"key": torch.ones(2, 3, 7, 3), "value": torch.ones(2, 3, 7, 3), "enable_gqa": True}, ValueError,
         "with enable_gqa query must have a multiple of the heads of key and value, "
         "got query (2, 4, 5, 3), key (2, 3, 7, 3), value (2, 3, 7, 3)"),
        ({"attn_mask": torch.ones(3, 5, 7).bool()}, ValueError,
         "attn_mask must broadcast to (2, 4, 5, 7), got (3, 5, 7)"),
        ({"attn_mask": torch.ones(5, 7).int()}, TypeError,
         "attn_mask must be bool, float32 or of the dtype of query, torch.float32, got torch.int32"),
        ({"attn_mask": torch.ones(5, 7).double()}, TypeError,
         "attn_mask must be bool, float32 or of the dtype of query, torch.float32, got torch.float64"),
        ({"attn_mask": [1]}, TypeError, "attn_mask must be a tensor, got list"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool, got 1"),
        ({"enable_gqa": "no"}, TypeError, "enable_gqa must be a bool, got 'no'"),
        ({"query": torch.ones(5, 3), "key": torch.ones(7, 3), "value": torch.ones(7, 3), "enable_gqa": True},
         ValueError, "query must have at least 3 dimensions, got (5, 3)"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be in [0, 1], got 1.5"),
    ],
)  # fmt: skip
def test_the_drop_in_speaks_of_its_own_arguments(change, error, text):
    arguments = {"query": torch.ones(2, 4, 5, 3), "key": torch.ones(2, 4, 7, 3), "value": torch.ones(2, 4, 7, 3)}
    with pytest.raises(error) as caught:
        fastlm.scaled_dot_product_attention(**{**arguments, **change})
    assert str(caught.value) == f"fastlm.scaled_dot_product_attention: {text}"
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):  # torch refuses it too
        F.scaled_dot_product_attention(**{**arguments, **change})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_spoiled_gradient_stays_with_its_query(backend, bad):
    q, k, v = (t.detach().float().requires_grad_() for t in qkv(B=1, Hq=2, Hk=2, Tq=70, Tk=70, D=16, Dv=16))
    o = fastlm.attention(q, k, v, causal=True)
    do = numbers(o.shape, seed=5)
    clean = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    do[:, :, 20, 3] = bad
    spoiled = torch.autograd.grad(o, (q, k, v), do)
    others = torch.arange(70) != 20
    torch.testing.assert_close(spoiled[0][:, :, others], clean[0][:, :, others])
    for got, want in zip(spoiled[1:], clean[1:], strict=True):
        torch.testing.assert_close(got[:, :, 21:], want[:, :, 21:])
        assert not got[:, :, :21].isfinite().all(-1).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_counts_as_in_the_formula(backend, where, bad):
    inputs = [t.detach().float() for t in qkv(B=1, Hq=1, Hk=1, Tq=5, Tk=5, D=8, Dv=8)]
    inputs[where][0, 0, 2, 3] = bad
    q, k, v = inputs
    torch.testing.assert_close(fastlm.attention(q, k, v), (q @ k.mT * 8**-0.5).softmax(-1) @ v, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    k, v = (t.detach().float() for t in qkv(Hq=2, D=8, Dv=8)[1:])
    for length in (0, 5):
        q = numbers((2, 1, length, 8)).requires_grad_()
        o = fastlm.attention(q.expand(2, 2, length, 8), k, v)
        assert o.stride(-1) == 1
        torch.testing.assert_close(o, F.scaled_dot_product_attention(q.expand(2, 2, length, 8), k, v))
        assert torch.autograd.grad(o.sum(), q)[0].shape == q.shape
        k0 = numbers((2, 1, 0, 8)).requires_grad_()
        o = fastlm.attention(q.expand(2, 2, length, 8), k0.expand(2, 2, 0, 8), k0.expand(2, 2, 0, 8))
        assert (o == 0).all() and torch.autograd.grad(o.sum(), k0)[0].shape == k0.shape


def test_numbers_are_no_tensors():
    """As a float, a learnt scale or cap would lose its gradient without a word."""
    q, k, v = (t.detach() for t in qkv(Hk=4, D=4))
    for option in ("scale", "softcap", "dropout_p"):
        with pytest.raises(TypeError, match=f"{option} must be a number, got Tensor"):
            fastlm.attention(q, k, v, **{option: torch.tensor(0.5)})
        with pytest.raises(TypeError, match=f"{option} must be a number, got str"):
            fastlm.attention(q, k, v, **{option: "0.5"})
    for option in ("scale", "dropout_p"):
        with pytest.raises(TypeError, match=f"{option} must be a number, got Tensor"):
            fastlm.scaled_dot_product_attention(q, k, v, **{option: torch.tensor(0.5)})


def test_autocast_leaves_float64_to_itself():
    q, k, v = (t.detach() for t in qkv(D=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastlm.attention(q.float(), k.bfloat16(), v.float()).dtype == torch.bfloat16
        for attend in (fastlm.attention, fastlm.scaled_dot_product_attention):
            with pytest.raises(TypeError, match="must have the dtype of q"):
                attend(q[:, :2], k.float(), v)
    with pytest.raises(TypeError, match="must have the dtype of q"):
        fastlm.attention(*(t.to("meta") for t in (q, k.float(), v)))


def test_drop_in_takes_what_has_no_scores_as_torch_does():
    q, nothing = numbers((2, 3, 4, 5)).requires_grad_(), numbers((2, 3, 4, 0))
    for query, options in (
        (q, {"dropout_p": 1.0}),
        (q, {"dropout_p": 1}),
        (nothing, {}),
        (nothing, {"is_causal": True}),
    ):
        found = fastlm.scaled_dot_product_attention(query, query, q, **options)
        want = F.scaled_dot_product_attention(query, query, q, **options)
        torch.testing.assert_close(found, want, equal_nan=True)
        pair = (torch.autograd.grad(y.sum(), q) for y in (found, want))
        torch.testing.assert_close(*pair, equal_nan=True)
