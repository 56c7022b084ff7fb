"""adam_ against torch.optim, on every backend of the CPU and every instruction set."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_testing import (
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
    raises_in,
    repeat,
    tensors_of,
    with_layout,
)

import fastlm
from fastlm import _native
from fastlm._eight_bit import dequantized, quantized
from fastlm.ops.adam import adam_, grad_norm

BACKENDS = ["reference"] + (["native"] if _native.cpu is not None else [])
ISAS = _native.cpu.usable_isas() if _native.cpu is not None else []
FLAGS = {
    "adam": {},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "everything": {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "decoupled": True},
    "no averages": {"beta1": 0.0, "beta2": 0.0, "eps": 1e-3},
    "no eps": {"eps": 0.0},
}


@pytest.fixture(params=ISAS)
def isa(request):
    active = _native.cpu.active_isa()
    _native.cpu.select_isa(request.param)
    yield request.param
    _native.cpu.select_isa(active)


@pytest.fixture(params=[*(f"native-{isa}" for isa in ISAS), "reference"])
def backend(request):
    """Each backend, the native one on each instruction set."""
    name, _, isa = request.param.partition("-")
    active = _native.cpu.active_isa() if _native.cpu is not None else None
    if isa:
        _native.cpu.select_isa(isa)
        assert _native.cpu.active_isa() == isa
    with fastlm.use_backend(name):
        yield name
    if isa:
        _native.cpu.select_isa(active)


# No scale, nothing at random, lr a number; no l1, found_inf, masters, averages of weights and their decay, scales.
NOTHING_MORE = (None, False, None, False, 0, 0.0, None, [], [], 0.0, [], [])


def options(**changed):
    return {
        "lr": 0.05, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "decoupled": False,
        "amsgrad": False, "maximize": False, **changed,
    }  # fmt: skip


def problem(dtype, sizes=SIZES, amsgrad=False, seed=0):
    """Lists of params, grads and states as after a few steps, all different numbers."""
    draw = torch.Generator().manual_seed(seed)
    normal = [[torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in sizes] for _ in range(3)]
    squares = [torch.rand(s, generator=draw, dtype=torch.float64).to(dtype) for s in sizes]
    tops = [torch.rand(s, generator=draw, dtype=torch.float64).to(dtype) for s in sizes]
    steps = [torch.tensor(float(i)) for i in range(len(sizes))]
    return [*normal, squares, tops if amsgrad else [], steps]


def torch_steps(lists, dtype, grads, *, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize):
    """The same by torch.optim in `dtype`: one unfused optimizer per parameter, its state put in."""
    out = []
    for i, p in enumerate(lists[0]):
        p = p.detach().to(dtype, copy=True).requires_grad_()
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        optimizer = kind([p], lr, (beta1, beta2), eps, weight_decay, amsgrad, maximize=maximize, foreach=False)
        state = {"exp_avg": lists[2][i], "exp_avg_sq": lists[3][i]}
        if amsgrad:
            state["max_exp_avg_sq"] = lists[4][i]
        optimizer.state[p] = {k: v.to(dtype, copy=True) for k, v in state.items()} | {"step": lists[5][i].clone()}
        for grad in grads:
            p.grad = grad[i].to(dtype, copy=True)
            optimizer.step()
        state = optimizer.state[p]
        out.append([p.detach(), state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"), state["step"]])
    return [[row[k] for row in out if row[k] is not None] for k in range(5)]


def written(lists):
    return [lists[0], *lists[2:]]


# --- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(backend, dtype, flags):
    opts = options(**FLAGS[flags])
    lists = problem(dtype, amsgrad=opts["amsgrad"])
    grads = [problem(dtype, seed=seed)[1] for seed in range(1, 4)]
    exact = torch_steps(lists, torch.float64, grads, **opts)
    plain = torch_steps(lists, dtype, grads, **opts)
    for g in grads:
        before = [x.clone() for x in g]
        adam_(lists[0], g, *lists[2:], **opts)
        assert_bits_equal([g], [before])
    for got, want, torchs in zip(written(lists), exact, plain, strict=True):
        for a, e, t in zip(got, want, torchs, strict=True):
            # Twice the error of plain torch in this dtype, where that is finite, plus a few units in the last place.
            error = (t.double() - e.double()).abs()
            allowed = 2 * torch.where(error.isfinite(), error, 0) + 4 * torch.finfo(dtype).eps * (1 + e.double().abs())
            assert a.dtype == t.dtype
            assert ((a.double() - e.double()).abs() <= allowed).all()


def test_close_to_torch_fused(backend):
    p, q = (torch.linspace(-3, 3, 10_001).requires_grad_() for _ in range(2))
    ours = fastlm.optim.AdamW([p], 0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], 0.01, weight_decay=0.1, fused=True)
    for seed in range(50):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_nan_and_infinity_as_torch(backend, dtype, amsgrad, decoupled):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0], dtype=torch.float64)
    p, g = (x.flatten().to(dtype) for x in torch.meshgrid(special, special, indexing="ij"))
    opts = options(amsgrad=amsgrad, decoupled=decoupled, weight_decay=0.1)
    zeros = [torch.zeros_like(p) for _ in range(3)]
    lists = [[p.clone()], [g], [zeros[0]], [zeros[1]], [zeros[2]] if amsgrad else [], [torch.tensor(0.0)]]
    want = torch_steps(copy.deepcopy(lists), torch.float64, [[g], [g]], **opts)
    for _ in range(2):
        adam_(*lists, **opts)
    for got, expected in zip(written(lists)[:4], want[:4], strict=True):
        for a, e in zip(got, expected, strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert torch.equal(a.double().isposinf(), e.isposinf()) and torch.equal(a.double().isneginf(), e.isneginf())


def test_largest_half_gradient_does_not_overflow_on_the_way(backend):
    """The square of 300 does not fit float16; only what is stored is rounded to it."""
    lists = [[torch.zeros(3, dtype=torch.float16)] for _ in range(4)] + [[], [torch.tensor(0.0)]]
    lists[1] = [torch.full((3,), 300.0, dtype=torch.float16)]
    adam_(*lists, **options(beta2=0.999))
    assert lists[0][0].tolist() == pytest.approx([-0.05] * 3, rel=1e-3)
    assert lists[3][0].tolist() == pytest.approx([90.0] * 3, rel=1e-3)


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64])
def test_counts_each_step_by_itself(backend, step_dtype):
    lists = problem(torch.float32, sizes=[(3,), (3,)])
    lists[5] = [torch.tensor(7, dtype=step_dtype), torch.tensor([1000], dtype=step_dtype)]
    adam_(*lists, **options())
    assert [s.item() for s in lists[5]] == [8, 1001]
    assert [s.dtype for s in lists[5]] == [step_dtype] * 2


# --- layouts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("other_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(backend, dtype, param_layout, other_layout):
    n = 7
    opts = options(amsgrad=True, weight_decay=0.1)
    dense = problem(dtype, sizes=[(4, 6, 10, n)], amsgrad=True)
    layouts = [LAYOUTS[param_layout]] + [LAYOUTS[other_layout]] * 4
    lists = [[with_layout(layout, n, tensors[0])] for layout, tensors in zip(layouts, dense, strict=False)]
    around = [outside(x[0]) for x in lists]
    lists.append([dense[5][0].clone()])
    strides = [x[0].stride() for x in lists]
    adam_(*dense, **opts)
    adam_(*lists, **opts)
    assert_bits_equal(lists, dense)
    assert [x[0].stride() for x in lists] == strides
    assert all(torch.equal(outside(x[0]), a) for x, a in zip(lists[:5], around, strict=True))


def test_expanded_and_marked_gradients(backend):
    complex_grad = torch.randn(5, 6, dtype=torch.complex64)
    for grad in (torch.tensor(2.0).expand(5, 6), torch.randn(6).expand(5, 6), complex_grad.conj().imag):
        a, b = (problem(torch.float32, sizes=[(5, 6)]) for _ in range(2))
        adam_(a[0], [grad], *a[2:], **options())
        adam_(b[0], [grad.resolve_neg().clone()], *b[2:], **options())
        assert_bits_equal(written(a), written(b))


def test_more_dimensions_than_the_kernel_takes():
    sizes = [(2,) * 9]
    a, b = (problem(torch.float32, sizes=sizes) for _ in range(2))
    status = {
        s.backend: s for s in fastlm.backends("adam_", **dict(zip(NAMES, [*a, *options().values()], strict=True)))
    }
    if "native" in BACKENDS:
        assert (status["native"].usable, status["native"].reason) == (False, "does not take 9 dimensions")
    adam_(*a, **options())
    adam_(*[[t.reshape(-1) if t.dim() > 1 else t for t in tensors] for tensors in b], **options())
    torch.testing.assert_close(a[0][0].reshape(-1), b[0][0].reshape(-1), rtol=1e-6, atol=1e-6)


NAMES = [
    "params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "lr", "beta1", "beta2", "eps",
    "weight_decay", "decoupled", "amsgrad", "maximize",
]  # fmt: skip


# --- threads, sharing out ---------------------------------------------------------------------------------------------
@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_threads(isa, threads, dtype):
    sizes = [(70_001,), (3,), (0,), (50, 1001), (16_384,), (), (90_000,)]
    results = []
    for count in (1, 2, 7):
        threads(count)
        lists = problem(dtype, sizes=sizes, amsgrad=True)
        lists[0][3] = lists[0][3].t().contiguous().t()  # one that is not flat
        adam_(*lists, **options(amsgrad=True, weight_decay=0.1))
        results.append(written(lists))
    assert_bits_equal(results[0], results[1])
    assert_bits_equal(results[0], results[2])


@pytest.mark.skipif("native" not in BACKENDS, reason="compares the native kernel")
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=0, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    seed=st.integers(0, 2**20),
    flags=st.sampled_from(sorted(FLAGS)),
)
def test_any_list_equals_its_parts_and_the_reference(lengths, dtypes, seed, flags):
    opts = options(**FLAGS[flags])
    whole = [[] for _ in range(6)]
    for i, (n, dtype) in enumerate(zip(lengths, dtypes, strict=False)):
        for tensors, more in zip(whole, problem(dtype, [(n,)], opts["amsgrad"], seed + i), strict=True):
            tensors += more
    parts, reference = copy.deepcopy(whole), copy.deepcopy(whole)
    with fastlm.use_backend("native"):
        adam_(*whole, **opts)
        for i in range(len(lengths)):
            adam_(*([t[i]] if t else [] for t in parts), **opts)
    with fastlm.use_backend("reference"):
        adam_(*reference, **opts)
    assert_bits_equal(whole, parts)
    for got, want in zip(whole, reference, strict=True):
        for a, e in zip(got, want, strict=True):
            torch.testing.assert_close(a, e, rtol=8 * torch.finfo(a.dtype).eps, atol=8 * torch.finfo(a.dtype).eps)


# --- beyond torch -----------------------------------------------------------------------------------------------------
EXTRAS = {
    "l1": {"l1": 0.1},
    "averages": {"emas": True},
    "states in float32": {"states": torch.float32},
    "masters": {"masters": True, "states": torch.float32},
    "everything": {"masters": True, "emas": True, "states": torch.float32, "l1": 0.1, "scale": torch.tensor(0.25)},
}


def with_extras(dtype, extras, sizes=SIZES, **flags):
    step = as_step(problem(dtype, sizes, amsgrad=flags.get("amsgrad", False)), **flags)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    masters = extras.get("masters") and dtype in SIXTEEN_BITS
    step |= {name: value for name, value in extras.items() if name in ("l1", "scale")}
    step["masters"] = [p.to(wide) + 1e-4 for p in step["params"]] if masters else []
    step["emas"] = [p.to(wide) * 0.5 for p in step["params"]] if extras.get("emas") else []
    if "states" in extras and dtype in SIXTEEN_BITS:
        for name in STATES:
            step[name] = [x.to(wide) for x in step[name]]
    return step | {"ema_decay": 0.9}


STATES = ["exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"]


@pytest.mark.parametrize(
    "flags", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"decoupled": True, "weight_decay": 0.1}]
)
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_torch_has(backend, dtype, extras, flags):
    assert_as_exact_as_the_reference(adam_, with_extras(dtype, EXTRAS[extras], **flags), STATES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_as_the_reference(backend, dtype):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0], dtype=torch.float64)
    p, g = (x.flatten().to(dtype) for x in torch.meshgrid(special, special, indexing="ij"))
    step = with_extras(dtype, EXTRAS["everything"], [p.shape], weight_decay=0.1)
    step |= {"grads": [g], "masters" if step["masters"] else "params": [p.to(step["emas"][0].dtype)]}
    if dtype not in SIXTEEN_BITS:
        step["params"] = [p]
    want = copied(step)
    with fastlm.use_backend("reference"):
        adam_(**want)
    adam_(**step)
    for got, expected in zip(tensors_of(step), tensors_of(want), strict=True):
        for a, e in zip(got, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("found", [0.0, 1.0, float("inf"), float("nan")])
def test_found_inf_skips_the_step(backend, found):
    step = with_extras(torch.float16, EXTRAS["everything"])
    want = copied(step)
    if found == 0:
        adam_(**want)
    adam_(**step, found_inf=torch.tensor(found))
    assert_bits_equal(tensors_of(step), tensors_of(want))


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("other_layout", LAYOUTS)
def test_layouts_of_masters_and_averages(backend, param_layout, other_layout):
    n = 7
    dense = with_extras(torch.bfloat16, EXTRAS["everything"], [(4, 6, 10, n)])
    layouts = {name: LAYOUTS[param_layout if name in ("params", "exp_avgs") else other_layout] for name in dense}
    step = {
        name: [with_layout(layouts[name], n, t) for t in value]
        if isinstance(value, list) and name != "steps"
        else value
        for name, value in copied(dense).items()
    }
    tensors = [t for of in tensors_of(step) if of is not step["steps"] for t in of]
    around = [outside(x) for x in tensors]
    adam_(**dense)
    adam_(**step)
    assert_bits_equal(tensors_of(step), tensors_of(dense))
    assert all(torch.equal(outside(x), a) for x, a in zip(tensors, around, strict=True))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_masters_and_codes_do_not_depend_on_threads(isa, threads, dtype):
    sizes = [(70_001,), (3,), (0,), (50, 1001), (16_384,), (), (90_000,)]
    results = []
    for count in (1, 2, 7):
        threads(count)
        plain = with_extras(dtype, EXTRAS["everything"], sizes)
        packed = _packed(with_extras(dtype, EXTRAS["everything"], sizes))
        for step in (plain, packed):
            adam_(**step)
        results.append(tensors_of(plain) + tensors_of(packed))
    assert_bits_equal(results[0], results[1])
    assert_bits_equal(results[0], results[2])


# --- states in 8 bits -------------------------------------------------------------------------------------------------
NARROW = [torch.float32, *SIXTEEN_BITS]
AROUND_A_BLOCK = [(n,) for n in (0, 1, 31, 32, 33, 255, 256, 257, 300, 511, 512, 513, 5000)] + [(), (17, 33)]


def codes_of(grad, seed=0, **more):
    """What a step that keeps nothing of the past makes of a gradient: codes and scales of it and of its square."""
    step = as_step([[torch.zeros_like(grad)], [grad], [torch.zeros_like(grad)], [torch.zeros_like(grad)], [], []])
    step = _packed(step) | {"steps": [torch.tensor(0.0)], "beta1": 0.0, "beta2": 0.0, "eps": 1.0, "seed": seed, **more}
    adam_(**step)
    return [step[name][0] for name in ("exp_avgs", "exp_avg_scales", "exp_avg_sqs", "exp_avg_sq_scales")]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", AROUND_A_BLOCK)
def test_codes_are_the_references(backend, dtype, size):
    grad = torch.randn(size, generator=torch.Generator().manual_seed(3)) ** 5
    grad = grad.to(dtype) + 0.0  # the sign of a zero may come out otherwise, and means nothing
    for seed in (0, 2**40 + 5):
        got = codes_of(grad, seed)
        with fastlm.use_backend("reference"):
            assert_bits_equal([got], [codes_of(grad, seed)])


@pytest.mark.parametrize("dtype", NARROW)
def test_steps_with_codes_are_the_references(backend, dtype):
    """But for the few codes that a last digit of what the step computed decides."""
    step = _packed(with_extras(dtype, {"emas": True}, AROUND_A_BLOCK, weight_decay=0.1))
    want = copied(step)
    for _ in range(3):
        adam_(**step)
        with fastlm.use_backend("reference"):
            adam_(**want)
    for name in ("exp_avgs", "exp_avg_sqs"):
        apart = torch.cat([(a.int() - e.int()).abs().flatten() for a, e in zip(step[name], want[name], strict=True)])
        assert (apart != 0).float().mean() < 2e-3
    for name, tolerance in (("exp_avg_scales", 1e-5), ("exp_avg_sq_scales", 1e-5), ("emas", 2e-3)):
        torch.testing.assert_close(step[name], want[name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(step["params"], want["params"], rtol=1e-2, atol=1e-2)


def test_codes_are_right_in_the_mean(backend):
    grad = torch.randn(300, generator=torch.Generator().manual_seed(0))
    draws = 400 if backend == "native" else 100
    sums = [torch.zeros(300, dtype=torch.float64) for _ in range(2)]
    for seed in range(draws):
        m, of_m, v, of_v = codes_of(grad, seed)
        sums[0] += dequantized(m, of_m, True)
        sums[1] += dequantized(v, of_v, False)
    for total, exact in zip(sums, (grad.double(), grad.double().square()), strict=True):
        # A code is 1/8 of an octave at most, so a draw deviates by no more than 1/16 of the number.
        large = exact.abs() > exact.abs().max() * 2**-15
        assert ((total / draws - exact).abs() <= 5 / 16 / draws**0.5 * exact.abs())[large].all()
        assert ((total / draws - exact) / exact)[large].mean().abs() < 5 / 16 / (draws * 300) ** 0.5


def test_extreme_codes_are_the_references(backend):
    grad = torch.randn(4 * 256 + 44, generator=torch.Generator().manual_seed(4)) ** 5
    for block, largest in ((0, 3e38), (1, 1.5e19)):  # the inverse of the mean's or the square's scale is denormal
        part = grad[256 * block : 256 * (block + 1)]
        part *= largest / part.abs().max()
    grad[2 * 256] = 1e19
    grad[2 * 256 + 1 : 3 * 256] = torch.linspace(0.01, 0.4, 255)  # squares below 2^-126 of the largest
    grad[900] = torch.tensor(0xFFC00001 - (1 << 32), dtype=torch.int32).view(torch.float32)  # NaN with a sign
    for seed in range(8):
        got = codes_of(grad, seed)
        with fastlm.use_backend("reference"):
            want = codes_of(grad, seed)
        for codes in (got, want):
            codes[0][900] = 0  # a sign that means nothing
        assert_bits_equal([got], [want])
        assert got[3][0].isnan() and got[1][3].isnan() and got[3][3].isnan()
        assert 0 < (got[2][2 * 256 + 1 : 3 * 256] == 1).sum() < 255


def test_special_blocks(backend):
    grad = torch.randn(5 * 256)
    grad[:256] = 0.0  # a block of nothing
    grad[300] = float("nan")
    grad[256 * 2 + 7] = -float("inf")
    grad[256 * 3 : 256 * 4] = 1e-35  # smaller than any scale
    grad[256 * 4 :] = 1e-12  # whose square is far below the largest, and yet not nothing
    grad[256 * 4] = 1.0
    m, of_m, v, of_v = codes_of(grad)
    for codes, scales, signed in ((m, of_m, True), (v, of_v, False)):
        x = dequantized(codes, scales, signed).view(5, 256)
        assert (x[[0, 3]] == 0).all() and (scales[[0, 3]] == 0).all()
        assert x[1:3].isnan().all() and scales[1:3].isnan().all()
        assert x[4, 0] == 1 and scales[4] == 1
    assert (v[256 * 4 + 1 :] == 1).all()
    assert (m[256 * 4 + 1 :] == 0).all()
    assert torch.equal((m > 127)[256:512], grad[256:512].signbit())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_become_themselves_again(signed):
    x = torch.randn(2, 3000).prod(0)
    codes, scales = quantized(x if signed else x.square(), signed)
    again, scales_again = quantized(dequantized(codes, scales, signed), signed)
    assert torch.equal(codes, again) and torch.equal(scales, scales_again)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "misaligned"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts_with_codes(backend, layout, grad_layout):
    """Blocks follow memory: the step on the parameter's memory as a vector."""
    n = 7
    param, grad = (with_layout(LAYOUTS[of], n, torch.randn(4, 6, 10, n)) for of in (layout, grad_layout))
    m, v = torch.randn_like(param), torch.rand_like(param)
    in_memory = [x.as_strided((x.numel(),), (1,)) for x in (param.clone(), torch.empty_like(param).copy_(grad), m, v)]
    flat = _packed(as_step([*([x.clone()] for x in in_memory), [], [torch.tensor(4.0)]]))
    step = copied(flat) | {"params": [param], "grads": [grad]}
    for name in ("exp_avgs", "exp_avg_sqs"):
        step[name] = [step[name][0].as_strided(param.shape, torch.empty_like(param).stride())]
    around = outside(param)
    adam_(**step)
    adam_(**flat)
    assert torch.equal(param, flat["params"][0].as_strided(param.shape, torch.empty_like(param).stride()))
    assert torch.equal(outside(param), around)
    for name in ("exp_avgs", "exp_avg_sqs"):
        assert torch.equal(step[name][0].as_strided((param.numel(),), (1,)), flat[name][0])


