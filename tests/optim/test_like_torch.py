"""fastlm.optim against torch.optim step for step: all options that torch's own tests know, parameters of all kinds."""

import copy
import warnings

import pytest
import torch
from optim_testing import (
    BACKENDS,
    PAIRS,
    assert_close,
    assert_equal,
    copies,
    draw,
    every_pair,
    give_gradients,
    parameters,
    run,
)
from torch.optim import lr_scheduler

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch's tests need expecttest")
KNOWN = [info for info in common.optim_db if info.optim_cls.__name__ in PAIRS]
STEPS = 20
# One rounding of a parameter at a time: the states of 16 bits are computed in 32 here, and there in 16.
TOLERANCE = {torch.float32: 2e-6, torch.complex64: 2e-6, torch.float64: 1e-12, torch.complex128: 1e-12}


def inputs():
    for info in KNOWN:
        ours, theirs = PAIRS[info.optim_cls.__name__]
        given = [(x.desc, x.kwargs) for x in info.optim_inputs_func("cpu", torch.float32)]
        if theirs is torch.optim.SGD:
            everything = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}
            given.append(("everything", everything))
        else:  # torch's tests know tensors on GPUs alone
            lr, betas = torch.tensor(0.01), (torch.tensor(0.8), torch.tensor(0.95))
            given += [("lr in a tensor", {"lr": lr}), ("betas in tensors", {"lr": lr, "betas": betas})]
            given += [("maximize and amsgrad", {"maximize": True, "amsgrad": True, "weight_decay": 0.1})]
        for desc, options in given:
            yield pytest.param(ours, theirs, options, id=f"{theirs.__name__}: {desc}")


def in_both(ours, theirs, options, make, steps=STEPS):
    """The parameters after the steps of each, and the optimizers."""
    ends = []
    for kind in (ours, theirs):
        params = make()
        given = copy.deepcopy(options)
        if kind is theirs and not {"fused", "foreach"} & given.keys():
            given |= {"foreach": False, "fused": False}
        optimizer = kind(params, **given)
        run(optimizer, params, steps)
        ends.append((params, optimizer))
    return ends


def assert_same_states(mine, torchs, tolerance):
    for p, q in zip(mine.param_groups[0]["params"], torchs.param_groups[0]["params"], strict=True):
        for key, value in torchs.state[q].items():
            if value is not None:
                found = mine.state[p][key]
                assert (found.dtype, found.shape, found.stride()) == (value.dtype, value.shape, value.stride())
                torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)


# --- every option -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ours, theirs, options", list(inputs()))
def test_every_set_of_options(every_backend, ours, theirs, options):
    (a, mine), (b, torchs) = in_both(ours, theirs, options, parameters)
    assert_close(a, b, 2e-6)
    assert_same_states(mine, torchs, 2e-6)


@every_pair
@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"fused": False}], ids=str)
def test_how_torch_does_it_changes_nothing(ours, theirs, flags):
    """Compared with torch's single steps: its fused one pairs elements of sliced tensors and their states wrongly."""
    a, b = parameters(), parameters()
    mine = ours(a, lr=0.01, weight_decay=0.1, **flags)
    run(mine, a, STEPS)
    run(theirs(b, lr=0.01, weight_decay=0.1, foreach=False), b, STEPS)
    assert_close(a, b, 2e-6)
    assert flags.items() <= mine.param_groups[0].items()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_capturable_is_as_without(backend, name, lr):
    """torch's own is for GPUs alone."""
    ours, theirs = PAIRS[name]
    a, b = parameters(), parameters()
    run(ours(a, lr, amsgrad=True, capturable=True), a, STEPS)
    run(theirs(b, 0.01, amsgrad=True, foreach=False), b, STEPS)
    assert_close(a, b, 2e-6)


def errors():
    for info in KNOWN:
        for error in info.optim_error_inputs_func("cpu", torch.float32):
            yield pytest.param(info, error, id=f"{info.optim_cls.__name__}: {error.optimizer_error_input.desc}")
        for options in (
            {"foreach": True, "fused": True},
            {"fused": True, "differentiable": True},
            {"weight_decay": -0.1},
            {"lr": -0.1},
            {"momentum": 0.0, "nesterov": True} if info.optim_cls is torch.optim.SGD else {"eps": -1.0},
        ):
            error = common.ErrorOptimizerInput(common.OptimizerInput([torch.zeros(3)], options), error_type=None)
            yield pytest.param(info, error, id=f"{info.optim_cls.__name__}: {options}")


