"""Optimizers of DTensors and under DDP, on two processes: weights, norms and states are those of one process."""

import datetime
import math
import multiprocessing
import os
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from optim_testing import copies, draw

from fastlm.optim import SGD, AdamW

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(
        any(os.environ.get(f"FASTLM_{name}") for name in ("BACKEND", "CPU_ISA", "TEST_EXCHANGE")),
        reason="the same on every backend and instruction set",
    ),
]

RANKS = 2
STEPS = 4
OPTIMIZERS = {
    "AdamW": lambda params, **more: AdamW(params, 0.01, weight_decay=0.1, **more),
    "SGD": lambda params, **more: SGD(params, 0.01, momentum=0.9, **more),
}
CLIPPED = {"max_norm": 0.5, "skip_nonfinite": True}


def a_model():
    """Sizes that two ranks do not share evenly; a scale of which one rank has nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    model.register_forward_hook(lambda module, inputs, output: output * module.scale)
    return model


def batch(t):
    return draw((8, 6), t)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_same(found, want, what):
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        torch.testing.assert_close(
            whole(a).detach(), b.detach(), rtol=2e-5, atol=2e-6, msg=lambda m, i=i: f"{what}, parameter {i}: {m}"
        )


def single(make, steps=STEPS, dtype=torch.float32, skipped=(), start=None, **options):
    """One process: the weights and the norm after each step, and the averages at the end."""
    model = a_model().to(dtype)
    optimizer = make(model.parameters(), **options)
    seen = []
    for t in range(steps):
        if t in skipped:
            continue
        optimizer.zero_grad()
        model(batch(t).to(dtype)).square().mean().backward()
        optimizer.step()
        seen.append((copies(model.parameters()), optimizer.grad_norm))
    return seen, optimizer


# --- DDP --------------------------------------------------------------------------------------------------------------
def check_ddp(mesh, name):
    rank = dist.get_rank()
    seen, _ = single(OPTIMIZERS[name], **CLIPPED)
    model = torch.nn.parallel.DistributedDataParallel(a_model())
    optimizer = OPTIMIZERS[name](model.parameters(), **CLIPPED)
    for t in range(STEPS):
        optimizer.zero_grad()
        model(batch(t).chunk(RANKS)[rank]).square().mean().backward()
        optimizer.step()
        assert_same(model.parameters(), seen[t][0], f"step {t}")
        torch.testing.assert_close(optimizer.grad_norm, seen[t][1], rtol=1e-5, atol=0)


# --- parameters that are cut ------------------------------------------------------------------------------------------
def sharded(model, mesh, kind):
    """The model with DTensors as parameters, and how to give it its part of a batch."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    rank = mesh.get_local_rank() if mesh.ndim == 1 else mesh.get_local_rank("data")
    if kind == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        return lambda t: batch(t).chunk(RANKS)[rank]
    if kind == "tensor parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return batch  # the rest of it is plain, the same on every rank
    assert kind == "placed"  # by hand, gathered for the forward pass

    def place(i, p):
        placement = Replicate() if i % 3 == 2 else Shard(i % max(1, p.dim()))
        return torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [placement]))

    placed = [place(i, p) for i, p in enumerate(model.parameters())]
    assert all(isinstance(p, DTensor) for p in placed)
    names = [name for name, _ in model.named_parameters()]
    module = a_model()

    class Placed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.params = torch.nn.ParameterList(placed)

        def forward(self, x):
            full = {n: p.full_tensor() for n, p in zip(names, self.params, strict=True)}
            return torch.func.functional_call(module, full, (x,))

    model.placed = Placed()
    for name in names:
        path, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(path), leaf)
    model.forward = model.placed.forward
    model._forward_hooks.clear()
    return batch


def train(model, optimizer, part, steps, start=0, bad=None):
    """Yields after each step; `bad` is the rank that has a NaN once, before the second."""
    for t in range(start, start + steps):
        for wrong in (True, False) if bad is not None and t == 1 else (False,):
            optimizer.zero_grad()
            model(part(t)).square().mean().backward()
            if wrong:
                before = [whole(p).detach().clone() for p in model.parameters()]
                if dist.get_rank() == bad:
                    grads = [p.grad.to_local() for p in model.parameters() if hasattr(p, "device_mesh")]
                    next(g for g in grads if g.numel()).view(-1)[0] = float("nan")
            optimizer.step()
            if wrong:
                assert optimizer.skipped_steps == 1 and not optimizer.grad_norm.isfinite()
                for p, b in zip(model.parameters(), before, strict=True):
                    assert torch.equal(whole(p), b)
        yield t


