"""The step as a CUDA graph: what is replayed, and when. A function stands in for it; test_gpu.py has a real one."""

import pytest
import torch

import fastlm
from fastlm._library import BackendStatus
from fastlm.models import GPT, GPTConfig
from fastlm.train import Progress, train
from fastlm.train import step as steps
from fastlm.train.config import prepare_machine
from fastlm.train.rundir import prepare_data
from fastlm.train.step import StepGraph, _work, build_graph, build_model, build_optimizer, training_step


class Recorder:
    """Captures a function by keeping it: a replay calls it again, and what it returns goes where the first went."""

    def __init__(self, fails=False):
        self.replays, self.captures, self.fails = 0, 0, fails

    def __call__(self, work):
        self.captures += 1
        if self.fails:
            with pytest.MonkeyPatch.context() as patch:  # after the backward, whose gradients a graph would only record
                patch.setattr(fastlm.optim.AdamW, "step", self.fail)
                work()
        outcome = torch.empty(2, dtype=torch.float64)

        def replay():
            self.replays += 1
            outcome.copy_(work())

        return replay, outcome

    @staticmethod
    def fail(_):
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each of the next steps takes; without any, a millisecond."""
    waiting, now = [], 0.0

    def perf_counter():
        nonlocal now
        perf_counter.calls += 1
        if perf_counter.calls % 2 == 0:
            now += waiting.pop(0) if waiting else 1e-3
        return now

    perf_counter.calls = 0
    monkeypatch.setattr(steps.time, "perf_counter", perf_counter)
    return waiting


def run_of(small, graph, count, **changes):
    """What `count` steps report, and the weights that they leave."""
    config = prepare_machine(small.replace(**{"dropout": 0.1, **changes}))
    dataset = prepare_data(config, Progress())
    model = build_model(config, dataset)
    optimizer = build_optimizer(model, config)
    reported = [
        training_step(model, optimizer, config, dataset, step, 1e-3 / (step + 1), graph) for step in range(count)
    ]
    return reported, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_steps_are_the_same(small, clock, accumulation):
    """Each replay with its own tokens, learning rate and dropout, 100 times."""
    recorder = Recorder()
    graph = StepGraph(always=True, capture=recorder)
    reported, weights = run_of(small, graph, 103, accumulation=accumulation)
    want, same = run_of(small, None, 103, accumulation=accumulation)
    assert recorder.captures == 1 and recorder.replays == 100
    assert reported == want
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


@pytest.mark.parametrize(
    "always, seconds, chosen",
    [
        # The first step and the first replay are slow by nature.
        (False, [9, 0.2, 0.2, 9, 0.1, 0.1], True),
        (False, [0, 0.1, 0.1, 0.2, 0.2, 0], False),
        (True, [0, 0.1, 0.1, 0.2, 0.2, 0], True),
    ],
)
def test_the_faster_one_is_kept(small, clock, always, seconds, chosen):
    clock += seconds
    recorder = Recorder()
    graph = StepGraph(always=always, capture=recorder)
    run_of(small, graph, 5)
    assert graph.chosen is None
    run_of(small, graph, 4)
    assert graph.chosen is chosen
    assert recorder.replays == (6 if chosen else 3)
    assert graph.reason == (
        f"a step took {100 if not always and chosen else 200}.0 ms as a CUDA graph and "
        f"{200 if not always and chosen else 100}.0 ms without"
    )


def test_a_step_that_cannot_be_captured(small, clock):
    graph = StepGraph(always=False, capture=Recorder(fails=True))
    # Without dropout: this capture draws from the generator, as a real one does not.
    assert run_of(small, graph, 6, dropout=0.0)[0] == run_of(small, None, 6, dropout=0.0)[0]
    assert graph.chosen is False
    assert graph.reason == (
        "the step cannot be captured in a CUDA graph: operation not permitted when stream is capturing"
    )
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        run_of(small, StepGraph(always=True, capture=Recorder(fails=True)), 4)


def test_a_run_says_what_was_chosen(small, monkeypatch):
    said = []
    monkeypatch.setattr("fastlm.train.trainer.build_graph", lambda config: StepGraph(True, capture=Recorder()))
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    train(small.replace(steps=8, evaluations=2))
    assert len([text for text in said if "as a CUDA graph" in text]) == 1


def test_where_there_is_a_graph(small, monkeypatch):
    usable = True
    monkeypatch.setattr(
        steps, "backends", lambda op: [BackendStatus("native", usable, ""), BackendStatus("triton", True, "")]
    )
    assert build_graph(small.replace(device="cpu", cuda_graph="on")) is None
    assert build_graph(small.replace(device="cuda", cuda_graph="off")) is None
    assert build_graph(small.replace(device="cuda", cuda_graph="auto"))._always is False
    assert build_graph(small.replace(device="cuda", cuda_graph="on"))._always is True
    usable = False  # bits would differ from steps that are not captured
    assert build_graph(small.replace(device="cuda", cuda_graph="auto")) is None
    assert build_graph(small.replace(device="cuda", cuda_graph="on"))._always is True


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [320, 1 << 18])  # with the logits held, and without
def test_a_step_waits_for_no_gpu(small, precision, vocab_size):
    """On tensors that are nowhere: whatever asks for a number of theirs raises."""
    config = small.replace(precision=precision, accumulation=2, dropout=0.1, bias=True)
    with torch.device("meta"):
        model = GPT(config.model_config(vocab_size))
    optimizer = build_optimizer(model, config)
    for group in optimizer.param_groups:
        group["capturable"], group["lr"] = True, torch.empty((), device="meta")
    tokens = torch.zeros(2, 2, config.batch_size, config.block_size, dtype=torch.int64, device="meta")
    for _ in range(2):
        outcome = _work(model, optimizer, config, tokens)
    assert outcome.is_meta and outcome.shape == (2,)
    with pytest.raises(RuntimeError, match="meta"):
        outcome.tolist()


@pytest.mark.filterwarnings("ignore:Profiler record function")
@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
def test_a_step_compiles_whole(lr, monkeypatch):
    """Forward and backward as one graph, the optimizer as another; also where CUDA is in use."""
    found = []
    x, y = torch.arange(2 * 4 * 16).view(2, 4, 16) * 37 % 320
    for compiled in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=320, block_size=16, n_layer=1, n_head=2, n_embd=16, bias=True))
        rate = lr.clone() if isinstance(lr, torch.Tensor) else lr
        optimizer = fastlm.optim.AdamW(model.parameters(), rate, max_norm=1.0, capturable=True)
        forward, step = model, optimizer.step
        if compiled:
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
            forward, step = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (model, optimizer.step))
        for _ in range(3):
            forward(x, y)[1].backward()
            step()
            optimizer.zero_grad(set_to_none=True)
            if isinstance(rate, torch.Tensor):
                rate.mul_(0.5)
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
