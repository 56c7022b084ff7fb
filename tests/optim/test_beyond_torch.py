"""What fastlm's optimizers do beyond torch's: clipping, skipped steps, masters, averages of weights, 8 bits, steps in
backward; and that a step that fails leaves what was there."""

import copy
import io
import itertools
import math
import pickle
import re

import pytest
import torch
from optim_testing import (
    assert_close,
    assert_equal,
    assert_unchanged,
    copies,
    draw,
    every_kind,
    every_pair,
    give_gradients,
    parameters,
    run,
    snapshot,
)

import fastlm
from fastlm.optim import SGD, Adam, AdamW
from fastlm.optim import _fused as fused
from fastlm.train.checkpoint import optimizer_tensors, restore_optimizer

INF, NAN = float("inf"), float("nan")
WITH = {Adam: {"lr": 0.01, "weight_decay": 0.1}, AdamW: {"lr": 0.01}, SGD: {"lr": 0.01, "momentum": 0.9}}
adams = pytest.mark.parametrize("kind", [Adam, AdamW], ids=["Adam", "AdamW"])
BIG = 5000  # elements, enough for states of 8 bits


def make(kind, params, **options):
    return kind(params, **WITH[kind] | options)


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- every option with every other, against the formulas --------------------------------------------------------------
def exact_steps(kind, params, steps, *, max_norm=None, l1=0.0, ema_decay=0.0, amsgrad=False, maximize=False, **_):
    """The formulas in float64, of plain tensors: the parameters, and their averages."""
    lr, decay = WITH[kind]["lr"], WITH[kind].get("weight_decay", 0.01 if kind is AdamW else 0.0)
    ps = [p.detach().double() for p in params]
    ms, vs, tops, emas = ([torch.zeros_like(p) for p in ps] for _ in range(4))
    emas = [p.clone() for p in ps]
    for t in range(1, steps + 1):
        give_gradients(params, t - 1)
        gs = [p.grad.double() for p in params]
        if max_norm is not None:
            norm = sum(g.square().sum() for g in gs).sqrt()
            gs = [g * (max_norm / (norm + 1e-6)).clamp(max=1) for g in gs]
        for i, (p, g) in enumerate(zip(ps, gs, strict=True)):
            g = (-g if maximize else g) + l1 * p.sign() + (decay * p if kind is not AdamW else 0)
            if kind is SGD:
                ms[i] = g if t == 1 else 0.9 * ms[i] + g
                ps[i] = p - lr * ms[i]
            else:
                ms[i], vs[i] = 0.9 * ms[i] + 0.1 * g, 0.999 * vs[i] + 0.001 * g * g
                tops[i] = torch.maximum(tops[i], vs[i]) if amsgrad else vs[i]
                p = p * (1 - lr * decay) if kind is AdamW else p
                ps[i] = p - lr / (1 - 0.9**t) * ms[i] / ((tops[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            emas[i] = ema_decay * emas[i] + (1 - ema_decay) * ps[i]
    return ps, emas


def combinations():
    for kind, more in ((SGD, [{}]), (AdamW, [{}, {"amsgrad": True}])):
        state_dtypes = [None] if kind is SGD else [None, torch.float32, torch.bfloat16, torch.uint8]
        for dtype, state_dtype, extra, narrow in itertools.product(
            (torch.float32, torch.bfloat16, torch.float16),
            state_dtypes,
            more,
            ("master_weights", "stochastic_rounding"),
        ):
            if state_dtype == torch.uint8 and extra:
                continue
            options = {"max_norm": 1.0, "skip_nonfinite": True, "l1": 0.01, "ema_decay": 0.9, narrow: True, **extra}
            options |= {} if state_dtype is None else {"state_dtype": state_dtype}
            yield pytest.param(kind, dtype, options, id=f"{kind.__name__}, {dtype}, {state_dtype}, {narrow}, {extra}")


@pytest.mark.parametrize("kind, dtype, options", list(combinations()))
def test_all_options_that_go_together(best_backend, kind, dtype, options):
    params = [draw(shape, i) for i, shape in enumerate([(70, 75), (33,), ()])]
    params = [(x + x.sign()).to(dtype).requires_grad_() for x in params]  # whose signs stay, for the sake of l1
    want, averages = exact_steps(kind, params, 5, **options)
    optimizer = make(kind, params, **options)
    for t in range(5):
        give_gradients(params, t)
        if t == 2:  # a step that is skipped
            kept = params[0].grad.clone()
            params[0].grad[3, 3] = NAN
            before = snapshot(optimizer)
            optimizer.step()
            assert optimizer.skipped_steps == 1
            assert_unchanged(optimizer, (*before[:2], optimizer.skipped_steps))
            params[0].grad = kept
        optimizer.step()
    # Each step of Adam is about lr, of which a rounded state may change some percent.
    off = 5 * 0.01 * {torch.uint8: 0.6, torch.bfloat16: 0.1}.get(options.get("state_dtype"), 1e-4)
    if dtype == torch.float16 and "master_weights" not in options and kind is not SGD:
        off = 5 * 0.01  # squares of small gradients are 0 in float16, and eps is
    if dtype == torch.bfloat16 and "master_weights" not in options:
        off += 5 * 0.01 * 0.1
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * (0.5 if "master_weights" in options else 5)
    for p, w, average in zip(params, want, averages, strict=True):
        state = optimizer.state[p]
        assert ((p.double() - w).abs() <= off + rounding * w.abs()).all()
        assert ((state["ema"].double() - average).abs() <= off + rounding * w.abs()).all()
        assert state["ema"].dtype == torch.float32
        if "master_param" in state:
            assert torch.equal(state["master_param"].to(dtype), p)
    reloaded = make(kind, params, **options)
    reloaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_unchanged(reloaded, (*snapshot(optimizer)[:2], reloaded.skipped_steps))


# --- max_norm ---------------------------------------------------------------------------------------------------------
@every_pair
@pytest.mark.parametrize("max_norm", [0.5, 1e3, INF])
def test_norm_and_clipping_of_all_dtypes_together(best_backend, ours, theirs, max_norm):
    dtypes = [torch.float32, torch.complex64, torch.float64, torch.bfloat16]
    a, b = parameters(*dtypes), parameters(*dtypes)
    optimizer, other = ours(a, 0.1, max_norm=max_norm), ours(b, 0.1)
    for t in range(3):
        give_gradients(a, t)
        give_gradients(b, t)
        kept = [p.grad.clone() for p in a]
        norm = sum(g.abs().double().square().sum() for g in kept).sqrt()
        for p in b:
            p.grad *= min(1.0, max_norm / (norm.item() + 1e-6))
        optimizer.step()
        other.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0, check_dtype=False)
        assert optimizer.grad_norm.dim() == 0
        assert_equal([p.grad for p in a], kept)  # read, not changed
    for p, q in zip(a, b, strict=True):
        assert_close([p], [q], 0.02 if p.dtype == torch.bfloat16 else 1e-5)


@every_kind
def test_the_norm_of_nothing_and_of_no_numbers(kind):
    p = torch.ones(3, requires_grad=True)
    optimizer = kind([p], 0.1, max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0
    p.grad = torch.tensor([1.0, NAN, 2.0])
    optimizer.step()
    assert optimizer.grad_norm.isnan() and p.isnan().all()  # as after clip_grad_norm_


def test_large_norms_of_two_devices_do_not_overflow(monkeypatch):
    norms = iter([torch.tensor(3e30), torch.tensor(4e30)])
    monkeypatch.setattr(fused, "grad_norm", lambda grads: next(norms))
    params = [torch.ones(3, requires_grad=True), torch.empty(3, device="meta", requires_grad=True)]
    optimizer = AdamW(params, max_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(5e30) and optimizer.grad_norm.dtype == torch.float32


# --- steps that are skipped -------------------------------------------------------------------------------------------
@every_kind
@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_gradients_that_are_no_numbers_change_nothing(best_backend, kind, wrong, max_norm):
    """Nor do they at the first step, after which the next is the first."""
    params, others = parameters(), parameters()
    optimizer = make(kind, params, skip_nonfinite=True, max_norm=max_norm)
    other = make(kind, others, max_norm=max_norm)
    assert optimizer.skipped_steps == 0
    for t, bad in enumerate([True, False, False, True, True, False]):
        give_gradients(params, t)
        give_gradients(others, t)
        before = copies(params)
        if bad:
            params[t].grad.view(-1)[:1] = wrong if params[t].numel() else 0
            params[0].grad[5, 5] = wrong
        optimizer.step()
        if bad:
            assert_equal(params, before)
            assert not optimizer.grad_norm.isfinite()
        else:
            other.step()
            assert_close(params, others, 1e-6)
    assert optimizer.skipped_steps == 3 and optimizer.skipped_steps.dim() == 0
    assert all(s["step"] == 3 for s in optimizer.state.values())


@every_kind
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("more", [{}, {"max_norm": 0.5}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_gradient_scaler(best_backend, kind, unscaled, more):
    params, others = parameters(), parameters()
    optimizer, other = make(kind, params, **more), make(kind, others, **more)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scale = 1024.0
    for t, bad in enumerate([True, False, False, True, False]):
        give_gradients(params, t)
        give_gradients(others, t)
        scaler.scale(torch.zeros(1))  # a scaler initialises itself at its first loss
        for p in params:
            p.grad *= scale
        if bad:
            params[4].grad[1, 1] = INF
            before = snapshot(optimizer)
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if bad:
            scale /= 2
            assert_unchanged(optimizer, (before[0], snapshot(optimizer)[1], before[2] + 1))
        else:
            other.step()
            assert_close(params, others, 1e-6)
            if more:
                torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-6, atol=0)
    assert scaler.get_scale() == scale and optimizer.skipped_steps == 2
    assert all(s["step"] == 3 for s in optimizer.state.values())
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@every_kind
def test_gradient_scaler_without_gradients(kind):
    """Of two optimizers one may have none."""
    params, idle = parameters(), parameters()
    optimizers = [make(kind, params), make(kind, idle, max_norm=1.0)]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    give_gradients(params, 0)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert_equal(idle, parameters())
    assert optimizers[1].grad_norm == 0


# --- masters ----------------------------------------------------------------------------------------------------------
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_training_in_float32(best_backend, kind, dtype):
    """The parameter is what its master rounds to; float32 parameters and states know nothing of it."""
    params = [*parameters(dtype), draw((4,), 9).requires_grad_()]
    wide = [p.detach().float().requires_grad_() for p in params]
    optimizer, other = make(kind, params, master_weights=True), make(kind, wide)
    for t in range(20):
        give_gradients(params, t)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        other.step()
    for p, q in zip(params, wide, strict=True):
        state = optimizer.state[p]
        assert ("master_param" in state) == (p.dtype == dtype)
        master = state.get("master_param", p)
        torch.testing.assert_close(master.detach(), q.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(p, master.to(p.dtype))
        assert {x.dtype for x in state.values()} == {torch.float32}
        assert master.stride() == torch.empty_like(p).stride()


@every_kind
@pytest.mark.parametrize("passed", [copy.deepcopy, saved_and_loaded, lambda s: pickle.loads(pickle.dumps(s))])
def test_float32_in_states_of_16_bit_parameters_is_kept_exactly(kind, passed):
    params = parameters(torch.bfloat16)
    options = {"master_weights": True, "ema_decay": 0.9}
    straight = parameters(torch.bfloat16)
    run(make(kind, straight, **options), straight, 6)
    first = make(kind, params, **options)
    run(first, params, 3)
    second = make(kind, params, **options)
    second.load_state_dict(passed(first.state_dict()))
    assert_unchanged(second, snapshot(first))
    run(second, params, 3, start=3)
    assert_equal(params, straight)
    twin = passed(second) if passed is copy.deepcopy else second
    for p, q in zip(twin.param_groups[0]["params"], params, strict=True):
        assert_equal(twin.state[p].values(), second.state[q].values())


@every_pair
def test_masters_begin_where_a_state_of_torch_ends(ours, theirs):
    params = parameters(torch.bfloat16)
    first = theirs(params, 0.01, **({"momentum": 0.9} if ours is SGD else {}))
    run(first, params, 2)
    second = make(ours, params, master_weights=True, ema_decay=0.9)
    second.load_state_dict(first.state_dict())
    kept = copies(params)
    run(second, params, 1, start=2)
    for p, q in zip(params, kept, strict=True):
        assert torch.equal(second.state[p]["master_param"].bfloat16(), p)
        expected = torch.lerp(q.float(), second.state[p]["master_param"], 0.1)
        torch.testing.assert_close(second.state[p]["ema"], expected, rtol=1e-6, atol=1e-6)


# --- averages of weights ----------------------------------------------------------------------------------------------
@every_kind
def test_averages_of_weights(best_backend, kind):
    params = parameters(torch.float32, torch.float64, torch.complex64)
    optimizer = make(kind, params, ema_decay=0.75)
    averages = copies(params)
    for t in range(5):
        run(optimizer, params, 1, start=t)
        averages = [torch.lerp(a, p.detach(), 0.25) for a, p in zip(averages, params, strict=True)]
    for p, average in zip(params, averages, strict=True):
        ema = optimizer.state[p]["ema"]
        assert (ema.dtype, ema.stride()) == (p.dtype, torch.empty_like(p).stride())
        torch.testing.assert_close(ema, average, rtol=1e-6, atol=1e-6)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_weights_are_lent(kind, dtype):
    params = [*parameters(dtype), torch.ones(3, dtype=dtype, requires_grad=True)]  # the last one is never stepped
    optimizer = make(kind, params, ema_decay=0.9, master_weights=True)
    run(optimizer, params[:-1], 3)
    before = snapshot(optimizer)
    with optimizer.ema_weights():
        for p in params[:-1]:
            assert torch.equal(p, optimizer.state[p]["ema"].to(dtype))
        assert torch.equal(params[-1], torch.ones(3, dtype=dtype))
    assert_unchanged(optimizer, before)
    with pytest.raises(KeyError, match="what happened within"), optimizer.ema_weights():
        raise KeyError("what happened within")
    assert_unchanged(optimizer, before)
    optimizer.state[params[2]]["ema"] = torch.zeros(7)  # that cannot be copied
    with pytest.raises(RuntimeError), optimizer.ema_weights():
        pass
    assert_equal(params, before[0])


@every_kind
def test_averages_that_were_switched_on_begin_as_the_parameters(kind):
    params = parameters()
    first = make(kind, params)
    run(first, params, 2)
    second = make(kind, params, ema_decay=0.5)
    second.load_state_dict(first.state_dict())
    kept = copies(params)
    run(second, params, 1, start=2)
    for p, q in zip(params, kept, strict=True):
        torch.testing.assert_close(second.state[p]["ema"], (p.detach() + q) / 2)
    third = make(kind, params)  # and are no more
    third.load_state_dict(second.state_dict())
    assert all("ema" not in state for state in third.state.values())


# --- L1 ---------------------------------------------------------------------------------------------------------------
@every_kind
def test_an_l1_penalty_is_its_gradient(best_backend, kind):
    a, b = parameters(), parameters()
    ours = kind([{"params": a[:2], "l1": 0.1}, {"params": a[2:]}], 0.01)
    plain = kind(b, 0.01)
    for t in range(10):
        give_gradients(a, t)
        give_gradients(b, t)
        for q in b[:2]:
            q.grad += 0.1 * q.detach().sign()
        ours.step()
        plain.step()
    assert_close(a, b, 2e-6)


# --- states of 8 bits -------------------------------------------------------------------------------------------------
def layouts_of_8_bits():
    shapes = {"contiguous": draw((70, 75), 0), "transposed": draw((70, 75), 1).t()}
    shapes["channels_last"] = draw((8, 30, 5, 6), 2).to(memory_format=torch.channels_last)
    shapes["1x1"] = draw((100, 60, 1, 1), 3).to(memory_format=torch.channels_last)
    shapes["sliced"] = draw((100, 140), 4)[:, ::2]  # has gaps
    shapes["small"] = draw((4095,), 5)
    shapes["double"] = draw((BIG,), 6).double()
    shapes["complex"] = draw((BIG,), 7, torch.complex64)
    return {name: x.requires_grad_() for name, x in shapes.items()}


@adams
def test_which_states_have_8_bits(best_backend, kind):
    params = layouts_of_8_bits()
    optimizer = make(kind, params.values(), state_dtype=torch.uint8)
    run(optimizer, list(params.values()), 2)
    for name, p in params.items():
        state = optimizer.state[p]
        if name in ("sliced", "small", "double", "complex"):
            assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == p.dtype
            continue
        blocks = math.ceil(p.numel() / 256)
        for key in ("exp_avg", "exp_avg_sq"):
            codes, scales = state[f"{key}_codes"], state[f"{key}_scales"]
            assert (codes.dtype, codes.shape, codes.stride()) == (torch.uint8, p.shape, p.stride())
            assert (scales.dtype, scales.shape) == (torch.float32, (blocks,))


@adams
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_8_bit_states(kind, dtype):
    p = torch.zeros(300, 333, dtype=dtype, requires_grad=True)
    optimizer = make(kind, [p], state_dtype=torch.uint8)
    run(optimizer, [p], 1)
    size = sum(x.numel() * x.element_size() for key, x in optimizer.state[p].items() if key != "step")
    assert size / p.numel() <= 2.05


@adams
@pytest.mark.parametrize("passed", [copy.deepcopy, saved_and_loaded])
def test_8_bit_states_are_saved_and_loaded_exactly(best_backend, kind, passed):
    params, straight = list(layouts_of_8_bits().values()), list(layouts_of_8_bits().values())
    run(make(kind, straight, state_dtype=torch.uint8, seed=3), straight, 5)
    first = make(kind, params, state_dtype=torch.uint8, seed=3)
    run(first, params, 3)
    second = make(kind, params, state_dtype=torch.uint8, seed=3)
    second.load_state_dict(passed(first.state_dict()))
    assert_unchanged(second, snapshot(first))
    run(second, params, 2, start=3)
    assert_equal(params, straight)
    alone = copy.deepcopy(second)
    assert_unchanged(alone, snapshot(second))


@every_pair
def test_8_bit_states_to_and_from_torch(ours, theirs):
    if ours is SGD:
        pytest.skip("has none")
    params = list(layouts_of_8_bits().values())
    stock = theirs(params, 0.01)
    run(stock, params, 3)
    packed = ours(params, 0.01, state_dtype=torch.uint8)
    packed.load_state_dict(stock.state_dict())
    kept = copy.deepcopy(packed.state_dict())
    wide = ours(params, 0.01)
    wide.load_state_dict(packed.state_dict())
    for p in params:
        for key in ("exp_avg", "exp_avg_sq"):
            found, want = wide.state[p][key], stock.state[p][key]
            assert (found.dtype, found.stride(), wide.state[p]["step"]) == (p.dtype, want.stride(), 3)
            if f"{key}_codes" in packed.state[p]:
                near = torch.isclose(found, want, rtol=0.07, atol=1e-4 * want.abs().max().item())
                assert near.all()  # a code is an eighth of an octave
            else:
                assert torch.equal(found, want)
    packed.load_state_dict(wide.state_dict())  # what was packed once is packed as it was
    for i, state in kept["state"].items():
        assert_equal(packed.state_dict()["state"][i].values(), state.values())
    stock.load_state_dict(wide.state_dict())
    run(stock, params, 1, start=3)


def test_8_bit_states_are_for_adam_without_amsgrad():
    p = torch.zeros(BIG, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"^fastlm\.optim\.AdamW: amsgrad has no state of 8 bits$"):
        AdamW([p], amsgrad=True, state_dtype=torch.uint8)
    optimizer = Adam([p], state_dtype=torch.uint8)
    run(optimizer, [p], 1)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(NotImplementedError, match=r"^fastlm\.optim\.Adam: amsgrad has no state of 8 bits$"):
        run(optimizer, [p], 1)
    with pytest.raises(NotImplementedError, match="amsgrad has no state of 8 bits"):
        AdamW([p], state_dtype=torch.uint8).load_state_dict(Adam([p], amsgrad=True).state_dict())


def test_8_bit_states_of_another_layout_are_refused_and_nothing_changes():
    x = draw((70, 75), 0)
    p, q = x.clone().requires_grad_(), x.t().contiguous().t().requires_grad_()
    first, second = (AdamW([p, z], state_dtype=torch.uint8) for p, z in ((p, q), (q, p)))
    run(first, [p, q], 1)
    run(second, [q, p], 1)
    before, groups = snapshot(second), second.param_groups
    for options in ({"state_dtype": torch.uint8}, {}):
        with pytest.raises(ValueError) as raised:
            AdamW([q, p], **options).load_state_dict(first.state_dict())
        assert str(raised.value) == (
            "fastlm.optim.AdamW: a state of 8 bits with strides (75, 1) does not fit a parameter with (1, 70)"
        )
    with pytest.raises(ValueError):
        second.load_state_dict(first.state_dict())
    assert_unchanged(second, before)
    assert second.param_groups is groups


@pytest.mark.parametrize("kind, options", [(SGD, {"momentum": 0.9}), (AdamW, {"state_dtype": torch.uint8})])
def test_states_through_safetensors(kind, options, tmp_path):
    files = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(70, 75), torch.nn.Conv2d(100, 60, 1).to(memory_format=torch.channels_last)
    )
    names = {p: name for name, p in model.named_parameters()}
    params = list(names)
    options = {"lr": 0.01, "ema_decay": 0.9, **options}
    first = kind(params, **options)
    run(first, params, 3)
    state = {key: x.contiguous() for key, x in optimizer_tensors(first, names).items()}
    files.save_file(state, tmp_path / "optimizer.safetensors")
    second = kind(params, **options)
    restore_optimizer(second, names, files.load_file(tmp_path / "optimizer.safetensors"))
    assert_unchanged(second, snapshot(first))
    for p in params:
        for key, x in first.state[p].items():
            found = second.state[p][key]
            assert (found.dtype, found.shape) == (x.dtype, x.shape)
    straight = copies(params)
    again = kind([p.requires_grad_() for p in straight], **options)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    run(again, straight, 2, start=3)
    run(second, params, 2, start=3)
    assert_equal(params, straight)


# --- rounding at random -----------------------------------------------------------------------------------------------
@every_kind
@pytest.mark.parametrize("draws", ["elements", "steps", "seeds"])
def test_random_rounding_is_right_in_the_mean(kind, draws):
    """10,000 times 1 and 5/64 of its last digit; the variance of one is at most a quarter of the squared digit."""
    update, digit, n = 5 * 2**-13, 2**-7, 10_000
    size, times = {"elements": (n, 1), "steps": (100, 100), "seeds": (100, 100)}[draws]
    options = {"weight_decay": 0.0} if kind is AdamW else {}
    found, optimizer = [], None
    for i in range(times):
        if optimizer is None or draws == "seeds":
            p = torch.ones(size, dtype=torch.bfloat16, requires_grad=True)
            optimizer = kind([p], update, stochastic_rounding=True, seed=i, **options)
        with torch.no_grad():
            p.fill_(1)
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        found.append(p.detach().double() - 1)
    found = torch.cat(found)
    assert set(found.unique().tolist()) == {0.0, digit}
    assert found.mean().item() == pytest.approx(update, abs=5 * digit / 2 / n**0.5)


@every_kind
def test_random_rounding_follows_from_seed_and_step(best_backend, kind):
    ends = {}
    for run_of, seed in (("a", 5), ("b", 5), ("c", 6)):
        p = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
        optimizer = kind([p], 2**-12, stochastic_rounding=True, seed=seed)
        for t in range(3):
            p.grad = torch.full_like(p, -1.0)
            optimizer.step()
            ends[run_of, t] = p.detach().clone()
            if t == 1 and run_of == "b":  # goes on after saving with the numbers that would have come
                again = kind([p], 2**-12, stochastic_rounding=True, seed=seed)
                again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer = again
            with torch.no_grad():
                p.fill_(1)
    assert all(torch.equal(ends["a", t], ends["b", t]) for t in range(3))
    different = [ends["a", 0], ends["a", 1], ends["a", 2], ends["c", 0], ends["c", 1]]
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(different, 2))


# --- steps in backward ------------------------------------------------------------------------------------------------
def a_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2))
    model[2].weight = model[0].weight  # used twice
    model[3].bias.requires_grad_(False)
    return model.to(dtype)


@every_kind
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "l1": 0.01}, {"master_weights": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_backward_are_steps(kind, options, dtype):
    models = [a_model(dtype), a_model(dtype)]
    optimizers = [make(kind, m.parameters(), **options) for m in models]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    handle = optimizers[1].step_in_backward()
    for t in range(6):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            model(draw((4, 6), t).to(dtype)).square().sum().backward()
            if optimizer is optimizers[1] and t != 5:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()  # of which nothing is left but at the end
            scheduler.step()
        if t == 2:  # the groups that load_state_dict makes are those that count
            for optimizer in optimizers:
                saved = copy.deepcopy(optimizer.state_dict())
                saved["param_groups"][0]["lr"] = 0.02
                optimizer.load_state_dict(saved)
        if t == 4:
            handle.remove()
            handle.remove()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert models[1][0].weight.grad is not None


def test_gradients_are_freed_on_the_way_back():
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(5)))
    optimizer = AdamW(model.parameters())
    optimizer.step_in_backward()
    alive = []
    for layer in model:
        count = lambda p: alive.append(sum(q.grad is not None for q in model.parameters()))  # noqa: E731
        layer.weight.register_post_accumulate_grad_hook(count)
    model(torch.ones(2, 3)).sum().backward()
    assert max(alive) == 0