def check_sharded(mesh, kind, name):
    """Weights and norms; a NaN on one rank alone skips the step on both."""
    from torch.distributed.tensor import DTensor

    seen, reference = single(OPTIMIZERS[name], **CLIPPED, ema_decay=0.5)
    model = a_model()
    part = sharded(model, mesh, kind)
    optimizer = OPTIMIZERS[name](model.parameters(), **CLIPPED, ema_decay=0.5)
    for t in train(model, optimizer, part, STEPS, bad=1):
        assert_same(model.parameters(), seen[t][0], f"{kind}, step {t}")
        torch.testing.assert_close(optimizer.grad_norm, seen[t][1], rtol=1e-5, atol=0)
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert len(cut) >= 4
    for p, q in zip(model.parameters(), reference.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state[p].items():
            if key != "step":
                assert isinstance(value, DTensor) == isinstance(p, DTensor)
                assert getattr(value, "placements", None) == getattr(p, "placements", None)
            assert_same([value], [reference.state[q][key]], key)
    weights = [whole(p).detach().clone() for p in model.parameters()]
    with optimizer.ema_weights():
        averages = [reference.state[q]["ema"] for q in reference.param_groups[0]["params"]]
        assert_same(model.parameters(), averages, "averages")
    for p, w in zip(model.parameters(), weights, strict=True):
        assert torch.equal(whole(p), w)


def check_masters(mesh, kind):
    from torch.distributed.tensor import DTensor

    options = {"master_weights": True, "ema_decay": 0.5}
    _, reference = single(OPTIMIZERS["AdamW"], dtype=torch.bfloat16, steps=1, **options, max_norm=1.0)
    model = a_model().bfloat16()
    part = sharded(model, mesh, kind)
    optimizer = OPTIMIZERS["AdamW"](model.parameters(), **options, max_norm=1.0)
    for p, q in zip(model.parameters(), reference.param_groups[0]["params"], strict=True):
        p.grad = p.detach().clone()  # the same on one process and on two, unlike sums in bfloat16
        with torch.no_grad():
            q.copy_(whole(p))
        q.grad = q.detach().clone()
    reference.state.clear()
    for _ in range(3):
        optimizer.step()
        reference.step()
    for p, q in zip(model.parameters(), reference.param_groups[0]["params"], strict=True):
        state = optimizer.state[p]
        for key in ("master_param", "ema", "exp_avg"):
            assert isinstance(state[key], DTensor) == isinstance(p, DTensor) and state[key].dtype == torch.float32
            assert_same([state[key]], [reference.state[q][key]], key)
        assert torch.equal(whole(p), whole(state["master_param"]).bfloat16())
    del part


# --- both ways of cutting at once -------------------------------------------------------------------------------------
def check_both(mesh):
    """fully_shard over tensor parallelism: its shards are strided, and some parameters are cut one way alone."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    seen, _ = single(OPTIMIZERS["AdamW"], **CLIPPED)
    model = a_model()
    parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["data"])
    optimizer = OPTIMIZERS["AdamW"](model.parameters(), **CLIPPED)
    rank = mesh.get_local_rank("data")
    for t in train(model, optimizer, lambda t: batch(t).chunk(RANKS)[rank], STEPS, bad=2):
        assert_same(model.parameters(), seen[t][0], f"step {t}")
        torch.testing.assert_close(optimizer.grad_norm, seen[t][1], rtol=1e-5, atol=0)


# --- checkpoints ------------------------------------------------------------------------------------------------------
def check_checkpoint(mesh, folder, name):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    options = {**CLIPPED, "ema_decay": 0.5, **({"state_dtype": torch.bfloat16} if name == "AdamW" else {})}
    options["master_weights"] = name == "SGD"

    def fresh():
        model = a_model().to(torch.bfloat16 if options["master_weights"] else torch.float32)
        part = sharded(model, mesh, "fully_shard")
        return model, OPTIMIZERS[name](model.parameters(), **options), lambda t: part(t).to(model.scale.dtype)

    model, optimizer, part = fresh()
    list(train(model, optimizer, part, 3))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    saved = {n: {k: whole(v).clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    list(train(model, optimizer, part, 2, start=3))

    again, second, part = fresh()
    weights, states = get_state_dict(again, second)  # makes states to be filled
    loaded = {"model": weights, "optimizer": states}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(again, second, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for n, p in again.named_parameters():
        assert second.state[p].keys() == saved[n].keys()
        for k, v in second.state[p].items():
            assert v.dtype == saved[n][k].dtype and torch.equal(whole(v), saved[n][k]), (n, k)
    list(train(again, second, part, 2, start=3))
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))


# --- what is left -----------------------------------------------------------------------------------------------------
def check_more(mesh):
    """8 bits are refused, a scaler's inf is everybody's, backward may step."""
    from torch.distributed.tensor import Shard, distribute_tensor

    p = torch.nn.Parameter(distribute_tensor(torch.zeros(80, 80), mesh, [Shard(0)]))
    small = torch.nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0)]))
    optimizer = AdamW([p, small], state_dtype=torch.uint8)
    small.grad = torch.ones_like(small)
    optimizer.step()
    p.grad = torch.ones_like(p)
    sentence = "states of 8 bits are not for DTensors: where one is cut, its blocks would be others"
    with pytest.raises(NotImplementedError, match=f"fastlm.optim.AdamW: {sentence}"):
        optimizer.step()
    assert p not in optimizer.state and small in optimizer.state
    stock = torch.optim.AdamW([p, small])
    stock.step()
    with pytest.raises(NotImplementedError, match=sentence):
        AdamW([p, small], state_dtype=torch.uint8).load_state_dict(stock.state_dict())

    for name, make in OPTIMIZERS.items():
        p = torch.nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
        optimizer = make([p])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for t in range(3):
            p.grad = torch.ones_like(p)
            if t == 1 and dist.get_rank() == 1:
                p.grad.to_local()[0, 0] = float("inf")
            before = p.full_tensor().detach().clone()
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
            scaler.update(4.0)
            assert torch.equal(p.full_tensor(), before) == (t == 1), name
        assert optimizer.skipped_steps == 1 and whole(optimizer.state[p]["step"]) == 2

        seen, _ = single(make, max_norm=float("inf"))
        model = a_model()
        part = sharded(model, mesh, "fully_shard")
        optimizer = make(model.parameters())
        optimizer.step_in_backward()
        for t in range(STEPS):
            model(part(t)).square().mean().backward()
            assert all(p.grad is None for p in model.parameters())
            assert_same(model.parameters(), seen[t][0], f"{name} in backward, step {t}")


def check_uneven(mesh):
    """A rank that lacks a gradient, or all of them, takes part in the norm; plain parameters are not for backward."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for missing in (1, 2):  # of two gradients, on the last rank
        params = [torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(i)])) for i in range(2)]
        optimizer = SGD(params, 0.1, max_norm=float("inf"), skip_nonfinite=True)
        for p in params[missing if dist.get_rank() == RANKS - 1 else 0 :]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        here = [p.grad.to_local().numel() for p in params if p.grad is not None]
        numbers = torch.tensor(float(sum(here)))
        dist.all_reduce(numbers)
        torch.testing.assert_close(optimizer.grad_norm, numbers.sqrt())
    with pytest.raises(RuntimeError, match="SGD: with several processes step_in_backward is for DTensors alone"):
        SGD([torch.ones(3, requires_grad=True)]).step_in_backward()


