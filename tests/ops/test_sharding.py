"""DTensors: every op takes them as its sharding rule says, without communication, and gives what the whole gives."""

import math
import os
import subprocess
import sys
import warnings
from random import Random

import pytest
import torch
import torch.multiprocessing as mp
from features import features
from op_testing import numbers, once_is_enough

import fastlm
from fastlm import _library

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    once_is_enough,
]

RANKS = 2
NOT_YET = {"adam_", "grad_norm", "sgd_"}  # lists of tensors


def attention_arguments(heads=4, key_heads=2, **options):
    """The op's own; of the options those that have a tensor of their own, or decide what may be sharded."""
    q, (k, v) = numbers((3, heads, 5, 8)), (numbers((3, key_heads, 6, 8), seed=s) for s in (1, 2))
    return _library._ops["attention"].bind({"q": q, "k": k, "v": v, **options})


def more_samples():
    """What the ops' own samples leave out: op, arguments."""
    seed, bias = torch.tensor(4), numbers((3, 1, 5, 6))
    options = [
        {"mask": numbers((4, 1, 6)) > -1},
        {"bias": numbers((4, 1, 6))},
        {"alibi_slopes": numbers((4,)).abs()},
        {"sinks": numbers((4,)).abs()},  # which differ by their place alone
        {"bias": bias, "alibi_slopes": numbers((4,)).abs(), "sinks": numbers((4,)), "softcap": 3.0, "causal": True},
        {"alibi_slopes": numbers((3, 4)).abs(), "dropout_p": 0.0},
        {"key_heads": 1},
        {"heads": 3, "key_heads": 3},
        {"heads": 6, "key_heads": 3},  # groups that two ranks would cut
        {"dropout_p": 0.3, "seed": seed},
    ]
    for more in options:
        args = attention_arguments(**more)
        yield "attention", args
        o, lse = torch.ops.fastlm.attention(*args)
        given = [args[i] is not None and args[i].is_floating_point() for i in (4, 5, 6)]
        for wanted in ([True] * 3 + given, [False, True, False, False, False, False]):
            yield "attention_backward", (o.cos(), lse.sin(), *args[:3], o, lse, *args[3:], wanted)
    q, cache = numbers((4, 6, 1, 8)), numbers((9, 2, 4, 8))
    lens, table = torch.tensor([3, 4, 1, 2]), torch.tensor([[8, 1], [2, 3], [4, 5], [6, 7]])
    yield "attention_decode", (q, cache[:4], cache[:4], lens, None, None, None, -1, 0, 0.3, 0.0)
    three = numbers((4, 3, 4, 8))
    yield "attention_decode", (q, three, three, lens, None, None, None, -1, 0, 0.3, 0.0)
    yield "attention_decode", (q, cache, cache, lens, table, numbers((4, 6)).abs(), numbers((6,)), -1, 0, 0.3, 0.0)
    x, weight, target = numbers((5, 6)), numbers((8, 6), seed=1), torch.tensor([1, 7, -100, 0, 2])
    for bias in (None, numbers((8,))):
        yield "linear_act", (x, weight, bias, "none", True)
        yield "linear_act", (x, weight, bias, "relu", False)
        yield (
            "linear_cross_entropy",
            (x, weight, bias, target, -100, 0.1, 1e-3, 0.0, False, [True, False, bias is not None]),
        )
    yield "linear_act_backward", (numbers((5, 8)), x, weight, numbers((5, 8)), "none", [True, True, True])
    yield "linear_act_backward", (numbers((5, 8)), x, weight, numbers((5, 8)), "relu", [False, True, False])
    yield "cross_entropy", (numbers((5, 8)), numbers((5, 8), seed=1).softmax(1), numbers((8,)).abs(), -100, 0.1, 0.0)
    yield "norm_backward", (numbers((2, 5, 8)), None, numbers((2, 5, 8)), numbers((8,)), 1e-5, True, [False, True])
    yield "relu", (numbers((2, 3, 4)),)
    yield "layer_norm", (numbers((2, 3, 4)), None, numbers((4,)), 1e-5)
    yield "rope", (numbers((2, 4, 3, 8)), numbers((2, 4, 3)), numbers((2, 4, 3)), True)
    yield "bias_act", (numbers((2, 6)), numbers((6,)), "relu", 0.5, seed)