def test_what_does_not_go_with_steps_in_backward():
    p = torch.ones(3, requires_grad=True)
    for name, options in (("max_norm", {"max_norm": 1.0}), ("skip_nonfinite", {"skip_nonfinite": True})):
        with pytest.raises(RuntimeError) as raised:
            SGD([p], **options).step_in_backward()
        assert str(raised.value) == (
            f"fastlm.optim.SGD: step_in_backward does not go with {name}, which needs all gradients before the first "
            "parameter is stepped"
        )
    optimizer = AdamW([p])
    handle = optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match=r"^fastlm\.optim\.AdamW: step_in_backward is on already$"):
        optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match="add parameters before step_in_backward, not after"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(RuntimeError, match="remove step_in_backward's handle before copying or pickling"):
        copy.deepcopy(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError, match=r"step_in_backward does not go with torch\.amp\.GradScaler"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")  # which the scaler leaves
    optimizer.max_norm = 1.0
    with pytest.raises(RuntimeError, match="does not go with max_norm"):
        p.sum().backward()
    optimizer.max_norm = None
    handle.remove()
    second = optimizer.step_in_backward()
    handle.remove()  # not this one's any more
    with pytest.raises(RuntimeError, match="is on already"):
        optimizer.step_in_backward()
    second.remove()
    copy.deepcopy(optimizer)
    frozen = AdamW([torch.ones(3)])
    frozen.step_in_backward().remove()
    frozen.step_in_backward().remove()


def test_steps_in_backward_end_with_their_optimizer():
    p = torch.ones(3, requires_grad=True)
    optimizer = SGD([p], 1.0)
    optimizer.step_in_backward()
    del optimizer
    p.sum().backward()
    assert p.grad is not None and (p == 1).all()
    SGD([p], 0.5).step()
    assert (p == 0.5).all()


def test_nothing_is_lost_within_ema_weights():
    p = torch.ones(3, requires_grad=True)
    optimizer = SGD([p], 1.0, ema_decay=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    average = optimizer.state[p]["ema"].clone()
    with optimizer.ema_weights():
        for what, call in (
            ("a step", optimizer.step),
            ("load_state_dict", lambda: optimizer.load_state_dict(optimizer.state_dict())),
            ("ema_weights", optimizer.ema_weights().__enter__),
        ):
            with pytest.raises(RuntimeError, match=f"SGD: {what} within ema_weights would be lost"):
                call()
    assert (p == 0).all() and torch.equal(optimizer.state[p]["ema"], average)
    optimizer.step()
    assert (p == -1).all()


def test_a_scaled_step_that_fails_leaves_nothing_to_the_next():
    p = torch.ones(3, requires_grad=True)
    optimizer, scaler = AdamW([p], eps=1.0, lr=1.0, weight_decay=0.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    p.grad = torch.full((3,), 1024.0).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(optimizer)
    scaler.update(1024.0)
    p.grad = torch.full((3,), 1024.0)
    scaler.step(optimizer)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))  # of a gradient of 1: 1 / (1 + eps)


def test_frozen_weights_of_integers_are_left_alone():
    frozen = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    AdamW([frozen, p]).step()
    assert (frozen == 1).all() and (p != 1).all()


def test_states_of_8_bits_under_another_default_dtype():
    p = torch.ones(BIG, requires_grad=True)
    p.grad = torch.ones(BIG)
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = AdamW([p], state_dtype=torch.uint8, skip_nonfinite=True)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["exp_avg_scales"].dtype == torch.float32 and (p != 1).all()


def test_an_infinite_limit_measures_alone():
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.full((2,), 3e38)  # whose norm float32 cannot hold
    optimizer = SGD([p], 1e-38, max_norm=INF)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), -2.0))
    assert optimizer.grad_norm.isinf()