def work(rank, store, checks, sizes):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = {"world_size": math.prod(sizes.values()), "timeout": datetime.timedelta(seconds=120)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, **options)
    try:
        mesh = dist.init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        for check, *arguments in checks:
            check(mesh, *arguments)
    finally:
        dist.destroy_process_group()


def on_mesh(folder, sizes, *checks):
    """By processes that are forked off one that has imported all of it: imports would take longer than the tests."""
    parts = ["distributed.fsdp", "distributed.checkpoint.state_dict", "distributed.tensor.parallel", "_dynamo"]
    multiprocessing.set_forkserver_preload([*(f"torch.{part}" for part in parts), "torch.testing", "fastlm"])
    arguments = (folder / "store", checks, sizes)
    mp.start_processes(work, arguments, nprocs=math.prod(sizes.values()), start_method="forkserver")


def on_two(folder, *checks):
    on_mesh(folder, {"data": RANKS}, *checks)


def test_ddp(tmp_path):
    on_two(tmp_path, *((check_ddp, name) for name in OPTIMIZERS))


@pytest.mark.parametrize("kind", ["fully_shard", "tensor parallel", "placed"])
def test_sharded_parameters(tmp_path, kind):
    masters = [] if kind == "placed" else [(check_masters, kind)]
    on_two(tmp_path, *((check_sharded, kind, name) for name in OPTIMIZERS), *masters)


def test_fully_shard_over_tensor_parallelism(tmp_path):
    on_mesh(tmp_path, {"data": RANKS, "model": RANKS}, (check_both,))


def test_distributed_checkpoints(tmp_path):
    on_two(tmp_path, *((check_checkpoint, str(tmp_path / name), name) for name in OPTIMIZERS))


def test_what_goes_with_dtensors_and_what_does_not(tmp_path):
    on_two(tmp_path, (check_more,), (check_uneven,))