@pytest.mark.parametrize("info, error", list(errors()))
def test_every_error(info, error):
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.zeros(3))]
    raised = []
    for kind in PAIRS[info.optim_cls.__name__]:
        with pytest.raises(Exception) as found, warnings.catch_warnings():
            warnings.simplefilter("error")
            kind(params, **copy.deepcopy(given.kwargs))
        raised.append(found.type)
    assert issubclass(*raised) and issubclass(raised[0], error.error_type or Exception)


# --- every parameter --------------------------------------------------------------------------------------------------
OPTIONS = {
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
}
every_optimizer = pytest.mark.parametrize("name", PAIRS)


@every_optimizer
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_wide_dtypes(backend, name, dtype):
    (a, mine), (b, torchs) = in_both(*PAIRS[name], OPTIONS[name], lambda: parameters(dtype))
    assert_close(a, b, TOLERANCE[dtype])
    assert_same_states(mine, torchs, TOLERANCE[dtype])


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(every_backend, name, dtype):
    """From equal parameters and states each step gives what torch gives, or the number beside it: torch rounds several
    times on the way. In float16 torch's eps of 1e-8 is 0."""
    if every_backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("bfloat16 is not right in Triton's interpreter")
    ours, theirs = PAIRS[name]
    options = OPTIONS[name] | ({} if name == "SGD" else {"eps": 1e-3})
    a, b = parameters(dtype), parameters(dtype)
    mine, torchs = ours(a, **options), theirs(b, **options, foreach=False)
    exact = [p.detach().double().requires_grad_() for p in a]
    doubles = theirs(exact, **options, foreach=False)
    for t in range(STEPS):
        run(torchs, b, 1, start=t)
        run(mine, a, 1, start=t)
        for p, q in zip(exact, a, strict=True):
            p.grad = q.grad.double()
        doubles.step()
        for p, q, e in zip(a, b, exact, strict=True):
            eps = torch.finfo(dtype).eps
            mine_off, torch_off = ((x.double() - e).abs() for x in (p, q))
            assert (mine_off <= torch_off + eps * (e.abs() + 0.05)).all()
            with torch.no_grad():
                q.copy_(p)
                e.copy_(p)
            for key, value in mine.state[p].items():
                if key != "step":
                    torchs.state[q][key].copy_(value)
                    doubles.state[e][key].copy_(value)


@every_optimizer
def test_all_dtypes_in_one_group(backend, name):
    """Bit for bit as with an optimizer for each."""
    dtypes = [torch.float32, torch.complex64, torch.float64, torch.bfloat16, torch.complex128, torch.float16]
    together, alone = parameters(*dtypes), parameters(*dtypes)
    some = len(alone) // len(dtypes)
    optimizer = PAIRS[name][0](together, **OPTIONS[name])
    others = [PAIRS[name][0](alone[i : i + some], **OPTIONS[name]) for i in range(0, len(alone), some)]
    for t in range(STEPS):
        give_gradients(together, t)
        give_gradients(alone, t)
        for o in (optimizer, *others):
            o.step()
    assert_equal(together, alone)


@every_pair
def test_a_conjugated_gradient(ours, theirs):
    ends = []
    for kind in (ours, theirs):
        p = draw((5,), 0, torch.complex64).requires_grad_()
        p.grad = draw((5,), 1, torch.complex64).conj().clone() if kind is theirs else draw((5,), 1, p.dtype).conj()
        kind([p], 0.1).step()
        ends.append([p])
    assert_close(*ends, 1e-6)
    p = draw((5,), 0, torch.complex64).conj().requires_grad_()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="conjugated"):
        ours([p], 0.1).step()


@every_optimizer
@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_come_and_go(backend, name, seed):
    ends = []
    for kind in PAIRS[name]:
        params = parameters()
        optimizer = kind(params, **OPTIONS[name], **({"foreach": False} if kind is PAIRS[name][1] else {}))
        for t in range(STEPS):
            give_gradients(params, t)
            for i in torch.randperm(len(params), generator=torch.Generator().manual_seed(seed * 100 + t))[:4].tolist():
                params[i].grad = None
            optimizer.step()
        ends.append(params)
    assert_close(*ends, 2e-6)