# --- steps that fail --------------------------------------------------------------------------------------------------
def failing(*_, **__):
    raise MemoryError("no memory")


def refusing(*_, **__):
    raise ValueError("no such step")


@every_kind
@pytest.mark.parametrize("when", ["first", "later", "completed"])
def test_a_step_that_fails_at_once_changes_nothing(kind, when, monkeypatch):
    params = parameters(torch.bfloat16)
    optimizer = make(kind, params, skip_nonfinite=True)
    if when != "first":
        run(optimizer, params[:4], 2)
    if when == "completed":  # the states lack what is asked for now
        optimizer.ema_decay, optimizer.master_weights = 0.9, True
    before = snapshot(optimizer)
    give_gradients(params, 2)
    params[0].grad[0, 0] = NAN
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr("fastlm.optim._fused.grad_norm", failing)
        optimizer.step()
    assert_unchanged(optimizer, before)
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="no such step"):
        patched.setattr("fastlm.optim.adam.adam_", refusing)
        patched.setattr("fastlm.optim.sgd.sgd_", refusing)
        optimizer.step()
    assert_unchanged(optimizer, before)
    if when == "first":
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr("torch.zeros_like", failing)
            optimizer.step()
        assert_unchanged(optimizer, before)
        assert not optimizer.state
    optimizer.step()
    assert optimizer.skipped_steps == 1