def samples():
    for op in _library.all_ops():
        if op.name not in NOT_YET:
            yield from ((op.name, args) for args in op.samples("cpu"))
    yield from more_samples()


def as_list(outputs):
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def check_rules(mesh, namespace):
    from torch.distributed import tensor as placements
    from torch.distributed.tensor.debug import CommDebugMode

    from fastlm._sharding import shardings

    tried = {}
    for name, args in samples():
        op = _library._ops[name]
        args = op.filled(args)
        run = op.overloads[namespace]
        want = as_list(run(*args))
        allowed = shardings(op, args, RANKS, placements)
        for outputs, inputs in allowed:
            shards = [(a, p) for a, p in zip(args, inputs, strict=True) if isinstance(p, placements.Shard)]
            if any(a.shape[p.dim] < RANKS for a, p in shards):  # which torch leaves out
                continue
            given = []
            for a, p in zip(args, inputs, strict=True):
                p = p if isinstance(p, placements.Shard) else placements.Replicate()
                given.append(placements.distribute_tensor(a, mesh, [p]) if isinstance(a, torch.Tensor) else a)
            with CommDebugMode() as communication:
                found = as_list(run(*given))
            what = f"{name} {inputs} -> {outputs}"
            assert communication.get_total_counts() == 0, f"{what} communicates"
            assert [f.placements[0] for f in found] == outputs, f"{what} gives {[f.placements for f in found]}"
            for f, w in zip(found, want, strict=True):
                scale = w.abs().amax().item() if w.numel() and w.is_floating_point() else 1.0
                eps = torch.finfo(w.dtype).eps
                got = f.full_tensor()
                assert got.dtype == w.dtype, what
                torch.testing.assert_close(
                    got, w, rtol=8 * eps, atol=8 * eps * max(scale, 1.0), msg=lambda m, s=what: f"{s}: {m}"
                )
        tried[name] = max(tried.get(name, 0), len(allowed) - 1)
    assert tried.keys() == {op.name for op in _library.all_ops()} - NOT_YET
    assert {name for name, count in tried.items() if count == 0} == {"dropout"}
    assert tried["attention"] == tried["attention_backward"] == tried["rope"] - 1 == 2


