"""fastlm.optim.Adam and AdamW as drop-ins for torch.optim's."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlm
from fastlm.ops.adam import adam_reference

PAIRS = [(fastlm.optim.Adam, torch.optim.Adam), (fastlm.optim.AdamW, torch.optim.AdamW)]
KINDS = [ours for ours, _ in PAIRS]
both = pytest.mark.parametrize("ours, theirs", PAIRS, ids=["Adam", "AdamW"])
each = pytest.mark.parametrize("kind", KINDS)
SGD = (functools.partial(fastlm.optim.SGD, momentum=0.9), functools.partial(torch.optim.SGD, momentum=0.9))
all_of_them = pytest.mark.parametrize("ours, theirs", [*PAIRS, SGD], ids=["Adam", "AdamW", "SGD"])
every = pytest.mark.parametrize("kind", [*KINDS, SGD[0]], ids=["Adam", "AdamW", "SGD"])


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), (), (0, 3), (33, 65)]
    params = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    params.append(torch.randn(6, 9, generator=draw).t().to(dtype).requires_grad_())
    params.append(torch.randn(4, 3, 5, 6, generator=draw).to(dtype, memory_format=torch.channels_last).requires_grad_())
    return params


def run(optimizer, params, steps, start=0, grad_like=torch.empty_like):
    """Steps with the gradients of steps start, start + 1, ..., laid out as their parameters.

    torch's fused CPU kernel pairs elements by their place in memory: other strides give wrong numbers there.
    """
    for t in range(start, start + steps):
        draw = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = grad_like(p.detach()).copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))
        optimizer.step()


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_state(got, want, tolerance=0.0):
    assert list(got["state"]) == list(want["state"])
    for key, entries in want["state"].items():
        assert list(got["state"][key]) == list(entries)
        for name, value in entries.items():
            ours = got["state"][key][name]
            assert (ours.dtype, ours.device, ours.stride()) == (value.dtype, value.device, value.stride()), name
            torch.testing.assert_close(ours, value, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(got["param_groups"], want["param_groups"], strict=True):
        assert {key: ours[key] for key in theirs} == theirs  # torch before 2.7 lacks the newest key


def saved_and_loaded(state_dict):
    saved = io.BytesIO()
    torch.save(state_dict, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=True)


# --- the same as torch ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_same_arguments_in_the_same_order(name):
    ours, theirs = getattr(fastlm.optim, name), getattr(torch.optim, name)

    def listed(kind):
        return [(p.name, p.default, p.kind) for p in inspect.signature(kind.__init__).parameters.values()]

    known, own = listed(theirs), listed(ours)
    beyond = [
        "l1",
        "max_norm",
        "skip_nonfinite",
        "state_dtype",
        "master_weights",
        "ema_decay",
        "stochastic_rounding",
        "seed",
    ]
    if name == "SGD":
        beyond.remove("state_dtype")
    assert [name for name, _, _ in own[-len(beyond) :]] == beyond
    own = own[: -len(beyond)]
    if "decoupled_weight_decay" not in dict.fromkeys(name for name, _, _ in known):  # younger than the rest
        assert own[: len(known)] == known
    else:
        assert own == known


@both
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_and_state(ours, theirs, weight_decay, amsgrad, maximize):
    flags = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    a, b = parameters(), parameters()
    mine, torchs = ours(a, **flags), theirs(b, **flags)
    run(mine, a, 10)
    run(torchs, b, 10)
    assert_close(a, b)
    assert_same_state(mine.state_dict(), torchs.state_dict(), tolerance=1e-5)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(ours, theirs, dtype):
    a, b = parameters(dtype), parameters(dtype)
    run(ours(a, 0.01), a, 5)
    run(theirs(b, 0.01, fused=True), b, 5)
    assert_close(a, b, tolerance=1e-10 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps)


@all_of_them
def test_gradients_laid_out_unlike_their_parameters(ours, theirs):
    a, b = parameters(), parameters()
    flipped = {"grad_like": lambda p: torch.empty(p.shape[::-1]).permute(tuple(reversed(range(p.dim()))))}
    run(ours(a, 0.01), a, 5, **flipped)
    run(theirs(b, 0.01, foreach=False), b, 5, **flipped)
    assert_close(a, b)


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(0, 1),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    eps=st.floats(1e-10, 1),
    weight_decay=st.floats(0, 1),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    pair=st.sampled_from(PAIRS),
)
def test_any_options_in_double(lr, betas, eps, weight_decay, amsgrad, maximize, pair):
    results = []
    for kind in pair:
        params = parameters(torch.float64)
        run(kind(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize), params, 3)
        results.append(params)
    assert_close(*results, tolerance=1e-9)


# --- state that changes hands -----------------------------------------------------------------------------------------
@both
@pytest.mark.parametrize("flags", [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}, {"maximize": True}])
def test_torch_state_continues_here_and_back(ours, theirs, flags):
    straight = parameters()
    run(theirs(straight, 0.01, **flags), straight, 9)

    params = parameters()
    optimizer = theirs(params, 0.01, **flags)
    run(optimizer, params, 3)
    for t, kind in ((3, ours), (6, theirs)):
        saved = saved_and_loaded(optimizer.state_dict())
        before = optimizer.state_dict()
        optimizer = kind(params, 1.0)  # the saved lr takes over
        optimizer.load_state_dict(saved)
        assert_same_state(optimizer.state_dict(), before)
        run(optimizer, params, 3, start=t)
    assert_close(params, straight)


@pytest.mark.parametrize("reloaded", [copy.deepcopy, saved_and_loaded], ids=["copied", "saved"])
@pytest.mark.parametrize("flags", [{}, {"nesterov": True}, {"dampening": 0.5}, {"momentum": 0.0}], ids=str)
def test_state_of_sgd_goes_to_torch_and_back(flags, reloaded):
    """A sum of gradients begins with the first of them, without dampening: later steps are no first ones anywhere."""
    ours, theirs = SGD
    straight, params = parameters(), parameters()
    run(theirs(straight, 0.01, **flags), straight, 12)
    optimizer = ours(params, 0.01, **flags)
    run(optimizer, params, 3)
    for t, kind in ((3, theirs), (6, ours), (9, ours)):
        saved = reloaded(optimizer.state_dict())
        optimizer = kind(params, 1.0)  # the saved lr takes over
        optimizer.load_state_dict(saved)
        run(optimizer, params, 3, start=t)
    assert_close(params, straight)
    if "momentum" not in flags:
        assert all(s["step"] == 9 for s in optimizer.state.values())  # torch does not count


@pytest.mark.parametrize("flags", [{"amsgrad": True}, {}])
@every
def test_own_state_continues_bit_for_bit(kind, flags):
    if flags and kind is SGD[0]:
        pytest.skip("Adam's")
    straight, params = parameters(), parameters()
    run(kind(straight, 0.01, **flags), straight, 6)
    first = kind(params, 0.01, **flags)
    run(first, params, 3)
    second = kind(params, 0.01, **flags)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, params, 3, start=3)
    for a, b in zip(params, straight, strict=True):
        assert torch.equal(a, b)


def test_loading_casts_state_to_the_parameter_and_leaves_steps():
    wide, narrow = parameters(), parameters(torch.bfloat16)
    first, second = fastlm.optim.AdamW(wide), fastlm.optim.AdamW(narrow)
    run(first, wide, 2)
    second.load_state_dict(first.state_dict())
    for entries in second.state.values():
        assert entries["exp_avg"].dtype == entries["exp_avg_sq"].dtype == torch.bfloat16
        assert (entries["step"].dtype, entries["step"].item()) == (torch.float32, 2)
    run(second, narrow, 1)


def test_state_of_an_old_torch_loads():
    """Before 1.12 the step was a number, and the groups lacked later keys."""
    params = parameters()
    optimizer = fastlm.optim.AdamW(params)
    run(optimizer, params, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for entries in old["state"].values():
        entries["step"] = int(entries["step"])
    for group in old["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            del group[key]
    loaded = fastlm.optim.AdamW(params)
    loaded.load_state_dict(old)
    assert_same_state(loaded.state_dict(), optimizer.state_dict())


def test_unsupported_state_is_refused_and_nothing_changes():
    params = parameters()
    optimizer = fastlm.optim.AdamW(params)
    run(optimizer, params, 1)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["differentiable"] = True
    with pytest.raises(NotImplementedError, match=r"AdamW: differentiable=True is not supported"):
        optimizer.load_state_dict(bad)
    assert_same_state(optimizer.state_dict(), before)


def test_a_group_changed_later_is_refused_too():
    params = parameters()
    optimizer = fastlm.optim.AdamW(params)
    optimizer.param_groups[0]["differentiable"] = True
    with pytest.raises(NotImplementedError, match=r"AdamW: differentiable=True is not supported"):
        run(optimizer, params, 1)


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alone(kind, copied):
    params = parameters()
    optimizer = kind(params, 0.01)
    run(optimizer, params, 2)
    twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    run(twin, twins, 2, start=2)
    run(optimizer, params, 2, start=2)
    for a, b in zip(params, twins, strict=True):
        assert a is not b and torch.equal(a, b)


# --- the rest of an optimizer -----------------------------------------------------------------------------------------
@both
def test_groups_with_their_own_options(ours, theirs):
    results = []
    for kind in (ours, theirs):
        params = parameters()
        optimizer = kind([{"params": params[:2], "lr": 0.1}, {"params": iter(params[2:4]), "weight_decay": 0.3}], 0.01)
        optimizer.add_param_group({"params": params[4:], "betas": (0.5, 0.6), "amsgrad": True})
        run(optimizer, params, 4)
        results.append(params)
    assert_close(*results)


def test_tensor_betas_are_read_at_every_step():
    results = []
    for kind in (fastlm.optim.Adam, torch.optim.Adam):
        p = torch.nn.Parameter(torch.ones(3))
        beta1 = torch.tensor(0.9)
        optimizer = kind(
            [p],
            lr=0.1,
            betas=(beta1, torch.tensor(0.99)),
            **({} if kind.__module__.startswith("fastlm") else {"foreach": False}),
        )
        for g in (1.0, -1.0):
            p.grad = torch.full((3,), g)
            optimizer.step()
            beta1.fill_(0.0)
        results.append((p.detach(), optimizer.state[p]["exp_avg"]))
    torch.testing.assert_close(*results)


@all_of_them
def test_schedulers_move_lr_and_betas(ours, theirs):
    results = []
    for kind in (ours, theirs):
        params = parameters()
        optimizer = kind(params, 0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12)
        for t in range(6):
            run(optimizer, params, 1, start=t)
            scheduler.step()
        results.append(params)
    assert_close(*results)


@all_of_them
def test_tensor_learning_rate(ours, theirs):
    results = []
    for kind in (ours, theirs):
        params = parameters()
        optimizer = kind(params, torch.tensor(0.1))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for t in range(3):
            run(optimizer, params, 1, start=t)
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
        results.append(params)
    assert_close(*results)


@each
def test_parameters_without_gradient_are_left_alone(kind):
    params = parameters()
    optimizer = kind(params, 0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    for p, b in zip(params[1:], before[1:], strict=True):
        assert torch.equal(p, b)
    assert list(optimizer.state) == [params[0]]


@pytest.mark.parametrize("kind", [*KINDS, fastlm.optim.SGD])
def test_closure_zero_grad_and_hooks(kind):
    w = torch.tensor([3.0], requires_grad=True)
    optimizer = kind([w], 0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == 9 and losses == sorted(losses, reverse=True)
    assert seen == ["before", "after"] * 20
    assert w.requires_grad and w.is_leaf
    optimizer.zero_grad()
    assert w.grad is None


@each
def test_gradient_scaler_unscales_and_skips(kind):
    """The scaler does it outside the step: inf gradients skip it, finite ones arrive unscaled."""
    results = []
    for scaled in (True, False):
        params = parameters()
        optimizer = kind(params, 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for t in range(4):
            draw = torch.Generator().manual_seed(t)
            scale = 1024.0 if scaled else 1.0
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw) * scale
            scaler.scale(torch.zeros(1))  # a scaler initialises itself at its first loss
            if t == 2:
                if not scaled:
                    continue
                params[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            if scaled:
                scaler.update(1024.0)
        assert {s["step"].item() for s in optimizer.state.values()} == {3}
        results.append(params)
    assert_close(*results, tolerance=1e-6)


@every
def test_stale_graph_is_noticed(kind):
    w = torch.ones(4, requires_grad=True)
    optimizer = kind([w], 0.1)
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every
def test_non_contiguous_parameters_are_updated_in_place(kind):
    whole = torch.zeros(6, 8)
    view = whole[::2, 1:7].requires_grad_()
    optimizer = kind([view], 0.1)
    view.grad = torch.ones(3, 6)
    optimizer.step()
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[::2, 1:7] = True
    torch.testing.assert_close(whole, torch.where(inside, -0.1, 0.0), rtol=1e-5, atol=0)


def test_default_dtype_double_counts_in_double():
    torch.set_default_dtype(torch.float64)
    try:
        params = parameters(torch.float32)
        optimizer = fastlm.optim.AdamW(params)
        run(optimizer, params, 1)
        assert {s["step"].dtype for s in optimizer.state.values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_runs_on_the_backend_in_use(name):
    a, b = parameters(), parameters()
    with fastlm.use_backend(name):
        run(fastlm.optim.AdamW(a, 0.01), a, 3)
    run(torch.optim.AdamW(b, 0.01), b, 3)
    assert_close(a, b)


# --- bad input --------------------------------------------------------------------------------------------------------
@each
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be at least 0, got nan"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one element, got 2 elements"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0, got -0.1"),
        ({"betas": (1.0, 0.9)}, ValueError, "betas must be two numbers in [0, 1), got (1.0, 0.9)"),
        ({"betas": (0.9, -0.1)}, ValueError, "betas must be two numbers in [0, 1), got (0.9, -0.1)"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers in [0, 1), got (0.9,)"),
        ({"betas": 0.9}, ValueError, "betas must be two numbers in [0, 1), got (0.9,)"),
        (
            {"betas": (torch.ones(2), 0.9)},
            ValueError,
            "betas must be two numbers in [0, 1), got (tensor([1., 1.]), 0.9)",
        ),
        ({"fused": True, "foreach": True}, RuntimeError, "foreach and fused cannot both be True"),
        (
            {"differentiable": True},
            NotImplementedError,
            "differentiable=True is not supported: the step is done in place",
        ),
    ],
)
def test_bad_arguments(kind, arguments, error, message):
    with pytest.raises(error) as raised:
        kind(parameters(), **arguments)
    assert str(raised.value) == f"fastlm.optim.{kind.__name__}: {message}"
    optimizer = kind(parameters())
    with pytest.raises(error):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], **arguments})
    assert len(optimizer.param_groups) == 1


@each
def test_parameters_of_other_dtypes(kind):
    with pytest.raises(TypeError) as raised:
        kind([torch.zeros(2), torch.zeros(2, dtype=torch.complex32, requires_grad=True)])
    assert str(raised.value) == (
        f"fastlm.optim.{kind.__name__}: parameters must be floating point, complex64 or complex128, got "
        "torch.complex32 at 1"
    )


@each
def test_sparse_gradients(kind):
    w = torch.zeros(3, requires_grad=True)
    w.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError) as raised:
        kind([w]).step()
    assert str(raised.value) == (
        f"fastlm.optim.{kind.__name__} does not support sparse gradients, got torch.sparse_coo; "
        "see torch.optim.SparseAdam"
    )


@every
def test_expanded_parameter(kind):
    w = torch.zeros(1).expand(3).requires_grad_()
    w.grad = torch.ones(3)
    with pytest.raises(ValueError, match="no two of its elements may share memory"):
        kind([w]).step()


@each
def test_state_that_no_longer_fits(kind):
    w = torch.zeros(3, requires_grad=True)
    optimizer = kind([w])
    w.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(
        RuntimeError, match=r"amsgrad was switched on after the first step of a parameter of sizes \(3,\)"
    ):
        optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    w.data = w.data.double()
    w.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"exp_avgs\[0\] must be of torch.float64 for params\[0\]"):
        optimizer.step()


def test_what_cannot_be_captured(monkeypatch):
    """A count on the host, and a state that the capture would make: replays would not do them right."""
    params = parameters()
    host, first, ready = (fastlm.optim.AdamW(params, capturable=on) for on in (False, True, True))
    run(ready, params, 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="counts steps on the host, which a CUDA graph would not do again"):
        host.step()
    with pytest.raises(RuntimeError, match="has no state yet, which a CUDA graph would set to 0 at every replay"):
        first.step()
    ready.step()
    for state in ready.state.values():  # as if the group had been made capturable since
        state["step"] = state["step"].to("meta")
    with pytest.raises(RuntimeError, match="made capturable after the last step, whose count is still on the host"):
        ready.step()


def test_a_group_made_capturable_later_counts_on_the_device():
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    optimizer = fastlm.optim.AdamW([p])
    optimizer.state[p] = {
        "step": torch.tensor(5.0),
        **{k: torch.empty(3, device="meta") for k in ("exp_avg", "exp_avg_sq")},
    }
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    assert optimizer.state[p]["step"].is_meta


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_capturable_is_the_same_and_reads_lr_from_its_tensor(backend):
    a, b = parameters(), parameters()
    lr = torch.tensor(0.01, dtype=torch.float64)
    ours = fastlm.optim.AdamW(a, lr, capturable=True, max_norm=1.0)
    plain = fastlm.optim.AdamW(b, 0.01, max_norm=1.0)
    with fastlm.use_backend(backend):
        for _ in range(3):
            run(ours, a, 1)
            run(plain, b, 1)
            lr.mul_(0.5)
            plain.param_groups[0]["lr"] *= 0.5
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    loaded = torch.optim.AdamW(parameters(), capturable=False)
    loaded.load_state_dict(ours.state_dict())
    assert loaded.param_groups[0]["capturable"] and loaded.state[loaded.param_groups[0]["params"][0]]["step"] == 3


def test_a_capturable_step_waits_for_no_gpu():
    """On tensors that are nowhere: whatever asks for a number of theirs raises."""
    p = [torch.nn.Parameter(torch.empty(n, 3, device="meta", dtype=torch.bfloat16)) for n in (5, 7)]
    lr = torch.empty((), device="meta")
    for q in p:
        q.grad = torch.empty_like(q)
    optimizer = fastlm.optim.AdamW(p, capturable=True, max_norm=1.0)
    optimizer.param_groups[0]["lr"] = lr  # the constructor looks whether it is negative
    for _ in range(2):
        optimizer.step()
    states = [optimizer.state[q] for q in p]
    assert optimizer.grad_norm.is_meta and all(s["step"].is_meta for s in states)
    lists = [[s[key] for s in states] for key in ("exp_avg", "exp_avg_sq")]
    numbers = (1.0, 0.9, 0.99, 1e-8, 0.1, True, False, False, optimizer.grad_norm, True, lr, True, 3)
    with torch.no_grad():
        adam_reference(p, [q.grad for q in p], *lists, [], [s["step"] for s in states], *numbers)
    optimizer.param_groups[0]["capturable"] = False
    for s in states:  # as where the host counts
        s["step"] = torch.zeros(())
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()


# --- beyond torch -----------------------------------------------------------------------------------------------------
@all_of_them
@pytest.mark.parametrize("max_norm", [0.5, 1e3, float("inf")])
def test_clipping_in_the_step(ours, theirs, max_norm):
    a, b = parameters(), parameters()
    groups = lambda ps: [{"params": ps[:1]}, {"params": ps[1:], "lr": 0.03}]  # noqa: E731
    mine, stock = ours(groups(a), 0.01, max_norm=max_norm), theirs(groups(b), 0.01)
    for seed in range(3):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            q.grad = p.grad.clone()
        kept = [p.grad.clone() for p in a]
        mine.step()
        norm = torch.nn.utils.clip_grad_norm_(b, max_norm)
        stock.step()
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-6, atol=0)
        assert mine.grad_norm.dim() == 0
        for p, grad in zip(a, kept, strict=True):
            assert torch.equal(p.grad, grad)  # read, not changed
    assert_close(a, b)


@pytest.mark.parametrize("kind", [fastlm.optim.Adam, fastlm.optim.AdamW])
def test_a_norm_that_is_not_finite_spreads_as_in_torch(kind):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.tensor([1.0, float("nan"), 2.0])
    optimizer = kind([p], max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.isnan() and p.isnan().all()


def test_the_norm_without_gradients():
    optimizer = fastlm.optim.AdamW(parameters(), max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0


def test_second_moments_in_bfloat16_decay():
    """After one large gradient, zeros: rounded to nearest the average of squares would stay where it is."""
    p = torch.zeros(20_000, requires_grad=True)
    optimizer = fastlm.optim.AdamW([p], 0.0, betas=(0.9, 0.999), state_dtype=torch.bfloat16)
    stuck = torch.zeros(20_000, dtype=torch.bfloat16, requires_grad=True)
    nearest = fastlm.optim.AdamW([stuck], 0.0, betas=(0.9, 0.999))
    for step in range(1001):
        p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
        stuck.grad = p.grad.bfloat16()
        optimizer.step()
        nearest.step()
    second = optimizer.state[p]["exp_avg_sq"]
    assert second.dtype == optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert second.double().mean().item() == pytest.approx(1e-3 * 0.999**1000, rel=0.01)
    assert nearest.state[stuck]["exp_avg_sq"].double().mean().item() == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_states_of_their_own_dtype(dtype, state_dtype):
    """As close to a state in float32 as the dtypes allow; the state's dtype lasts through saving and copying."""
    p, q = (torch.linspace(-1, 1, 5000).to(dtype).requires_grad_() for _ in range(2))
    ours = fastlm.optim.AdamW([p], 0.01, state_dtype=state_dtype)
    exact = q.detach().double().requires_grad_()
    stock = torch.optim.AdamW([exact], 0.01)
    for seed in range(20):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        exact.grad = p.grad.double()
        ours.step()
        stock.step()
        if seed == 9:
            saved = ours.state_dict()
            ours = fastlm.optim.AdamW([p], 0.01, state_dtype=state_dtype)
            ours.load_state_dict(saved)
        if seed == 14:
            ours = copy.deepcopy(ours)
            ours.param_groups[0]["params"] = [p]
            ours.state = {p: next(iter(ours.state.values()))}
    assert ours.state_dtype == state_dtype
    assert {s.dtype for s in ours.state[p].values() if s.dim()} == {state_dtype}
    # Half a last digit of bfloat16 at each of twenty steps, where that is the parameters' dtype.
    assert (p.double() - exact).abs().max() < (2e-3 if dtype == torch.float32 else 20 * 2**-9)