@every_optimizer
def test_groups_closures_and_hooks(backend, name):
    ends = []
    for kind in PAIRS[name]:
        params, seen = parameters(), []
        options = {k: v for k, v in OPTIONS[name].items() if k != "lr"}
        groups = [{"params": params[:2], "lr": 0.1}, {"params": iter(params[2:4]), "weight_decay": 0.3}]
        optimizer = kind([*groups, {"params": params[4:5], "maximize": True}], 0.01, **options)
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        for t in range(STEPS):
            if t == 5:
                optimizer.add_param_group({"params": params[5:], "weight_decay": 0.0})

            def closure(params=params, optimizer=optimizer):
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = sum((p - 0.5).square().sum() for p in params)
                loss.backward()
                return loss

            seen.append(round(optimizer.step(closure).item(), 3))
        ends.append((params, seen))
    assert_close(ends[0][0], ends[1][0], 2e-6)
    assert ends[0][1] == ends[1][1] and len(ends[0][1]) == 3 * STEPS


def named(params):
    return [(f"p{i}", p) for i, p in enumerate(params)]


@every_pair
def test_named_parameters(ours, theirs):
    (a, mine), (b, torchs) = in_both(ours, theirs, {"lr": 0.1}, parameters, steps=0)
    mine, torchs = ours(named(a), 0.1), theirs(named(b), 0.1)
    run(mine, a, 2)
    run(torchs, b, 2)
    assert mine.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in named(a)]
    assert_close(a, b, 2e-6)
    again = ours(named(a), 0.1)
    again.load_state_dict(torchs.state_dict())
    assert again.param_groups[0]["param_names"] == torchs.param_groups[0]["param_names"]


SCHEDULERS = {
    "step": lambda o: [lr_scheduler.StepLR(o, 3, 0.5)],
    "lambda": lambda o: [lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t))],
    "cosine": lambda o: [lr_scheduler.CosineAnnealingLR(o, 10)],
    "restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 3)],
    "one cycle": lambda o: [lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1)],  # moves momentum and betas too
    "cycle": lambda o: [lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=False)],
    "plateau": lambda o: [lr_scheduler.ReduceLROnPlateau(o, patience=2)],
    "several": lambda o: [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)],
    "sequence": lambda o: [
        lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, 1, 4), lr_scheduler.PolynomialLR(o, 9)], [4])
    ],
}


@every_optimizer
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_schedulers(name, scheduler, lr):
    ends = []
    for kind in PAIRS[name]:
        params = parameters()
        optimizer = kind(params, **OPTIONS[name] | {"lr": copy.deepcopy(lr)})
        schedulers = SCHEDULERS[scheduler](optimizer)
        for t in range(STEPS):
            run(optimizer, params, 1, start=t)
            for s in schedulers:
                s.step(1.0) if scheduler == "plateau" else s.step()
        ends.append((params, optimizer.param_groups[0]["lr"]))
    assert_close(ends[0][0], ends[1][0], 2e-6)
    assert type(ends[0][1]) is type(ends[1][1])
    assert float(ends[0][1]) == pytest.approx(float(ends[1][1]))


# --- options that change on the way -----------------------------------------------------------------------------------
CHANGES = {
    "on": [(3, {"momentum": 0.9})],
    "on, off and on": [(3, {"momentum": 0.9}), (6, {"momentum": 0.0}), (9, {"momentum": 0.5})],
    "nesterov": [(3, {"momentum": 0.9, "nesterov": True})],
    "dampening": [(0, {"momentum": 0.9}), (4, {"dampening": 0.3})],
    "maximize": [(0, {"momentum": 0.9}), (4, {"maximize": True})],
}


@pytest.mark.parametrize("reload", [False, True], ids=["", "saved and loaded each time"])
@pytest.mark.parametrize("changes", CHANGES)
def test_options_of_sgd_that_change(backend, changes, reload):
    ends = []
    for kind in PAIRS["SGD"]:
        params = parameters()
        optimizer = kind(params, 0.01)
        for t in range(12):
            optimizer.param_groups[0].update(dict(CHANGES[changes]).get(t, {}))
            if reload:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = kind(params, 0.01)
                optimizer.load_state_dict(saved)
            run(optimizer, params, 1, start=t)
        ends.append(params)
    assert_close(*ends, 2e-6)


