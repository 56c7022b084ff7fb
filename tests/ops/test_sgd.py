"""sgd_ against torch.optim, on every backend of the CPU and every instruction set."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import ISAS
from step_testing import (
    CPU_BACKENDS,
    DTYPES,
    LAYOUTS,
    SIXTEEN_BITS,
    SIZES,
    assert_as_exact_as_the_reference,
    assert_bits_equal,
    assert_refused,
    bad_steps,
    change,
    copied,
    drop,
    give,
    outside,
    repeat,
    take,
    tensors_of,
    with_layout,
)

import fastlm
from fastlm import _native
from fastlm.ops.sgd import sgd_

on_each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
needs_native = pytest.mark.skipif(not ISAS, reason="needs the native kernel")
FLAGS = {
    "plain": {},
    "l2": {"weight_decay": 0.1},
    "l1": {"l1": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "everything": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "l1": 0.1, "maximize": True},
}


def problem(dtype, sizes=SIZES, seed=0, lr=0.05, **flags):
    """A step as after a few others, all different numbers; the first parameters have taken none."""
    draw = torch.Generator().manual_seed(seed)
    params, grads, buffers = (
        [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in sizes] for _ in range(3)
    )
    return {
        "params": params,
        "grads": grads,
        "momentum_buffers": buffers if flags.get("momentum") else [],
        "steps": [torch.tensor(float(i // 2)) for i in range(len(sizes))],
        "lr": lr,
        **flags,
    }


def torch_steps(step, dtype, grads):
    """The same by torch.optim in `dtype`: one optimizer per parameter, its state put in. L1's gradients are added."""
    step = copied(step, dtype)
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    for i, p in enumerate(step["params"]):
        optimizer = torch.optim.SGD([p], **{k: step[k] for k in names if k in step}, foreach=False)
        if step["momentum_buffers"] and step["steps"][i] > 0:
            optimizer.state[p]["momentum_buffer"] = step["momentum_buffers"][i]
        for grad in grads:
            penalty = step.get("l1", 0.0) * p.sign()
            p.grad = grad[i].to(dtype) + (-penalty if step.get("maximize") else penalty)
            optimizer.step()
        p.grad = None
        if step["momentum_buffers"]:
            step["momentum_buffers"][i] = optimizer.state[p]["momentum_buffer"]
    return step


# --- values -----------------------------------------------------------------------------------------------------------
@on_each_backend
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(backend, dtype, flags):
    step = problem(dtype, **FLAGS[flags])
    grads = [problem(dtype, seed=seed)["grads"] for seed in range(1, 4)]
    exact, plain = (torch_steps(step, of, grads) for of in (torch.float64, dtype))
    for g in grads:
        before = [x.clone() for x in g]
        sgd_(**{**step, "grads": g})
        assert_bits_equal([g], [before])
    assert [s.item() for s in step["steps"]] == [i // 2 + 3 for i in range(len(SIZES))]
    for name in ("params", "momentum_buffers"):
        for a, e, t in zip(step[name], exact[name], plain[name], strict=True):
            # Twice the error of plain torch in this dtype, where that is finite, plus a few units in the last place.
            error = (t.double() - e.double()).abs()
            allowed = 2 * torch.where(error.isfinite(), error, 0) + 4 * torch.finfo(dtype).eps * (1 + e.double().abs())
            assert a.dtype == t.dtype
            assert ((a.double() - e.double()).abs() <= allowed).all()


@on_each_backend
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_torch_has(backend, dtype, flags):
    """Masters, averages of weights, a scale, and a buffer of another dtype."""
    step = problem(dtype, **FLAGS[flags])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    step |= {"emas": [p.to(wide) * 0.5 for p in step["params"]], "ema_decay": 0.9, "scale": torch.tensor(0.25)}
    if dtype in SIXTEEN_BITS:
        step["masters"] = [p.to(wide) + 1e-4 for p in step["params"]]
        step["momentum_buffers"] = [b.to(wide) for b in step["momentum_buffers"]]
    assert_as_exact_as_the_reference(sgd_, step, ["momentum_buffers"])


@on_each_backend
@pytest.mark.parametrize("nesterov", [False, True])
def test_close_to_torch_after_many_steps(backend, nesterov):
    p, q = (torch.linspace(-3, 3, 10_001) for _ in range(2))
    q.requires_grad_()
    theirs = torch.optim.SGD([q], 0.01, momentum=0.9, weight_decay=0.1, nesterov=nesterov, fused=True)
    buffers, steps = [torch.full_like(p, float("nan"))], [torch.tensor(0.0)]
    for seed in range(50):
        q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        sgd_([p], [q.grad.clone()], buffers, steps, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
        theirs.step()
    torch.testing.assert_close(p, q.detach(), rtol=1e-6, atol=1e-6)


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_nan_and_infinity_as_torch(backend, dtype, nesterov):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0], dtype=torch.float64)
    p, g = (x.flatten().to(dtype) for x in torch.meshgrid(special, special, indexing="ij"))
    step = problem(dtype, [p.shape], momentum=0.9, nesterov=nesterov, weight_decay=0.1, l1=0.1)
    step |= {"params": [p], "grads": [g]}
    want = torch_steps(step, torch.float64, [[g], [g]])
    for _ in range(2):
        sgd_(**step)
    for name in ("params", "momentum_buffers"):
        for a, e in zip(step[name], want[name], strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert torch.equal(a.double().isposinf(), e.isposinf()) and torch.equal(a.double().isneginf(), e.isneginf())


@on_each_backend
def test_the_first_step_does_not_read_the_buffer(backend):
    step = problem(torch.float32, [(65,)], momentum=0.9, dampening=0.5)
    step["momentum_buffers"][0].fill_(float("nan"))
    sgd_(**step)
    assert_bits_equal([step["momentum_buffers"]], [step["grads"]])


@on_each_backend
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64])
def test_counts_each_step_by_itself(backend, step_dtype):
    step = problem(torch.float32, sizes=[(3,), (3,)])
    step["steps"] = [torch.tensor(7, dtype=step_dtype), torch.tensor([1000], dtype=step_dtype)]
    sgd_(**step)
    assert [s.item() for s in step["steps"]] == [8, 1001]
    assert [s.dtype for s in step["steps"]] == [step_dtype] * 2