def check_public(mesh):
    """Through the functions that users call, with gradients; what a rule does not allow is gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, weight, row = numbers((6, 8)), numbers((10, 8), seed=1), numbers((8,), seed=2)
    q, target = numbers((4, 4, 6, 8)), torch.arange(6)
    calls = [
        (lambda x: fastlm.relu(x), [x], [0]),
        (lambda x: fastlm.gelu(x), [x], [1]),
        (lambda x, b: fastlm.bias_act(x, b, "silu"), [x, row], [1, 0]),
        (lambda x, w: fastlm.rms_norm(x, (8,), w), [x, row], [0, None]),
        (lambda x, w: fastlm.layer_norm(x, (8,), w), [x, row], [1, None]),  # gathered
        (lambda x, w: fastlm.linear_act(x, w, act="gelu"), [x, weight], [None, 0]),
        (lambda x, w: fastlm.linear_act(x, w, act="none"), [x, weight], [1, 1]),
        (lambda x, w: fastlm.linear_act(x, w, act="relu"), [x, weight], [1, 1]),  # gathered
        (lambda x: fastlm.glu(*x.chunk(2, -1)), [x], [0]),
        (lambda q: fastlm.attention(q, q, q, causal=True), [q], [1]),
        (lambda q: fastlm.attention(q, q, q, window=2), [q], [2]),  # gathered
        (lambda q: fastlm.scaled_dot_product_attention(q, q, q, is_causal=True), [q], [0]),
        (lambda x: fastlm.mse_loss(x, x.detach().cos()), [x], [0]),
    ]
    for i, (call, inputs, dims) in enumerate(calls):
        whole = [t.clone().requires_grad_() for t in inputs]
        parts = [
            distribute_tensor(t, mesh, [Replicate() if d is None else Shard(d)]).requires_grad_()
            for t, d in zip(inputs, dims, strict=True)
        ]
        want, found = call(*whole), call(*parts)
        torch.testing.assert_close(found.full_tensor(), want, msg=lambda m, i=i: f"call {i}: {m}")
        dy = numbers(want.shape, seed=5)
        wants = torch.autograd.grad(want, whole, dy)
        founds = torch.autograd.grad(found, parts, distribute_tensor(dy, mesh, [Replicate()]))
        for f, w in zip(founds, wants, strict=True):
            torch.testing.assert_close(f.full_tensor(), w, msg=lambda m, i=i: f"gradient of call {i}: {m}")
    part = distribute_tensor(x, mesh, [Shard(0)])
    for call in (fastlm.dropout, lambda x: fastlm.bias_act(x, x[0], dropout_p=0.5)):
        with pytest.raises(ValueError, match="with a DTensor seed must be given, the same on every rank"):
            call(part)
    logits, classes = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, target))
    torch.testing.assert_close(fastlm.cross_entropy(logits, classes).full_tensor(), fastlm.cross_entropy(x, target))


def check_features(mesh):
    """Every feature, its tensors sharded at random over both dimensions of the mesh, evenly."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import implicit_replication

    random = Random(3)

    def distributed(t):
        placements, sizes = [], list(t.shape)
        for ranks in mesh.shape:
            d = random.choice([None, *(i for i, size in enumerate(sizes) if size % ranks == 0)])
            placements.append(Replicate() if d is None else Shard(d))
            if d is not None:
                sizes[d] //= ranks
        return distribute_tensor(t, mesh, placements).requires_grad_()

    for name, (_, call, inputs) in features().items():
        if "append" in name:  # DTensor writes in place to few placements only, and says so
            continue
        whole = [t.clone().requires_grad_() for t in inputs]
        want = call(*whole)
        dy = torch.linspace(0.2, 1, want.numel()).view(want.shape)
        wants = torch.autograd.grad(want, whole, dy)
        for _ in range(4):
            parts = [distributed(t) for t in inputs]
            what = f"{name}, {[p.placements for p in parts]}"
            with implicit_replication():  # of the tensors that the call makes itself
                found = call(*parts)
                founds = torch.autograd.grad(found, parts, distribute_tensor(dy, mesh, [Replicate()] * mesh.ndim))
            for f, w in zip((found, *founds), (want, *wants), strict=True):
                torch.testing.assert_close(f.full_tensor(), w, msg=lambda m, s=what: f"{s}: {m}")


def work(rank, store, check, sizes, argument):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=math.prod(sizes))
    try:
        check(dist.init_device_mesh("cpu", sizes), *argument)
    finally:
        dist.destroy_process_group()


def on_mesh(sizes, folder, check, *argument):
    mp.spawn(work, (folder / "store", check, sizes, argument), nprocs=math.prod(sizes))


@pytest.mark.parametrize("namespace", ["auto", "reference"])
def test_every_rule_holds(tmp_path, namespace):
    on_mesh((RANKS,), tmp_path, check_rules, namespace)


def test_public_functions_take_dtensors(tmp_path):
    on_mesh((RANKS,), tmp_path, check_public)


def test_every_feature_on_a_mesh_of_two_dimensions(tmp_path):
    on_mesh((2, 2), tmp_path, check_features)


def test_an_interface_that_has_changed_costs_dtensors_alone():
    code = """if True:
        import sys, types
        sys.modules["torch.distributed.tensor.experimental"] = types.ModuleType("experimental")
        import torch, fastlm, torch.distributed.tensor
        print(fastlm.relu(torch.ones(1)).item())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "1.0\n" and "fastlm's ops take no DTensors in this version of torch" in done.stderr, (
        done.stderr
    )
