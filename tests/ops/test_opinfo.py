"""The samples and errors that torch keeps for its own functions (its OpInfo database), through fastlm's drop-ins."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import BACKENDS, assert_as_exact_as_torch, numbers

import fastlm

# Installed with every torch, for its own tests; they need expecttest.
op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db


def embedding(weight, index, *, padding_idx=None, **others):
    """Ours has no other options; the sample gives the weight first."""
    return None if any(others.values()) else fastlm.embedding(index, weight, padding_idx)


OURS = {
    "nn.functional.relu": fastlm.relu,
    "nn.functional.gelu": fastlm.gelu,
    "nn.functional.silu": fastlm.silu,
    "sigmoid": fastlm.sigmoid,
    "tanh": fastlm.tanh,
    "nn.functional.layer_norm": fastlm.layer_norm,
    "nn.functional.rms_norm": fastlm.rms_norm,
    "nn.functional.linear": lambda x, weight, bias=None: fastlm.linear_act(x, weight, bias, "none"),
    "nn.functional.embedding": embedding,
    "nn.functional.cross_entropy": fastlm.cross_entropy,
    "nn.functional.mse_loss": fastlm.mse_loss,
    "nn.functional.scaled_dot_product_attention": fastlm.scaled_dot_product_attention,
}
OPS = [op for op in op_db if op.name in OURS and not op.variant_test_name]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def run(function, sample, dtype=None):
    """Value and gradients, of fresh tensors, floating-point ones in `dtype`; None where the function leaves it out."""
    leaves = []

    def fresh(x):
        if not isinstance(x, torch.Tensor):
            return x
        to = dtype if dtype is not None and x.is_floating_point() else x.dtype
        x = x.detach().to(to, copy=True).requires_grad_(x.requires_grad)
        if x.requires_grad:
            leaves.append(x)
        return x

    sample = sample.transform(fresh)
    out = function(sample.input, *sample.args, **sample.kwargs)
    if out is None:
        return None
    dy = numbers(out.shape, torch.bfloat16).to(out.dtype)
    return [out.detach(), *(torch.autograd.grad(out, leaves, dy, allow_unused=True) if leaves else ())]


def test_every_drop_in_is_there():
    assert {op.name for op in OPS} == set(OURS)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("native-baseline", BACKENDS[0], "reference")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_samples(op, dtype, backend):
    ran = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p"):  # drawn otherwise: test_attention_options.py
            continue
        exact, plain = run(op.op, sample, torch.float64), run(op.op, sample)
        try:
            got = run(OURS[op.name], sample)
        except NotImplementedError:  # a kernel that was asked for by name, and does not do this combination
            assert backend.startswith("native")
            continue
        if got is None:
            continue
        ran += 1
        for ours, in_double, theirs in zip(got, exact, plain, strict=True):
            if theirs is None:
                assert ours is None or not ours.any()
            elif dtype == torch.float64:  # nothing is more exact
                torch.testing.assert_close(ours, theirs)
            elif "attention" in op.name:
                # Scores of a hundred give some keys all of the weight; their gradient is then a difference of roundings
                # of o's to 16 bits too, where torch keeps the matrix of weights (see test_attention_cpu.py).
                tolerance = 1e-4 if dtype == torch.float32 else 0.03
                largest = max(g.abs().max().item() for g in exact if g is not None and g.numel())
                torch.testing.assert_close(ours.double(), in_double, rtol=0, atol=tolerance * largest)
            else:
                assert_as_exact_as_torch(ours, in_double, theirs, 3, str(sample))
    assert ran > 0


@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func], ids=lambda op: op.name)
def test_errors(op):
    """What torch refuses is refused, by an error of torch's type."""
    for case in op.error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises(case.error_type):
            OURS[op.name](sample.input, *sample.args, **sample.kwargs)


# Where torch keeps no errors: what its own functions refuse, and by what.
x, target = torch.ones(3, 4), torch.tensor([0, 1, 3])
REFUSED = [
    ("cross_entropy", F.cross_entropy, lambda f: f(x, target[:2])),
    ("cross_entropy", F.cross_entropy, lambda f: f(x, target + 1)),
    ("cross_entropy", F.cross_entropy, lambda f: f(x, target, label_smoothing=1.5)),
    ("cross_entropy", F.cross_entropy, lambda f: f(x, target, reduction="all")),
    ("cross_entropy", F.cross_entropy, lambda f: f(x, target.int().float()[:2])),
    ("cross_entropy", F.cross_entropy, lambda f: f(x, target, weight=torch.ones(3))),
    ("cross_entropy", F.cross_entropy, lambda f: f(x, target.to(torch.int8))),
    ("layer_norm", F.layer_norm, lambda f: f(x, (3,))),
    ("layer_norm", F.layer_norm, lambda f: f(x, (4,), torch.ones(3))),
    ("layer_norm", F.layer_norm, lambda f: f(x, (4,), None, torch.ones(3))),
    ("layer_norm", F.layer_norm, lambda f: f(x, ())),
    ("rms_norm", F.rms_norm, lambda f: f(x, (3,))),
    ("mse_loss", F.mse_loss, lambda f: f(x, x, reduction="all")),
    ("mse_loss", F.mse_loss, lambda f: f(x, torch.ones(3, 3))),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x, x[:, :3], x)),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x, x.double(), x)),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x, x, x, torch.ones(5, 5))),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x, x, x, torch.ones(3, 3).long())),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x, x[:2], x)),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x[0], x[0], x[0])),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x.long(), x.long(), x.long())),
    ("scaled_dot_product_attention", F.scaled_dot_product_attention, lambda f: f(x, x, x, dropout_p=1.5)),
]  # fmt: skip


@pytest.mark.parametrize("name, theirs, call", REFUSED, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSED)])
def test_refuses_what_torch_refuses(name, theirs, call):
    try:
        call(theirs)
    except Exception as error:
        with pytest.raises(type(error)):
            call(getattr(fastlm, name))
    else:
        pytest.fail("torch takes it")