@on_each_backend
def test_without_momentum_no_steps_are_needed(backend):
    a, b = (problem(torch.float32) for _ in range(2))
    sgd_(**a)
    sgd_(**{**b, "steps": []})
    assert_bits_equal([a["params"]], [b["params"]])


@on_each_backend
@pytest.mark.parametrize("found", [0.0, 1.0, float("inf"), float("nan")])
def test_found_inf_skips_the_step(backend, found):
    step = problem(torch.float16, momentum=0.9)
    step |= {"masters": [p.float() for p in step["params"]], "emas": [p.float() for p in step["params"]]}
    want = copied(step)
    if found == 0:
        sgd_(**want)
    sgd_(**step, found_inf=torch.tensor(found))
    assert_bits_equal(tensors_of(step), tensors_of(want))


@on_each_backend
def test_a_learning_rate_in_a_tensor(backend):
    a, b = (problem(torch.float32, lr=0.125) for _ in range(2))
    sgd_(**{**a, "lr": torch.tensor(0.125)})
    sgd_(**b)
    assert_bits_equal(tensors_of(a), tensors_of(b))


@on_each_backend
def test_parameters_rounded_at_random_are_right_in_the_mean(backend):
    """An update of 1/16 of the last digit, which rounding to nearest would lose."""
    n = 1 << 14
    step = problem(torch.bfloat16, sizes=[(n,)], lr=1.0, stochastic_params=True)
    step |= {"params": [torch.ones(n, dtype=torch.bfloat16)], "grads": [torch.full((n,), -(2.0**-11)).bfloat16()]}
    seeds = [copied(step) | {"seed": seed} for seed in (3, 3, 4)]
    for one in seeds:
        sgd_(**one)
    up = seeds[0]["params"][0].float() - 1
    assert set(up.unique().tolist()) == {0.0, 2.0**-7}
    assert up.mean().item() == pytest.approx(2.0**-11, abs=4 * (2.0**-7) / 4 / n**0.5)
    assert torch.equal(seeds[0]["params"][0], seeds[1]["params"][0])
    assert not torch.equal(seeds[0]["params"][0], seeds[2]["params"][0])
    with fastlm.use_backend("reference"):
        assert_bits_equal([seeds[0]["params"]], [take(sgd_, copied(step) | {"seed": 3})["params"]])