@every_kind
def test_a_kernel_that_fails_may_have_written(kind, monkeypatch):
    params = parameters()
    optimizer = make(kind, params)
    give_gradients(params, 0)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError) as raised:
        patched.setattr("fastlm.optim.adam.adam_", failing)
        patched.setattr("fastlm.optim.sgd.sgd_", failing)
        optimizer.step()
    assert str(raised.value) == (
        f"fastlm.optim.{kind.__name__}: the step failed on the way. Parameters perhaps in part: "
        f"{len(params)} of group 0 on cpu"
    )
    assert isinstance(raised.value.__cause__, MemoryError)


@every_kind
def test_a_sparse_gradient_among_others_changes_nothing(kind):
    params = parameters()
    optimizer = make(kind, params)
    give_gradients(params, 0)
    params[3].grad = params[3].grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert not optimizer.state


@every_kind
def test_a_step_that_fails_on_the_way_says_what_it_did(kind):
    params = [draw((4,), i).requires_grad_() for i in range(5)]
    params[4] = params[4].detach().bfloat16().requires_grad_()
    optimizer = make(kind, [{"params": params[:2]}, {"params": params[2:4]}, {"params": params[4:]}])
    run(optimizer, params, 1)
    before = copies(params)
    key = "momentum_buffer" if kind is SGD else "exp_avg"
    optimizer.state[params[4]][key] = torch.zeros(4, dtype=torch.float16)
    give_gradients(params, 1)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert str(raised.value) == (
        f"fastlm.optim.{kind.__name__}: the step failed on the way. Parameters stepped: 2 of group 0 on cpu, "
        "2 of group 1 on cpu; not: 1 of group 2 on cpu"
    )
    assert isinstance(raised.value.__cause__, TypeError)
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [True] * 4 + [False]