def test_parameters_in_bfloat16_move_by_less_than_their_last_digit():
    """200 steps of 1/16 of the last digit of 1: rounded to nearest they are lost, at random they come in the mean."""
    ends = {}
    for at_random, seed in ((False, 0), (True, 0), (True, 0), (True, 1)):
        p = torch.ones(20_000, dtype=torch.bfloat16, requires_grad=True)
        optimizer = fastlm.optim.AdamW([p], 2**-12, weight_decay=0.0, stochastic_rounding=at_random, seed=seed)
        for _ in range(200):
            p.grad = torch.full_like(p, -1.0)
            optimizer.step()
        if (at_random, seed) in ends:
            assert torch.equal(ends[at_random, seed], p.detach())
        ends[at_random, seed] = p.detach()
    assert (ends[False, 0] == 1).all()
    assert not torch.equal(ends[True, 0], ends[True, 1])
    for seed in (0, 1):
        moved = ends[True, seed].double().mean().item() - 1
        # The variance of a step is at most a quarter of the squared digit, 2^-7.
        assert moved == pytest.approx(200 * 2**-12, abs=5 * 2**-8 * (200 / 20_000) ** 0.5)


def test_groups_are_rounded_by_numbers_of_their_own():
    """Two equal parameters with equal gradients part, in one group and in two."""
    for groups in (1, 2):
        p, q = (torch.ones(1000, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        given = [p, q] if groups == 1 else [{"params": [p]}, {"params": [q]}]
        optimizer = fastlm.optim.AdamW(given, 2**-12, weight_decay=0.0, stochastic_rounding=True)
        for _ in range(20):
            for x in (p, q):
                x.grad = torch.full_like(x, -1.0)
            optimizer.step()
        assert 0.1 < (p != q).float().mean() < 0.9


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("size", [(70_001,), ()])
def test_random_rounding_of_parameters_is_the_same_on_every_backend(backend, size):
    results = []
    for name in ("reference", backend):
        p = torch.linspace(-1, 1, 70_001)[: max(1, sum(size))].reshape(size).bfloat16().requires_grad_()
        optimizer = fastlm.optim.AdamW([p], 0.001, state_dtype=torch.float32, stochastic_rounding=True, seed=-5)
        with fastlm.use_backend(name):
            for seed in range(3):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
                optimizer.step()
        results.append(p.detach())
    assert (results[0] != results[1]).float().mean() < 2e-3


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_random_rounding_is_the_same_on_every_backend_and_number_of_threads(backend):
    threads, results = torch.get_num_threads(), []
    try:
        for n, name in ((1, "reference"), (1, backend), (7, backend)):
            torch.set_num_threads(n)
            p = torch.linspace(-1, 1, 70_001).requires_grad_()
            optimizer = fastlm.optim.AdamW([p], 0.01, state_dtype=torch.bfloat16)
            with fastlm.use_backend(name):
                for seed in range(3):
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
                    optimizer.step()
            results.append(optimizer.state[p]["exp_avg_sq"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[1], results[2])
    # Where a last bit of float32 differs before it is rounded, one more number in many goes the other way.
    assert (results[0] != results[1]).float().mean() < 1e-3


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_norm": 0.0}, "max_norm must be above 0"),
        ({"state_dtype": torch.float16}, "state_dtype must be torch.float32"),
    ],
)
@pytest.mark.parametrize("kind", [fastlm.optim.Adam, fastlm.optim.AdamW])
def test_bad_arguments_beyond_torch(kind, wrong, message):
    with pytest.raises(ValueError, match=f"fastlm.optim.{kind.__name__}: {message}"):
        kind([torch.zeros(3, requires_grad=True)], **wrong)