def test_masters_and_averages_in_another_order_than_codes(backend):
    param = torch.randn(17, 33).bfloat16()
    step = as_step([[param], [param.clone()], [param.float()], [param.float().square()], [], [torch.tensor(1.0)]])
    step = _packed(step) | {"masters": [param.float()], "emas": [param.float() * 0.5], "ema_decay": 0.9}
    other = copied(step)
    for name in ("masters", "emas"):
        other[name] = [other[name][0].t().contiguous().t()]
    adam_(**step)
    adam_(**other)
    assert_bits_equal(tensors_of(step), tensors_of(other))


# --- torch's machinery ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("namespace", ["fastlm", *(f"fastlm_{b}" for b in BACKENDS)])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(namespace, amsgrad):
    args = (*problem(torch.float32, amsgrad=amsgrad), *options(amsgrad=amsgrad).values(), *NOTHING_MORE)
    torch.library.opcheck(getattr(torch.ops, namespace).adam_.default, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    def run(lists):
        torch.ops.fastlm.adam_(*lists, *options().values(), *NOTHING_MORE)
        return lists[0][-1] * 2

    a, b = problem(torch.float32), problem(torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(run, fullgraph=True, backend=compiler)(a), run(b))
    assert_bits_equal(a, b)


def test_bumps_every_version_that_it_writes(backend):
    lists = problem(torch.float32, amsgrad=True)
    before = [[t._version for t in tensors] for tensors in lists]
    adam_(*lists, **options(amsgrad=True))
    for k, tensors in enumerate(lists):
        for t, version in zip(tensors, before[k], strict=True):
            assert t._version == version if k == 1 else t._version > version


def test_backward_through_a_stale_parameter_raises(backend):
    w, x = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    loss = (w * x).sum()
    lists = problem(torch.float32, sizes=[(4,)])
    with torch.no_grad():
        adam_([w], *lists[1:], **options())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refuses_to_change_what_autograd_records(backend):
    lists = problem(torch.float32, sizes=[(4,)])
    with pytest.raises(RuntimeError) as error:
        adam_([lists[0][0].requires_grad_()], *lists[1:], **options())
    assert str(error.value) == "fastlm.adam_ changes its arguments in place: call it under torch.no_grad()"


# --- bad input --------------------------------------------------------------------------------------------------------
def as_step(lists, **more):
    return dict(zip(NAMES[:6], lists, strict=True)) | options() | more


def _packed(step):
    """States of 8 bits."""
    for name, signed in (("exp_avgs", True), ("exp_avg_sqs", False)):
        packed = [quantized(x.flatten(), signed) for x in step[name]]
        step[name] = [codes.view(p.shape) for (codes, _), p in zip(packed, step["params"], strict=True)]
        step[f"{name[:-1]}_scales"] = [scales for _, scales in packed]
    return step


def _packed_without_scales(step):
    del _packed(step)["exp_avg_scales"]


def _packed_with_gaps(step):
    _packed(step)["params"][1] = torch.zeros(6)[::2]


def _packed_in_another_order(step):
    _packed(step)
    for name in ("params", "grads", "exp_avg_sqs"):
        step[name] = [step[name][0], step[name][1].new_zeros(3, 2)]
    step["exp_avgs"][1] = torch.zeros(2, 3, dtype=torch.uint8).t()


def _packed_with_tops(step):
    _packed(step).update(amsgrad=True, max_exp_avg_sqs=[torch.zeros(3, dtype=torch.uint8) for _ in range(2)])


REFUSED = bad_steps(
    (drop("steps"), ValueError, "steps must hold one tensor per parameter, 2, got 1"),
    (
        give(max_exp_avg_sqs=[torch.zeros(3)]),
        ValueError,
        "max_exp_avg_sqs must be empty without amsgrad, got 1 tensors",
    ),
    (
        change("exp_avgs", 1, torch.zeros(3)[:, None]),
        ValueError,
        "exp_avgs[1] must have the sizes of params[1], (3,), got (3, 1)",
    ),
    (
        change("exp_avg_sqs", 1, torch.zeros(3, dtype=torch.bfloat16)),
        TypeError,
        "exp_avg_sqs[1] must be of the dtype of exp_avgs[1], torch.float32, got torch.bfloat16",
    ),
    (
        give(masters=[torch.zeros(3)] * 2, stochastic_params=True),
        ValueError,
        "parameters that have masters are not rounded at random, got stochastic_params",
    ),
    (
        give(exp_avg_scales=[torch.zeros(1)] * 2),
        TypeError,
        "scales are for states of 8 bits, got exp_avgs[0] of torch.float32",
    ),
    (
        _packed_without_scales,
        ValueError,
        "exp_avgs[0] has 8 bits and needs scales, contiguous float32 (1,) on cpu, got none",
    ),
    (
        _packed_with_gaps,
        ValueError,
        "states of 8 bits are for parameters without gaps in memory, got params[1] of sizes (3,) with strides (2,)",
    ),
    (
        _packed_in_another_order,
        ValueError,
        "exp_avgs[1] has 8 bits and must have the strides of params[1], (2, 1), got (1, 3)",
    ),
    (_packed_with_tops, ValueError, "max_exp_avg_sqs[0] cannot have 8 bits"),
)


@REFUSED
def test_bad_input_gets_a_sentence_and_changes_nothing(backend, changed, kind, message):
    assert_refused(
        adam_, as_step(problem(torch.float32, sizes=[(3,), (3,)])), ["exp_avgs", "exp_avg_sqs"], changed, kind, message
    )


def test_every_refusal_of_a_step_is_met():
    met = set()
    for case in REFUSED.args[1]:
        step = as_step(problem(torch.float32, sizes=[(3,), (3,)]))
        met.add(assert_refused(adam_, step, ["exp_avgs", "exp_avg_sqs"], *case))
    missing = [what for file, lines, what in raises_in("_step.py") if not any((file, line) in met for line in lines)]
    assert not missing


@pytest.mark.skipif("native" not in BACKENDS, reason="checks the binding")
@pytest.mark.parametrize(
    "changed, message",
    [
        (drop("grads"), "grads must hold 2 tensors, got 1"),
        (drop("steps"), "steps must hold 2 tensors, got 1"),
        (
            change("grads", 0, torch.zeros(4)),
            "grads[0] must have dtype float32 and the sizes of params[0], float32 (3) strides (1), "
            "got float32 (4) strides (1)",
        ),
        (
            change("exp_avgs", 0, torch.zeros(1).expand(3)),
            "exp_avgs[0] is written, so no two of its elements may share memory, got float32 (3) strides (0)",
        ),
        (repeat, "params[1] shares its memory with another tensor that this call writes"),
        (
            change("steps", 0, torch.tensor(1)),
            "steps[0] must be one float32 or float64 on cpu, got int64 () strides ()",
        ),
        (
            give(exp_avg_scales=[torch.zeros(1)] * 2),
            "scales are for states of 8 bits, got params[0] float32 (3) strides (1) without",
        ),
        (_packed_without_scales, "scales of exp_avgs must hold 2 tensors, got 0"),
        (
            lambda step: _packed(step)["grads"].__setitem__(1, torch.zeros(6)[::2]),
            "states of 8 bits go with tensors of one dense layout and without max_exp_avg_sqs, got params[1] "
            "float32 (3) strides (1)",
        ),
    ],
)
def test_the_binding_checks_for_itself(changed, message):
    step = as_step(problem(torch.float32, sizes=[(3,), (3,)]))
    changed(step)
    steps = [s.clone() for s in step["steps"]]
    scales = [step.pop(name, []) for name in ("exp_avg_scales", "exp_avg_sq_scales")]
    with pytest.raises(ValueError) as error:
        _native.cpu.adam_step(*step.values(), 1.0, False, False, 0, 0.0, [], [], 0.0, *scales, 1)
    assert str(error.value) == f"fastlm: adam_: {message}"
    assert all(torch.equal(a, b) for a, b in zip(step["steps"], steps, strict=True))


def test_empty_lists_do_nothing(backend):
    adam_([], [], [], [], [], [], **options())


@pytest.mark.parametrize("backend", ["reference", *(["native"] if ISAS else [])])
def test_written_memory_that_elements_share_is_refused(backend):
    """Strides (1, 1): no dimension is expanded, and yet elements (0, 1) and (1, 0) are one."""
    twice = torch.zeros(3).as_strided((2, 2), (1, 1))
    lists = [[twice], *([torch.zeros(2, 2)] for _ in range(3)), [], [torch.tensor(0.0)]]
    with (
        fastlm.use_backend(backend),
        pytest.raises(ValueError, match=r"params\[0\] is written, so no two of its elements"),
    ):
        adam_(*lists, **options())


# --- grad_norm --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_norm(backend, dtype):
    lists = problem(dtype, sizes=[(0,), (), (63,), (17, 33), (300, 900)])[0]
    lists += [lists[4].t(), lists[4][::2, ::3], lists[4].view(2, 2, 3, 5, 5, 1, 2, 9, 5, 10).permute(*range(9, -1, -1))]
    want = torch.stack([t.double().square().sum() for t in lists]).sum().sqrt()
    got = grad_norm(lists)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == ()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_grad_norm_of_many_elements(backend):
    """Sums of float32 alone would be some tenths of a percent low."""
    x = torch.full((3_000_001,), 0.1)
    torch.testing.assert_close(grad_norm([x]).item(), 0.1 * 3_000_001**0.5, rtol=1e-5, atol=0)
    x[5] = float("inf")
    assert grad_norm([x]) == float("inf")
    x[6] = float("nan")
    assert grad_norm([x]).isnan()


def test_grad_norm_refuses():
    with pytest.raises(ValueError, match="grads must hold at least one tensor"):
        grad_norm([])
    with pytest.raises(TypeError, match=r"grads\[1\] must be floating point"):
        grad_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"grads\[1\] must be on the device of grads\[0\]"):
        grad_norm([torch.ones(2), torch.ones(2, device="meta")])
    with pytest.raises(RuntimeError, match=r"fastlm\.grad_norm has no gradient"):
        grad_norm([torch.ones(2, requires_grad=True)])