def test_a_step_that_fails_names_kinds_of_states():
    params = [torch.ones(3, requires_grad=True), torch.ones(BIG, requires_grad=True)]
    params.append(torch.ones(3, dtype=torch.bfloat16, requires_grad=True))
    optimizer = AdamW(params, state_dtype=torch.uint8, master_weights=True)
    run(optimizer, params, 1)
    optimizer.state[params[2]]["master_param"] = torch.zeros(4)
    with pytest.raises(RuntimeError) as raised:
        run(optimizer, params, 1)
    assert str(raised.value).endswith(
        "Parameters stepped: 1 of group 0 on cpu, 1 of group 0 on cpu (with states of 8 bits); not: 1 of "
        "group 0 on cpu (with masters)"
    )
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = SGD(params)
    params[0].grad, params[1].grad = torch.ones(3).to_sparse(), torch.ones(3)
    params[1].data = torch.zeros(1).expand(3)
    with pytest.raises(RuntimeError, match=r"stepped: 1 of group 0 on cpu \(with sparse gradients\); not: 1 of group"):
        optimizer.step()


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, options, error, message",
    [
        (SGD, {"max_norm": 0.0}, ValueError, "max_norm must be above 0, got 0.0"),
        (SGD, {"max_norm": NAN}, ValueError, "max_norm must be above 0, got nan"),
        (AdamW, {"ema_decay": 1.0}, ValueError, "ema_decay must be in [0, 1), got 1.0"),
        (SGD, {"ema_decay": -0.1}, ValueError, "ema_decay must be in [0, 1), got -0.1"),
        (
            Adam,
            {"master_weights": True, "stochastic_rounding": True},
            ValueError,
            "master_weights and stochastic_rounding exclude each other: a parameter that has a float32 master is what "
            "that rounds to",
        ),
        (SGD, {"l1": -1.0}, ValueError, "l1 must be at least 0, got -1.0"),
        (SGD, {"momentum": -1.0}, ValueError, "momentum must be at least 0, got -1.0"),
        (
            SGD,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            ValueError,
            "nesterov goes with a momentum above 0 and without dampening, got 0.9 and 0.1",
        ),
        (
            SGD,
            {"differentiable": True},
            NotImplementedError,
            "differentiable=True is not supported: the step is done in place",
        ),
        (SGD, {"foreach": True, "fused": True}, RuntimeError, "foreach and fused cannot both be True"),
        (
            AdamW,
            {"state_dtype": torch.float16},
            ValueError,
            "state_dtype must be torch.float32, torch.bfloat16, torch.uint8 or None, got torch.float16",
        ),
        (
            Adam,
            {"betas": (0.5, torch.tensor(0.25))},
            ValueError,
            "betas must be two floats or two tensors, got (0.5, tensor(0.2500))",
        ),
        (
            Adam,
            {"lr": torch.tensor(0.5), "foreach": True},
            ValueError,
            "lr and betas must be floats with foreach=True and capturable=False, got 0.5 and (0.9, 0.999)",
        ),
    ],
)  # fmt: skip
def test_sentences(kind, options, error, message):
    with pytest.raises(error) as raised:
        kind([torch.zeros(3, requires_grad=True)], **options)
    assert str(raised.value) == f"fastlm.optim.{kind.__name__}: {message}"


