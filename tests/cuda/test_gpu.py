"""What only a GPU can show: streams, devices, graphs, memory, sizes. Skipped where there is none."""

from __future__ import annotations

import inspect
import math

import pytest
import test_kernels
import torch
from attention_cases import draw, options
from cuda_testing import Kernels, TritonKernels
from test_kernels import TOLERANCE, assert_near, check_attention, families

import fastlm
from fastlm import _library, _native
from fastlm.ops.attention import attention_backward_reference, attention_reference
from fastlm.ops.attention_decode import attention_decode_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("gpu")


@pytest.fixture(params=["sm80", "sm90"])
def family(request, kernels, monkeypatch) -> str:
    """Attention's kernels of one family, where this GPU and this build have them."""
    monkeypatch.setenv("FASTLM_CUDA_FAMILY", request.param)
    q = torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16, device=kernels.device)
    if (taken := families(kernels, q, q, q)) != (request.param, request.param):
        pytest.skip(f"attention takes the kernels of {' and '.join(taken)}")
    return request.param


@pytest.mark.parametrize("name", test_kernels.OPS)
def test_self_check_passes(name):
    statuses = {s.backend: s for s in fastlm.backends(name)}
    assert statuses["native"].usable, statuses["native"].reason


@pytest.mark.parametrize("name", [n for n in test_kernels.OPS if n not in ("adam_", "sgd_")])
def test_every_kernel_is_captured(kernels, name):
    """On the stream that captures, without waiting for anything."""
    for args in _library._ops[name].samples(kernels.device.type):
        if kernels.refusal(name, *args) is not None:
            continue
        eager = _library._tensors([kernels[name](*args)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _library._tensors([kernels[name](*args)])
        graph.replay()
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(eager, captured, strict=True))


def test_driver_is_new_enough():
    assert _native.cuda.driver_problem() is None
    assert _native.cuda.driver_version() >= 12000


def slow_stream() -> torch.cuda.Stream:
    """A stream that is busy for some milliseconds: what does not wait in it comes too early."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
    return stream


def test_kernels_run_on_the_current_stream(kernels):
    x = draw(1 << 20).to(kernels.device)
    q = draw(1, 2, 256, 64, dtype=torch.float16).to(kernels.device)
    source = torch.zeros_like(x), torch.zeros_like(q)
    want = kernels["relu"](x), kernels["attention"](q, q, q, *options(1))[0]
    torch.cuda.synchronize()
    stream = slow_stream()
    with torch.cuda.stream(stream):
        source[0].copy_(x)
        source[1].copy_(q)
        got = kernels["relu"](source[0]), kernels["attention"](source[1], source[1], source[1], *options(1))[0]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_two_streams_at_once(kernels, family):
    """Different calls side by side on one GPU give what each gives alone."""
    bf16, half = torch.bfloat16, torch.float16
    q, do = (draw(2, 8, 700, 128, dtype=bf16, seed=i).to(kernels.device) for i in range(2))
    k, v = (draw(3, 2, 900, 64, dtype=half, seed=i).to(kernels.device) for i in range(2))
    q2, one = (draw(3, 4, t, 64, dtype=half, seed=2).to(kernels.device) for t in (500, 1))
    lens = torch.tensor([900, 1, 333], device=kernels.device)
    wanted = [True] * 3 + [False] * 3

    def both_ways() -> list[torch.Tensor]:
        o, lse = kernels["attention"](q, q, q, *options(1, scale=0.1))
        return [o, lse, *kernels["attention_backward"](do, lse, q, q, q, o, lse, *options(1, scale=0.1), wanted)]

    def others() -> list[torch.Tensor]:
        o, lse = kernels["attention"](q2, k, v, *options(0, (300, 40), scale=0.1))
        backward = kernels["attention_backward"](q2, None, q2, k, v, o, lse, *options(0, (300, 40), scale=0.1), wanted)
        return [o, lse, *backward, *kernels["attention_decode"](one, k, v, lens, None, None, None, -1, 0, 0.1, 0.0)]

    calls = (both_ways, others)
    alone = [call() for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    got: list[list[list[torch.Tensor]]] = [[], []]
    for _ in range(30):
        for stream, call, results in zip(streams, calls, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    for want, results in zip(alone, got, strict=True):
        assert all(torch.equal(a, b) for result in results for a, b in zip(want, result, strict=True))


@pytest.mark.parametrize("name", [n for n in test_kernels.OPS if not n.startswith("attention")])
def test_every_kernel_on_two_streams_at_once(kernels, name):
    """The samples of the self-check, in one order and in the other."""
    op = _library._ops[name]
    samples = [args for args in op.samples(kernels.device.type) if kernels.refusal(name, *args) is None]

    def run(order: list[int]) -> dict[int, list[torch.Tensor]]:
        found = {}
        for i in order:
            args = _library._clone(samples[i])
            returned = kernels[name](*args)
            found[i] = _library._tensors(args if returned is None else [returned])
        return found

    orders = [list(range(len(samples))), list(range(len(samples)))[::-1]]
    alone = run(orders[0])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in orders]
    got = []
    for _ in range(10):
        for stream, order in zip(streams, orders, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(order))
    torch.cuda.synchronize()
    for found in got:
        for i, want in alone.items():
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(found[i], want, strict=True))


def test_adam_is_captured_with_its_count(kernels):
    """Three replays are three steps, each at the rate that stands in its tensor then."""
    lr = torch.tensor(0.1, device=kernels.device)

    def made() -> list:
        tensors = [[draw(n, seed=i).abs().to(kernels.device) for n in (5, 4099)] for i in range(4)]
        return [*tensors, [], [torch.zeros((), device=kernels.device) for _ in range(2)]]

    def step(lists: list) -> None:
        norm = kernels["grad_norm"](lists[1])
        more = (norm, False, lr, False, 0, *test_kernels.NO_EXTRAS)
        kernels["adam_"](*lists, 0.0, 0.9, 0.99, 1e-6, 0.1, True, False, False, *more)

    eager, captured = made(), made()
    for lists in (eager, captured):
        step(lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    for rate in (0.1, 0.01, 0.5):
        lr.fill_(rate)
        step(eager)
        graph.replay()
    assert [s.item() for s in captured[5]] == [4, 4]
    for a, b in zip(eager[:4], captured[:4], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["adam_", "adam_ in 8 bits", "sgd_"])
def test_captured_steps_are_skipped_where_they_are_found_to(kernels, kind):
    """Of three replays the second writes nothing and does not count, as without a graph."""
    device, found_inf = kernels.device, torch.zeros((), device=kernels.device)
    extras = {"found_inf", "emas", "masters"}

    def made() -> list:
        args = list(test_kernels.sgd_args(torch.bfloat16, [5, 4099], device, steps="device", extras=extras))
        args[args_of("sgd_").index("found_inf")] = None
        if kind != "sgd_":
            lists, scales = test_kernels.adam_lists(torch.bfloat16, [5, 4099], False), ([], [])
            if kind == "adam_ in 8 bits":
                lists, scales = test_kernels.packed_lists(torch.bfloat16, [5, 4099])
            lists[5] = test_kernels.counted(lists, device)
            more = test_kernels.extras_of(lists[0], extras, device) | {"found_inf": None}
            args = [*lists, 0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False]
            args += [*test_kernels.NOTHING_MORE[:5], *more.values(), *scales]
        args = test_kernels.on(device, args)
        args[args_of(op).index("found_inf")] = found_inf
        return args

    def args_of(op: str) -> list[str]:
        reference = test_kernels.sgd_reference if op == "sgd_" else test_kernels.adam_reference
        return list(inspect.signature(reference).parameters)

    op = kind.split()[0]
    eager, captured = made(), made()
    for args in (eager, captured):
        kernels[op](*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels[op](*captured)
    steps = args_of(op).index("steps")
    before = [step.item() for step in captured[steps]]
    for found in (0.0, math.inf, 0.0):
        found_inf.fill_(found)
        kernels[op](*eager)
        graph.replay()
        for a, b in zip(eager, captured, strict=True):
            if isinstance(a, list):
                assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))
    assert [step.item() for step in captured[steps]] == [step + 2 for step in before]


@pytest.mark.parametrize("op", ["adam_", "sgd_"])
def test_steps_that_the_host_counts_are_not_captured(kernels, op):
    args = test_kernels.sgd_args(torch.float32, [5], kernels.device)
    if op == "adam_":
        args = [*test_kernels.adam_lists(torch.float32, [5], False), 0.1, 0.9, 0.99, 1e-6, 0.1, True, False, False]
        args += test_kernels.NOTHING_MORE
    args = test_kernels.on(kernels.device, args)
    with pytest.raises(RuntimeError, match="counts steps on the host"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels[op](*args)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_second_device(kernels):
    q = draw(1, 2, 130, 64, dtype=torch.float16)
    want = kernels["attention"](*[q.to("cuda:0")] * 3, *options(1))
    got = kernels["attention"](*[q.to("cuda:1")] * 3, *options(1))
    assert torch.cuda.current_device() == 0
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(want, got, strict=True))
    with pytest.raises(ValueError, match="one CUDA device"):
        x = torch.zeros(4, device="cuda:0")
        kernels.module.act_forward(x, x.to("cuda:1"), 1, kernels.stream())


def test_graph_capture(kernels):
    """No call synchronises or allocates behind torch's back."""
    q = draw(1, 2, 256, 64, dtype=torch.bfloat16).to(kernels.device)
    kernels["attention"](q, q, q, *options(1))
    seed, one = torch.tensor(5, device=kernels.device), torch.ones((), device=kernels.device)

    def others() -> list[torch.Tensor]:
        backward = kernels["bias_act_backward"](q, q, q[0, 0, 0], "gelu")
        loss = kernels["mse_loss"](q, q.relu())
        return [
            *backward, loss, kernels["mse_loss_backward"](one, q, q.relu()), kernels["glu"](*q.chunk(2, -1), "silu"),
            kernels["bias_act"](q, q[0, 0, 0], "tanh", 0.3, seed),
        ]  # fmt: skip

    others()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = kernels["attention"](q, q, q, *options(1))
        gradients = kernels["attention_backward"](q, None, q, q, q, o, lse, *options(1), [True] * 3 + [False] * 3)
        y = kernels["relu"](o)
        rest = others()
    q.copy_(draw(1, 2, 256, 64, dtype=torch.bfloat16, seed=5))
    graph.replay()
    o2, lse2 = kernels["attention"](q, q, q, *options(1))
    again = kernels["attention_backward"](q, None, q, q, q, o2, lse2, *options(1), [True] * 3 + [False] * 3)
    assert torch.equal(o, o2) and torch.equal(lse, lse2) and torch.equal(y, o2.relu())
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(rest, others(), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("causal", [0, 1, 2])
def test_attention_of_real_sizes(kernels, dtype, width, causal):
    case = (2, 8, 2, 700, 900, width, width, causal, (-1, -1), "bthd")
    first = check_attention(kernels, dtype, case)
    for _ in range(5):  # a race need not show at once
        again = check_attention(kernels, dtype, case)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(torch.equal(a, b) for a, b in zip(first[2], again[2], strict=True))


def test_a_hundred_reruns_give_the_same_bits(kernels, family):
    generator = torch.Generator(kernels.device).manual_seed(0)
    q, k, v, do = (
        torch.randn(16, 16, 1024, 128, generator=generator, device=kernels.device).bfloat16() for _ in range(4)
    )

    def run() -> list[torch.Tensor]:
        o, lse = kernels["attention"](q, k, v, *options(1, scale=0.1))
        wanted = [True] * 3 + [False] * 3
        return [o, lse, *kernels["attention_backward"](do, None, q, k, v, o, lse, *options(1, scale=0.1), wanted)]

    first = run()
    for i in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"rerun {i}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [40, 64, 128])
def test_outputs_are_written_wholly_and_alone_by_each_family(kernels, family, dtype, width):
    test_kernels.test_outputs_are_written_wholly_and_alone(kernels, dtype, width)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_memory(kernels, dtype):
    """At 16,384 keys the extra memory stays within 4 times the output: no scores in device memory."""
    q, k, v = (torch.randn(1, 2, 16384, 64, device=kernels.device, dtype=dtype) for _ in range(3))
    kernels["attention"](q[:, :, :64], k[:, :, :64], v[:, :, :64], *options(1))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, lse = kernels["attention"](q, k, v, *options(1, scale=0.125))
    assert torch.cuda.max_memory_allocated() - before <= 4 * o.numel() * o.element_size()
    rows = torch.tensor([0, 1, 63, 64, 5000, 16383])
    for i in rows.tolist():
        s = (q[:, :, i : i + 1].double() @ k[:, :, : i + 1].double().mT) * 0.125
        assert_near(o[:, :, i : i + 1], (s.softmax(-1) @ v[:, :, : i + 1].double()).cpu(), TOLERANCE[dtype])
        assert_near(lse[:, :, i : i + 1], s.logsumexp(-1).cpu(), 1e-5)


def test_linear_cross_entropy_memory(kernels):
    """Besides the gradients 512 MiB of logits and the gradient of the weight in float32, of 1 GiB of logits."""
    (rows, cols, classes), device, bf16 = (4096, 256, 131072), kernels.device, torch.bfloat16
    x, weight = (torch.randn(n, cols, device=device, dtype=bf16) / 8 for n in (rows, classes))
    target = torch.arange(rows, device=device)
    options = (-100, 0.0, 0.0, 0.0, True, [True, True, False])
    kernels["linear_cross_entropy"](x[:128], weight, None, target[:128], *options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, dx, dweight, _ = kernels["linear_cross_entropy"](x, weight, None, target, *options)
    extra = torch.cuda.max_memory_allocated() - before - 4 * weight.numel()
    assert extra <= 1.1 * 2**29
    logits = x[:64].double() @ weight.double().T
    want = logits.softmax(-1)
    want[torch.arange(64), target[:64]] -= 1
    assert_near(dx[:64], (want @ weight.double() / rows).cpu(), 4 * torch.finfo(bf16).eps)
    assert loss.isfinite() and dweight.isfinite().all()


def test_more_elements_than_32_bits_count(kernels):
    numel = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 5 * 2 * numel:
        pytest.skip(f"needs {5 * 2 * numel / 2**30:.0f} GiB of free GPU memory")
    x = torch.ones(numel, dtype=torch.bfloat16, device=kernels.device)
    x[-3:] = torch.tensor([-1.0, 2.0, math.nan])
    y = kernels["relu"](x)
    assert y[-4:-1].tolist() == [1.0, 0.0, 2.0] and y[-1].isnan()
    dx = kernels["relu_backward"](x, y)
    assert dx[-3:-1].tolist() == [0.0, 2.0]
    del y, dx
    rows = x.view(-1, 4096)
    y = kernels["bias_act"](rows, torch.ones(4096, dtype=torch.bfloat16, device=kernels.device), "relu", 0.0, None)
    assert y[-1, -4:-1].tolist() == [2.0, 0.0, 3.0]


ROWS = 2**19 + 64  # of 4096 columns


@pytest.fixture(params=["native", "triton"])
def either(request, kernels) -> Kernels | TritonKernels:
    return kernels if request.param == "native" else TritonKernels()


@pytest.mark.parametrize("name", test_kernels.FAR)
def test_last_rows_of_more_elements_than_32_bits_count(either, name):
    if torch.cuda.mem_get_info()[0] < 8 * 2**32:
        pytest.skip("needs 32 GiB of free GPU memory")
    test_kernels.check_last_rows(either, name, ROWS, 4096)


def test_sums_of_more_elements_than_32_bits_count(either):
    if torch.cuda.mem_get_info()[0] < 4 * 2**32:
        pytest.skip("needs 16 GiB of free GPU memory")
    test_kernels.check_far_sums(either, ROWS, 4096)


def assert_head_is_right(kernels, read: list[torch.Tensor], found: list[torch.Tensor], at: tuple[slice, slice]):
    """One head of q, k, v, do, and of o, lse, dq, dk, dv after a causal call, in float64."""
    q, k, v, do = (x[at].double().cpu() for x in read)
    o, lse = attention_reference(q, k, v, *options(1, scale=0.03))
    backward = attention_backward_reference(
        do, None, q, k, v, o, lse, *options(1, scale=0.03), [True] * 3 + [False] * 3
    )
    for got, want, times in zip(found, [o, lse, *backward], [1, 1e-3, 2, 2, 2], strict=False):
        assert_near(got[at], want, times * TOLERANCE[torch.bfloat16])


def large_attention(kernels, read: list[torch.Tensor]) -> list[torch.Tensor]:
    *qkv, do = read
    o, lse = kernels["attention"](*qkv, *options(1, scale=0.03))
    wanted = [True] * 3 + [False] * 3
    gradients = kernels["attention_backward"](do, None, *qkv, o, lse, *options(1, scale=0.03), wanted)
    return [o, lse, *gradients[:3]]


def start_of_a_large_test(size: int) -> None:
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of free GPU memory")


def test_attention_on_more_elements_than_32_bits_count(kernels, family):
    shape = (129, 128, 1024, 128)
    start_of_a_large_test(8 * 2 * math.prod(shape))
    x, do = (torch.randn(shape, device=kernels.device, dtype=torch.bfloat16) for _ in range(2))
    read = [x, x, x, do]
    found = large_attention(kernels, read)
    for b, h in ((0, 0), (64, 127), (127, 127), (128, 0), (128, 127)):  # around 2**30 and 2**31, and the ends
        assert_head_is_right(kernels, read, found, (slice(b, b + 1), slice(h, h + 1)))


def test_attention_on_rows_far_apart(kernels, family):
    """Within a head, and within a tile, offsets outgrow 32 bits."""
    rows, apart, heads, width = 300, 2**23, 2, 64
    start_of_a_large_test(2 * rows * apart + 2**30)
    base = torch.empty(rows, apart, device=kernels.device, dtype=torch.bfloat16)
    read = []
    for i in range(4):  # (1, H, T, D), one beside the other in each row, the last at its end
        columns = slice(-heads * width, None) if i == 3 else slice(i * heads * width, (i + 1) * heads * width)
        base[:, columns] = torch.randn(rows, heads * width, device=kernels.device).bfloat16()
        read.append(base[:, columns].unflatten(1, (heads, width)).transpose(0, 1)[None])
    found = large_attention(kernels, read)
    for h in range(heads):
        assert_head_is_right(kernels, read, found, (slice(None), slice(h, h + 1)))


def test_attention_decode_on_more_elements_than_32_bits_count(kernels):
    B, Hk, S, D = 132, 8, 16384, 128
    start_of_a_large_test(2 * B * Hk * S * D + 2**30)
    cache = torch.randn(B, Hk, S, D, device=kernels.device, dtype=torch.bfloat16)
    q = torch.randn(B, 2 * Hk, 1, D, device=kernels.device, dtype=torch.bfloat16)
    lens = torch.full((B,), S, device=kernels.device)
    last = (None, None, None, -1, 0, 0.1, 0.0)
    o, lse = kernels["attention_decode"](q, cache, cache, lens, *last)
    for b in (0, B - 1):
        wide = cache[b : b + 1].double()
        want = attention_decode_reference(q[b : b + 1].double(), wide, wide, lens[:1], *last)
        assert_near(o[b : b + 1], want[0].cpu(), TOLERANCE[torch.bfloat16])
        assert_near(lse[b : b + 1], want[1].cpu(), 1e-5)


def test_training_step_matches_the_reference():
    """Through the public functions: gradients on the CUDA kernels and on the reference."""
    torch.manual_seed(0)
    x = torch.randn(2, 96, 3, 4, 32, device="cuda")
    found = {}
    for backend in ("native", "reference"):
        with fastlm.use_backend(backend):
            leaf = x.clone().requires_grad_()
            q, k, v = (t.transpose(1, 2) for t in leaf.unbind(2))
            y = fastlm.relu_squared(fastlm.attention(q, k, v, causal=True))
            y.square().sum().backward()
            found[backend] = leaf.grad
    assert_near(found["native"], found["reference"].cpu(), 1e-5)


@pytest.fixture(params=["fp32", "bf16"])
def run(request, tmp_path):
    """Configuration and data of a small run."""
    from fastlm.train import Progress, TrainConfig
    from fastlm.train.rundir import prepare_data

    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 2000)
    config = TrainConfig(
        data=str(tmp_path / "text.txt"), out=str(tmp_path / "run"), tokenizer="byte", n_layer=2, n_head=2, n_embd=128,
        block_size=128, batch_size=4, accumulation=2, dropout=0.1, bias=True, device="cuda", precision=request.param,
    )  # fmt: skip
    return config, prepare_data(config, Progress())


def test_a_training_step_waits_for_nothing(run):
    from fastlm.train.step import _work, build_model, build_optimizer

    config, dataset = run
    model = build_model(config, dataset)
    optimizer = build_optimizer(model, config)
    tokens = torch.zeros(2, 2, config.batch_size, config.block_size, dtype=torch.int64, device="cuda")
    _work(model, optimizer, config, tokens)  # what is chosen at first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        _work(model, optimizer, config, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_step_is_the_eager_one(run):
    """Forward and backward as one graph, the optimizer as another."""
    from fastlm.train.step import build_model, build_optimizer

    config, dataset = run
    tokens = torch.arange(4 * 128, device="cuda").view(4, 128) % 250
    found = []
    for compiled in (False, True):
        model = build_model(config.replace(dropout=0.0), dataset)
        optimizer = build_optimizer(model, config)
        forward, step = model, optimizer.step
        if compiled:
            forward, step = (torch.compile(f, fullgraph=True) for f in (model, optimizer.step))
        for _ in range(3):
            forward(tokens, tokens)[1].backward()
            step()
            optimizer.zero_grad(set_to_none=True)
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_captured_training_steps_are_the_eager_ones(run):
    """A hundred replays of forward, backward and optimizer, each with its own tokens, learning rate and dropout."""
    from fastlm.train.step import StepGraph, build_model, build_optimizer, training_step

    config, dataset = run
    found = []
    for graph in (None, StepGraph(always=True)):
        model = build_model(config, dataset)
        optimizer = build_optimizer(model, config)
        reported = [
            training_step(model, optimizer, config, dataset, step, 1e-3 / (step + 1), graph) for step in range(103)
        ]
        found.append((reported, [p.detach() for p in model.parameters()]))
    (eager, weights), (replayed, same) = found
    assert graph.chosen and replayed == eager
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
