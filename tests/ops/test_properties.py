"""Random shapes, strides, dtypes and flags: every op beside its reference in float64.

FASTLM_PROPERTY_CASES=2000 draws so many of each op; 200 where it is not set. A failure prints the smallest call that
fails, and what reproduces it.
"""

import os

import pytest
import torch
from op_testing import numbers

import fastlm

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
CASES = int(os.environ.get("FASTLM_PROPERTY_CASES", 200))

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
layouts = st.sampled_from(["contiguous", "transposed", "every second", "misaligned", "padded"])
ACTS = ["none", "relu", "relu_squared", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]


def laid_out(x, layout):
    """The same numbers, in memory as `layout` says."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "padded" and x.dim() > 0:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x.contiguous()


def outcome(call, tensors, options, layouts, backend, dtype):
    """Outputs and gradients by name; gradients twice, of one graph. Whole numbers and masks keep their dtype."""
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    given = {k: laid_out(v, layouts.get(k)) for k, v in given.items()}
    given = {k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in given.items()}
    leaves = {k: t for k, t in given.items() if t.requires_grad}
    before = {k: v.detach().clone() for k, v in given.items()}
    with fastlm.use_backend(backend):
        outputs = call(**given, **options)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        # A query that sees nothing has a log-sum-exp of -inf, and nothing to differentiate.
        dys = [numbers(o.shape, torch.bfloat16, 90 + i).to(o.dtype) for i, o in enumerate(outputs)]
        dys = [torch.where(o.isfinite(), dy, 0) for o, dy in zip(outputs, dys, strict=True)]
        first = torch.autograd.grad(outputs, list(leaves.values()), dys, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(outputs, list(leaves.values()), dys, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), "a second backward gave other gradients"
    for k, v in given.items():
        assert torch.equal(v, before[k]), f"{k} was changed"
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"gradient of {k}": g for k, g in zip(leaves, first, strict=True) if g is not None}


def check(call, tensors, options, layouts, dtype):
    """As exact as the reference in the same dtype; reruns are equal bit for bit; no argument is changed."""
    ours, again = (outcome(call, tensors, options, layouts, "auto", dtype) for _ in range(2))
    for name in ours:
        assert torch.equal(ours[name].nan_to_num(), again[name].nan_to_num()), f"{name}: a rerun gave other bits"
    exact, plain = (outcome(call, tensors, options, {}, "reference", of) for of in (torch.float64, dtype))
    assert ours.keys() == exact.keys()
    # Gradients are differences of larger numbers: some ulps of the largest are what can be asked for.
    largest = max([1.0, *(g[g.isfinite()].abs().max().item() for g in exact.values() if g.isfinite().any())])
    for name, a in ours.items():
        b, c = exact[name], plain[name]
        assert a.dtype == c.dtype and a.shape == b.shape
        finite = b.isfinite()
        assert torch.equal(a.double()[~finite].nan_to_num(), b.double()[~finite].nan_to_num())
        if not finite.any():
            continue
        gradient = name.startswith("gradient")
        ulps = (8 if gradient else 4) * (largest if gradient else max(1.0, b[finite].abs().max().item()))
        if name.endswith("alibi_slopes"):  # the sum of terms times distances, which nearly cancel
            ulps *= max(t.shape[2] for t in tensors.values() if t.dim() == 4)
        if dtype == torch.float64:  # nothing is more exact
            ulps *= 100
        error, theirs = ((t.double() - b.double())[finite].abs().max().item() for t in (a, c))
        allowed = (3 if gradient else 2) * theirs + ulps * torch.finfo(a.dtype).eps
        assert error <= allowed, f"{name}: off by {error:.3g}, the reference by {theirs:.3g}, allowed {allowed:.3g}"


class Draw:
    """Draws sizes, flags and tensors of one call."""

    def __init__(self, data):
        self.data, self.seed, self.tensors, self.layouts = data, 0, {}, {}

    def __call__(self, strategy, label=None):
        return self.data.draw(strategy, label)

    def size(self, most=20):
        return self(st.integers(1, most))

    def tensor(self, name, *shape):
        """Normal numbers that bfloat16 and float16 hold, so that all dtypes get the same."""
        self.seed += 1
        self.tensors[name] = numbers(shape, torch.bfloat16, self.seed).clamp(-4, 4).double()
        self.layouts[name] = self(layouts, name)


def attention(draw):
    B, groups, Hk = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    Tq, Tk, D, Dv = draw.size(70), draw.size(140), draw.size(40), draw.size(40)
    Hq = groups * Hk
    options = {
        "causal": draw(st.sampled_from([False, True, "top_left"])),
        "window": draw(st.none() | st.tuples(st.integers(-1, 30), st.integers(-1, 30))),
        "softcap": draw(st.none() | st.just(1.5)),
        "scale": draw(st.none() | st.floats(-0.5, 0.5)),
        "return_lse": draw(st.booleans()),
    }
    if draw(st.booleans(), "packed"):
        B = 1
        for name, total in (("cu_seqlens_q", Tq), ("cu_seqlens_k", Tk)):
            inner = draw(st.lists(st.integers(0, total), min_size=2, max_size=2), name)
            draw.tensors[name] = torch.tensor([0, *sorted(inner), total])
    for name, *shape in (("q", B, Hq, Tq, D), ("k", B, Hk, Tk, D), ("v", B, Hk, Tk, Dv)):
        draw.tensor(name, *shape)
    over = draw(st.tuples(st.sampled_from([1, B]), st.sampled_from([1, Hq]), st.just(Tq), st.just(Tk)), "broadcast")
    if draw(st.booleans(), "mask"):
        draw.seed += 1
        draw.tensors["mask"] = numbers(over, seed=draw.seed) > -0.7
    for name, shape in (("bias", over), ("alibi_slopes", (Hq,)), ("sinks", (Hq,))):
        if draw(st.booleans(), name):
            draw.tensor(name, *shape)
            if name == "alibi_slopes":  # times a distance: scores of hundreds have the error of hundreds
                draw.tensors[name] = draw.tensors[name] / 16
    if draw(st.booleans(), "dropout"):
        options |= {"dropout_p": 0.25, "seed": torch.tensor(draw(st.integers(-(2**40), 2**40)))}
    return fastlm.attention, options


def attention_decode(draw):
    B, groups, Hk = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    Tq, D, Dv = draw(st.integers(1, 9) | st.integers(60, 140)), draw.size(40), draw.size(40)
    page, pages = draw(st.integers(1, 40) | st.integers(100, 140)), draw(st.integers(1, 3))
    paged = draw(st.booleans(), "paged")
    draw.tensor("q", B, groups * Hk, Tq, D)
    for name, width in (("k_cache", D), ("v_cache", Dv)):
        draw.tensor(name, *((B * pages, Hk, page, width) if paged else (B, Hk, page * pages, width)))
    filled = [draw(st.integers(0, page * pages), "filled") for _ in range(B)]
    draw.tensors["cache_seqlens"] = torch.tensor(filled)
    if paged:
        order = torch.randperm(B * pages, generator=torch.Generator().manual_seed(draw.seed))
        draw.tensors["page_table"] = order.view(B, pages)
    for name in ("alibi_slopes", "sinks"):
        if draw(st.booleans(), name):
            draw.tensor(name, groups * Hk)
            draw.tensors[name] = draw.tensors[name] / 16
    return fastlm.attention_decode, {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(st.integers(-1, 30), st.integers(-1, 30))),
        "softcap": draw(st.none() | st.just(1.5)),
        "return_lse": True,
    }


def norm(draw):
    rows, width, lead = draw.size(), draw.size(200), draw.size(3)
    draw.tensor("x", lead, rows, width)
    kind = draw(st.sampled_from([fastlm.layer_norm, fastlm.rms_norm]))
    for name in ("weight", *(["bias"] if kind is fastlm.layer_norm else []), "residual"):
        if draw(st.booleans(), name):
            draw.tensor(name, *((lead, rows, width) if name == "residual" else (width,)))
    return kind, {"normalized_shape": (width,), "eps": draw(st.sampled_from([1e-5, 0.1]))}


def activation(draw):
    draw.tensor("x", draw.size(), draw.size(300))
    names = ("relu", "relu_squared", "gelu", "silu", "sigmoid", "tanh")
    return getattr(fastlm, draw(st.sampled_from(names))), {}


def bias_act(draw):
    rows, width = draw.size(), draw.size(300)
    draw.tensor("x", rows, width)
    draw.tensor("bias", width)
    options = {"act": draw(st.sampled_from(ACTS))}
    if draw(st.booleans(), "dropout"):
        options |= {"dropout_p": 0.25, "seed": torch.tensor(3)}
    return fastlm.bias_act, options


def glu(draw):
    shape = (draw.size(), draw.size(300))
    draw.tensor("gate", *shape)
    draw.tensor("up", *shape)
    return fastlm.glu, {"act": draw(st.sampled_from(ACTS))}


def rope(draw):
    B, T, H, half = draw.size(2), draw.size(), draw.size(3), draw.size(16)
    draw.tensor("x", B, T, H, 2 * half + draw(st.integers(0, 5)))
    for name in ("cos", "sin"):
        draw.tensor(name, T + 3, half)
    if draw(st.booleans(), "positions"):
        draw.tensors["positions"] = torch.arange(T).flip(0) + 2
    return fastlm.rope, {"interleaved": draw(st.booleans())}


def cross_entropy(draw):
    N, C = draw.size(30), draw.size(300)
    shape = draw(st.sampled_from([(N, C), (2, C, N)]))
    draw.tensor("input", *shape)
    target = torch.arange(N * (2 if len(shape) == 3 else 1)) * 7 % C
    target = target.view(shape[0], N) if len(shape) == 3 else target
    if draw(st.booleans(), "ignored"):
        target = torch.where(torch.arange(N) % 3 == 1, -100, target)
    draw.tensors["target"] = target
    return fastlm.cross_entropy, {
        "reduction": draw(st.sampled_from(["sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }


def linear_cross_entropy(draw):
    N, D, C = draw.size(30), draw.size(20), draw.size(100)
    draw.tensor("x", N, D)
    draw.tensor("weight", C, D)
    if draw(st.booleans(), "bias"):
        draw.tensor("bias", C)
    draw.tensors["target"] = torch.arange(N) * 7 % C
    return fastlm.linear_cross_entropy, {"z_loss": draw(st.sampled_from([0.0, 1e-2])), "reduction": "sum"}


def linear_act(draw):
    N, K, M = draw.size(40), draw.size(40), draw.size(40)
    draw.tensor("x", M, K)
    draw.tensor("weight", N, K)
    if draw(st.booleans(), "bias"):
        draw.tensor("bias", N)
    # Not those with a kink: an input of another rounding lies on its other side.
    return fastlm.linear_act, {"act": draw(st.sampled_from(["none", "gelu", "silu"]))}


def mse_loss(draw):
    shape = (draw.size(), draw.size(300))
    draw.tensor("input", *shape)
    draw.tensor("target", *shape)
    return fastlm.mse_loss, {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}


def embedding(draw):
    V, N, count = draw.size(), draw.size(100), draw.size(60)
    draw.tensor("weight", V, N)
    draw.tensors["input"] = torch.arange(count) * 5 % V
    return fastlm.embedding, {"padding_idx": draw(st.none() | st.integers(0, V - 1))}


OPS = (
    attention, attention_decode, norm, activation, bias_act, glu, rope, cross_entropy, linear_cross_entropy, linear_act,
    mse_loss, embedding,
)  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_property(op):
    @hypothesis.settings(max_examples=CASES, deadline=None, derandomize=CASES <= 200, print_blob=True)
    @hypothesis.given(data=st.data())
    def as_exact_as_the_reference(data):
        draw = Draw(data)
        call, options = op(draw)
        dtype = draw(dtypes, "dtype")
        sizes = {k: (tuple(t.shape), draw.layouts.get(k)) for k, t in draw.tensors.items()}
        hypothesis.note(f"{call.__name__}, {dtype}, {options}, {sizes}")
        check(call, draw.tensors, options, draw.layouts, dtype)

    as_exact_as_the_reference()