def test_parameters_of_fsdp1_are_refused():
    p = torch.zeros(3, requires_grad=True)
    p._is_flat_param = True
    with pytest.raises(NotImplementedError) as raised:
        SGD([p])
    assert str(raised.value) == (
        "fastlm.optim.SGD: parameters of FullyShardedDataParallel, which do not say how they are sharded, are not "
        "supported; torch.distributed.fsdp.fully_shard makes some that do"
    )


@every_kind
def test_no_averages_without_ema_decay(kind):
    with pytest.raises(RuntimeError) as raised, kind([torch.zeros(3)]).ema_weights():
        pass
    assert str(raised.value) == f"fastlm.optim.{kind.__name__}: there are no averages of weights without ema_decay"


@pytest.mark.parametrize(
    "options, named",
    [
        ({"momentum": 0.9, "weight_decay": 0.1}, "momentum, weight_decay"),
        ({"l1": 0.1, "max_norm": 1.0}, "l1, max_norm"),
        ({"skip_nonfinite": True, "ema_decay": 0.9}, "skip_nonfinite, ema_decay"),
        ({"stochastic_rounding": True}, "stochastic_rounding"),
        ({"master_weights": True}, "master_weights"),
    ],
)
def test_sparse_gradients_with_more_than_torch_can(options, named):
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3).to_sparse()
    optimizer = SGD([p], **options)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert str(raised.value) == f"fastlm.optim.SGD does not support sparse gradients with {named}"
    assert_equal([p], [torch.zeros(3)])