def test_momentum_for_some_groups_alone(backend):
    ends = []
    for kind in PAIRS["SGD"]:
        params = parameters()
        optimizer = kind([{"params": params[:3], "momentum": 0.9}, {"params": params[3:]}], 0.01)
        run(optimizer, params, STEPS)
        ends.append(params)
        assert not any(p in optimizer.state and "momentum_buffer" in optimizer.state[p] for p in params[3:])
    assert_close(*ends, 2e-6)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_amsgrad_switched_on_late(name):
    """Refused: torch's foreach and single-tensor paths raise a KeyError."""
    for kind in PAIRS[name]:
        params = parameters()
        optimizer = kind(params, 0.01)
        run(optimizer, params, 1)
        optimizer.param_groups[0]["amsgrad"] = True
        with pytest.raises((RuntimeError, KeyError)):
            run(optimizer, params, 1)
        optimizer.param_groups[0]["amsgrad"] = False
        run(optimizer, params, 1, start=1)
    other = [torch.zeros(3, requires_grad=True)]  # where no step came before it is as from the start
    optimizer = PAIRS[name][0](other)
    optimizer.param_groups[0]["amsgrad"] = True
    run(optimizer, other, 1)
    assert "max_exp_avg_sq" in optimizer.state[other[0]]


# --- sparse gradients -------------------------------------------------------------------------------------------------
def sparse_gradient(t):
    at = torch.randint(7, (1, 4), generator=torch.Generator().manual_seed(t))  # some twice
    return torch.sparse_coo_tensor(at, draw((4, 3), t), (7, 3))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_sparse_gradients_as_torch(maximize, lr):
    ends = []
    for kind in PAIRS["SGD"]:
        params = [draw((7, 3), 0).requires_grad_(), draw((5,), 1).requires_grad_()]
        optimizer = kind(params, lr, maximize=maximize)
        for t in range(5):
            params[0].grad, params[1].grad = sparse_gradient(t), draw((5,), t)
            optimizer.step()
        ends.append(params)
    assert_close(*ends, 2e-6)


def test_an_embedding_with_sparse_gradients():
    ends = []
    for kind in PAIRS["SGD"]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(20, 4, sparse=True), torch.nn.Linear(4, 3))
        optimizer = kind(model.parameters(), 0.1)
        for t in range(5):
            optimizer.zero_grad()
            model(torch.tensor([t, 3, 3, 7])).square().sum().backward()
            optimizer.step()
        ends.append(list(model.parameters()))
    assert_close(*ends, 2e-6)


# --- two devices ------------------------------------------------------------------------------------------------------
@every_optimizer
def test_a_group_on_two_devices(name):
    """The second is nowhere: only that each gets a call of its own, and the state is where its parameter is."""
    params = [p for i in range(3) for p in (draw((5,), i).requires_grad_(), torch.empty(4, device="meta"))]
    alone = [p.detach().clone().requires_grad_() for p in params[::2]]
    both = PAIRS[name][0](params, **OPTIONS[name])
    single = PAIRS[name][0](alone, **OPTIONS[name])
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = draw(p.shape, 10 * t + i).to(p.device)
        for p, q in zip(params[::2], alone, strict=True):
            q.grad = p.grad.clone()
        both.step()
        single.step()
    assert_close(params[::2], alone, 0)
    assert all(x.device == p.device for p in params for x in both.state[p].values() if x.dim())


# --- a thousand steps -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", ["plain", "decay"])
@pytest.mark.parametrize("backend", BACKENDS[:-1] or BACKENDS, indirect=True)
@every_optimizer
def test_a_thousand_steps_are_as_exact_as_torch(backend, name, options):
    """Against torch in float64, at most twice the error of torch in float32."""
    ours, theirs = PAIRS[name]
    options = OPTIONS[name] if options == "decay" else {"lr": 0.01}
    start = [draw(shape, i) for i, shape in enumerate([(40, 7), (65,), ()])]
    ends = {}
    for kind, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        params = [p.to(dtype).clone().requires_grad_() for p in start]
        optimizer = kind(params, **options, **({"foreach": False} if kind is theirs else {}))
        draws = torch.Generator().manual_seed(0)
        for _ in range(1000):
            for p in params:
                p.grad = torch.randn(p.shape, generator=draws).to(dtype)
            optimizer.step()
        ends[kind, dtype] = torch.cat([p.detach().double().flatten() for p in params])
    exact = ends[theirs, torch.float64]
    mine, torchs = ((ends[kind, torch.float32] - exact) for kind in (ours, theirs))
    assert mine.abs().max() <= 2 * torchs.abs().max() + 2**-22
    assert mine.norm() <= 2 * torchs.norm() + 2**-22


def test_no_option_is_ignored():
    """What the groups hold beside the parameters is what torch's hold, and our own."""
    for name, (ours, theirs) in PAIRS.items():
        groups = [kind(copies(parameters()), 0.1).param_groups[0] for kind in (ours, theirs)]
        assert list(groups[0]) == [*groups[1], "l1"], name
        assert {k: groups[0][k] for k in groups[1] if k != "params"} == {
            k: v for k, v in groups[1].items() if k != "params"
        }