# --- layouts ----------------------------------------------------------------------------------------------------------
@on_each_backend
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("other_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(backend, dtype, param_layout, other_layout):
    n = 7
    dense = problem(dtype, sizes=[(4, 6, 10, n)], momentum=0.9, weight_decay=0.1)
    dense |= {"emas": [dense["params"][0].float() * 0.5], "ema_decay": 0.9}
    if dtype == torch.float16:
        dense["masters"] = [dense["params"][0].float() + 1e-4]
    layouts = {name: LAYOUTS[param_layout if name == "params" else other_layout] for name in dense}
    step = {
        name: [with_layout(layouts[name], n, value[0])] if isinstance(value, list) and name != "steps" else value
        for name, value in copied(dense).items()
    }
    tensors = [of[0] for of in tensors_of(step) if of is not step["steps"]]
    around, strides = [outside(x) for x in tensors], [x.stride() for x in tensors]
    sgd_(**dense)
    sgd_(**step)
    assert_bits_equal(tensors_of(step), tensors_of(dense))
    assert [x.stride() for x in tensors] == strides
    assert all(torch.equal(outside(x), a) for x, a in zip(tensors, around, strict=True))


@on_each_backend
def test_expanded_and_marked_gradients(backend):
    complex_grad = torch.randn(5, 6, dtype=torch.complex64)
    for grad in (torch.tensor(2.0).expand(5, 6), torch.randn(6).expand(5, 6), complex_grad.conj().imag):
        a, b = (problem(torch.float32, sizes=[(5, 6)], momentum=0.9) for _ in range(2))
        sgd_(**{**a, "grads": [grad]})
        sgd_(**{**b, "grads": [grad.resolve_neg().clone()]})
        assert_bits_equal([a["params"], a["momentum_buffers"]], [b["params"], b["momentum_buffers"]])


@needs_native
def test_more_dimensions_than_the_kernel_takes():
    a, b = (problem(torch.float32, sizes=[(2,) * 9], momentum=0.9) for _ in range(2))
    status = {s.backend: s for s in fastlm.backends("sgd_", **a)}
    assert (status["native"].usable, status["native"].reason) == (False, "does not take 9 dimensions")
    with fastlm.use_backend("auto"), pytest.warns(fastlm.FallbackWarning, match="does not take 9 dimensions"):
        sgd_(**a)
    for name in ("params", "grads", "momentum_buffers"):
        b[name] = [t.reshape(-1) for t in b[name]]
    sgd_(**b)
    torch.testing.assert_close(a["params"][0].reshape(-1), b["params"][0], rtol=1e-6, atol=1e-6)


# --- threads, sharing out ---------------------------------------------------------------------------------------------
@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU_BACKENDS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_threads(backend, threads, dtype):
    sizes = [(70_001,), (3,), (0,), (50, 1001), (16_384,), (), (90_000,)]
    results = []
    for count in (1, 2, 7):
        threads(count)
        step = problem(dtype, sizes, momentum=0.9, weight_decay=0.1, nesterov=True, stochastic_params=True, seed=0)
        step["momentum_buffers"][3] = step["momentum_buffers"][3].t().contiguous().t()  # one that is not flat
        results.append(tensors_of(take(sgd_, step)))
    assert_bits_equal(results[0], results[1])
    assert_bits_equal(results[0], results[2])


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=0, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    seed=st.integers(0, 2**20),
    flags=st.sampled_from(sorted(FLAGS)),
)
def test_any_list_equals_its_parts_and_the_reference(lengths, dtypes, seed, flags):
    parts = [
        problem(dtype, [(n,)], seed=seed + i, **FLAGS[flags])
        for i, (n, dtype) in enumerate(zip(lengths, dtypes, strict=False))
    ]
    for i, part in enumerate(parts):
        part["steps"][0].fill_(i // 2)
    whole = problem(torch.float32, [], **FLAGS[flags])
    for name in ("params", "grads", "momentum_buffers", "steps"):
        whole[name] = [t for part in copy.deepcopy(parts) for t in part[name]]
    reference = copied(whole)
    with fastlm.use_backend("native"):
        sgd_(**whole)
        for part in parts:
            sgd_(**part)
    with fastlm.use_backend("reference"):
        sgd_(**reference)
    for name in ("params", "momentum_buffers", "steps"):
        assert_bits_equal([whole[name]], [[t for part in parts for t in part[name]]])
        for a, e in zip(whole[name], reference[name], strict=True):
            torch.testing.assert_close(a, e, rtol=8 * torch.finfo(a.dtype).eps, atol=8 * torch.finfo(a.dtype).eps)


# --- torch's machinery ------------------------------------------------------------------------------------------------
def schema_args(step):
    from fastlm.ops.sgd import _arguments

    return _arguments(**step)


@pytest.mark.parametrize("namespace", ["fastlm", "fastlm_reference", *(["fastlm_native"] if ISAS else [])])
@pytest.mark.parametrize("flags", FLAGS)
def test_opcheck(namespace, flags):
    args = schema_args(problem(torch.float32, sizes=[(3,), (65,)], **FLAGS[flags]))
    torch.library.opcheck(getattr(torch.ops, namespace).sgd_.default, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    def run(step):
        sgd_(**step)
        return step["params"][-1] * 2

    a, b = (problem(torch.float32, momentum=0.9) for _ in range(2))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(run, fullgraph=True, backend=compiler)(a), run(b))
    assert_bits_equal(tensors_of(a), tensors_of(b))


@on_each_backend
def test_bumps_every_version_that_it_writes(backend):
    step = problem(torch.float16, momentum=0.9)
    step |= {"masters": [p.float() for p in step["params"]], "emas": [p.float() for p in step["params"]]}
    before = {name: [t._version for t in value] for name, value in step.items() if isinstance(value, list)}
    sgd_(**step)
    for name, versions in before.items():
        for t, version in zip(step[name], versions, strict=True):
            assert t._version == version if name == "grads" else t._version > version


@on_each_backend
def test_backward_through_a_stale_parameter_raises(backend):
    w, x = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    loss = (w * x).sum()
    with torch.no_grad():
        sgd_([w], [torch.ones(4)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_each_backend
def test_refuses_to_change_what_autograd_records(backend):
    with pytest.raises(RuntimeError) as error:
        sgd_([torch.ones(4, requires_grad=True)], [torch.ones(4)], lr=0.1)
    assert str(error.value) == "fastlm.sgd_ changes its arguments in place: call it under torch.no_grad()"


# --- bad input --------------------------------------------------------------------------------------------------------
def _codes(step):
    step["momentum_buffers"] = [torch.zeros(3, dtype=torch.uint8) for _ in range(2)]


@on_each_backend
@bad_steps(
    (
        lambda step: step.update(momentum=0.0),
        ValueError,
        "momentum_buffers must be empty without momentum, got 2 tensors",
    ),
    (
        drop("steps"),
        ValueError,
        "with momentum or stochastic_params, steps must hold one tensor per parameter, 2, got 1",
    ),
    (
        give(momentum=0.0, momentum_buffers=[], steps=[torch.tensor(0.0)]),
        ValueError,
        "steps must hold one tensor per parameter, 2, or none, got 1",
    ),
    (
        give(masters=[torch.zeros(3)] * 2, stochastic_params=True),
        ValueError,
        "parameters that have masters are not rounded at random, got stochastic_params",
    ),
    (_codes, ValueError, "momentum_buffers[0] cannot have 8 bits"),
)
def test_bad_input_gets_a_sentence_and_changes_nothing(backend, changed, kind, message):
    step = problem(torch.float32, sizes=[(3,), (3,)], momentum=0.9)
    assert_refused(sgd_, step, ["momentum_buffers"], changed, kind, message)


@needs_native
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (drop("grads"), "grads must hold 2 tensors, got 1"),
        (drop("steps"), "steps must hold 2 tensors, got 1"),
        (drop("momentum_buffers"), "momentum_buffers must hold 2 tensors, got 1"),
        (
            change("grads", 0, torch.zeros(4)),
            "grads[0] must have dtype float32 and the sizes of params[0], float32 (3) strides (1), "
            "got float32 (4) strides (1)",
        ),
        (
            change("momentum_buffers", 0, torch.zeros(1).expand(3)),
            "momentum_buffers[0] is written, so no two of its elements may share memory, got float32 (3) strides (0)",
        ),
        (repeat, "params[1] shares its memory with another tensor that this call writes"),
        (
            change("steps", 0, torch.tensor(1)),
            "steps[0] must be one float32 or float64 on cpu, got int64 () strides ()",
        ),
        (_codes, "states of 8 bits go with tensors of one dense layout"),
    ],
)
def test_the_binding_checks_for_itself(changed, message):
    step = problem(torch.float32, sizes=[(3,), (3,)], momentum=0.9)
    changed(step)
    steps = [s.clone() for s in step["steps"]]
    lists = [step[name] for name in ("params", "grads", "momentum_buffers", "steps")]
    with pytest.raises(ValueError) as error:
        _native.cpu.sgd_step(*lists, 0.1, 0.9, 0.0, 0.0, 0.0, False, False, 1.0, [], [], 0.0, False, 0, 1)
    if not message.endswith("layout"):
        assert str(error.value) == f"fastlm: sgd_: {message}"
    assert all(torch.equal(a, b) for a, b in zip(step["steps"], steps, strict=True))


@on_each_backend
def test_empty_lists_do_nothing(backend):
    sgd_([], [], lr=0.1)
    sgd_([], [], [], [], lr=0.1, momentum=0.9)


@on_each_backend
def test_written_memory_that_elements_share_is_refused(backend):
    """Strides (1, 1): no dimension is expanded, and yet elements (0, 1) and (1, 0) are one."""
    twice = torch.zeros(3).as_strided((2, 2), (1, 1))
    with pytest.raises(ValueError, match=r"params\[0\] is written, so no two of its elements"):
        sgd_([twice], [torch.zeros(2, 2)], lr=0.1)