def test_sparse_gradients_with_a_scaler():
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3).to_sparse()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"sparse gradients with grad_scale, found_inf$"):
        scaler.step(SGD([p]))


def test_a_new_state_cannot_be_captured(monkeypatch):
    """Nor what is missing in one: momentum, a master, an average."""
    params = parameters(torch.bfloat16)
    cases = []
    for changed in ({"momentum": 0.9}, {"ema_decay": 0.9}, {"master_weights": True}):
        optimizer = SGD(params, stochastic_rounding=True)
        run(optimizer, params, 1)
        optimizer.param_groups[0].update({k: v for k, v in changed.items() if k == "momentum"})
        optimizer.__dict__.update({k: v for k, v in changed.items() if k != "momentum"})
        cases.append(optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for optimizer in cases:
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=re.escape("has no state yet, which a CUDA graph would set to 0")):
            optimizer.step()
        assert_unchanged(optimizer, before)
    fresh = SGD(params, momentum=0.9)
    with pytest.raises(RuntimeError, match=r"of sizes \(33, 7\) has no state yet"):
        fresh.step()
    assert not fresh.state


def test_skipped_steps_are_counted_in_place():
    """Or a CUDA graph would count its replays as one."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = AdamW([p], skip_nonfinite=True)
    counts = optimizer.skipped_steps
    for _ in range(3):
        p.grad = torch.full((3,), NAN)
        optimizer.step()
    assert optimizer.skipped_steps is counts and counts == 3


def test_what_is_its_own_is_copied():
    options = {"max_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "stochastic_rounding": True, "seed": 7}
    for kind in (Adam, SGD):
        p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
        optimizer = kind([p], **options)
        run(optimizer, [p], 2)
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert {key: getattr(twin, key) for key in options} == options
            assert twin.grad_norm == optimizer.grad_norm and twin.skipped_steps == 0
            assert_unchanged(twin, snapshot(optimizer))


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_parameters_counted_on_two_devices(kind):
    """After a step whose count had to be on the device, a parameter may come whose count is on the host."""
    params = [torch.empty(3, device="meta", requires_grad=True) for _ in range(2)]
    optimizer = kind(params, skip_nonfinite=True)
    params[0].grad = torch.empty(3, device="meta")
    optimizer.state[params[0]] = {
        "step": torch.empty((), device="meta"),
        **{key: torch.empty(3, device="meta") for key in ("exp_avg", "exp_avg_sq")},
    }
    optimizer.skip_nonfinite = False
    params[1].grad = torch.empty(3, device="meta")
    calls = optimizer._calls([(g, g["params"]) for g in optimizer.param_groups], False, [])
    assert [call.states[0]["step"].device.type for call in calls] == ["meta", "cpu"]
    assert fastlm.optim.Adam in kind.__mro__