@pytest.mark.skipif("native" not in BACKENDS, reason="checks the binding")
def test_a_scale_and_states_of_another_dtype(backend):
    """Against the same step on scaled gradients and on the state in float32."""
    for dtype, state_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        lists = problem(dtype, sizes=[(65,), (17, 33)])
        lists[2:4] = [[t.to(state_dtype) for t in group] for group in lists[2:4]]
        want = [[t.double() for t in group] for group in lists]
        want[1] = [0.25 * g for g in want[1]]
        opts = options(weight_decay=0.1, decoupled=True)
        adam_(*lists, **opts, scale=torch.tensor(0.25))
        with fastlm.use_backend("reference"):
            adam_(*want[:5], [torch.tensor(float(i)) for i in range(2)], **opts)
        for got, exact, of in zip(lists[:4], want[:4], (dtype, None, state_dtype, state_dtype), strict=True):
            if of is not None:
                for a, e in zip(got, exact, strict=True):
                    torch.testing.assert_close(
                        a.double(), e, rtol=2 * torch.finfo(of).eps, atol=2 * torch.finfo(of).eps
                    )
    lists = problem(torch.float32, sizes=[(3,)])
    with pytest.raises(ValueError, match="scale must be one floating-point number on the device"):
        adam_(*lists, **options(), scale=torch.ones(2))
    lists[2] = [lists[2][0].half()]
    with pytest.raises(
        TypeError, match=r"exp_avgs\[0\] must be of torch.float32 or torch.bfloat16 or torch.uint8 for params\[0\]"
    ):
        adam_(*lists, **options())
