"""What is said before a run: its memory, its length."""

import json
import math
import subprocess
import sys

import pytest
import torch

from fastlm.models import GPT
from fastlm.train import PRESETS, Evaluation, Progress, plan, train
from fastlm.train.config import has_fast_bf16, prepare_machine
from fastlm.train.plan import _LiveBytes, estimate
from fastlm.train.rundir import prepare_data
from fastlm.train.step import build_model

# Trains a few steps in a process of its own and prints the growth of its resident memory and the estimate. A step of a
# model of a few kilobytes comes first: it loads the code, which is no part of what a run takes.
MEASURE = """
import sys; sys.path[:] = sys.argv[2:]
import json
from pathlib import Path
from fastlm.train import Progress, TrainConfig
from fastlm.train.config import prepare_machine
from fastlm.train.plan import estimate
from fastlm.train.rundir import prepare_data
from fastlm.train.step import build_model, build_optimizer, padded_vocab_size, training_step

def resident(which):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(which))
    return int(line.split()[1]) * 1024

config = prepare_machine(TrainConfig.from_dict(json.loads(sys.argv[1])))
dataset = prepare_data(config, Progress())
expected = estimate(config, padded_vocab_size(dataset.tokenizer.vocab_size)).memory
for c in (config.replace(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=1), config):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    model = build_model(c, dataset)
    optimizer = build_optimizer(model, c)
    for step in range(3):
        training_step(model, optimizer, c, dataset, step, 1e-3)
    took = resident("VmHWM") - before
    del model, optimizer
print(json.dumps([expected, took]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("preset", "precision", "keep_memory"),
    [
        ("tiny", "fp32", True),
        ("tiny", "fp32", False),
        ("tiny", "bf16", True),
        ("small", "fp32", True),
        ("small", "bf16", True),
    ],
)
def test_the_memory_estimate_is_within_15_percent(preset, precision, keep_memory, corpus, tmp_path):
    # small is measured in half its rows and a quarter of its depth: the whole takes minutes.
    fewer = {"n_layer": 2, "batch_size": 8, "vocab_size": 2048} if preset == "small" else {}
    fewer |= {"device": "cpu", "precision": precision, "keep_memory": keep_memory}
    config = PRESETS[preset].replace(data=str(corpus), out=str(tmp_path), **fewer)
    command = [sys.executable, "-c", MEASURE, json.dumps(config.to_dict()), *sys.path]
    expected, took = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert expected == pytest.approx(took, rel=0.15), f"{expected >> 20} MiB expected, {took >> 20} MiB taken"


def test_live_bytes_count_what_is_alive():
    with _LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[10:]
        b = torch.ones(500)
        del b
        c = torch.ones(100)
    assert (live.live, live.peak) == (4400, 6000)
    del a
    assert live.live == 4400  # the view holds the storage
    del view, c
    assert live.live == 0


def test_estimate_counts_the_model(small):
    config = prepare_machine(small)
    counted, model = estimate(config, 320), GPT(config.model_config(320))
    assert counted.parameters == model.num_parameters()
    assert counted.flops_per_token == 3 * model.flops_per_token()
    assert counted.flops_per_step == counted.flops_per_token * 4 * 16
    wider, longer = estimate(config.replace(batch_size=8), 320), estimate(config.replace(accumulation=2), 320)
    assert wider.memory > counted.memory == longer.memory
    assert longer.flops_per_step == 2 * counted.flops_per_step


def test_a_heap_that_is_not_glibcs_holds_little_beside_the_tensors(small, monkeypatch):
    ours = estimate(prepare_machine(small), 320).memory
    monkeypatch.setattr("fastlm.train.plan.on_glibc", lambda: False)
    assert estimate(prepare_machine(small), 320).memory < 1.1 / 1.4 * ours


@pytest.mark.parametrize("spent", [0.0, 10.0])
def test_a_time_limit_holds_if_the_steps_become_slower(small, tmp_path, monkeypatch, spent):
    """On a clock that steps and evaluations alone move on, 0.05 s a step and 0.1 ms a token."""
    now, rate = 0.0, 0.05

    def step(*_):
        nonlocal now
        now += rate

    def measure(model, config, tokens, text_bytes, limit=None):
        nonlocal now
        done = min(limit or len(tokens), len(tokens))
        now += done * 1e-4
        return Evaluation(1.0, 1.0, done)

    monkeypatch.setattr(plan, "training_step", step)
    monkeypatch.setattr(plan, "evaluate", measure)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now)
    config = prepare_machine(small.replace(minutes=1.0))
    dataset = prepare_data(config, Progress())
    config = plan.plan_steps(config, dataset, spent)
    for slower, fits in ((1.0, True), (1.08, True), (1.2, False)):
        rest = config.steps * rate * slower
        rest += (config.evaluations * config.evaluation_tokens + len(dataset.val)) * 1e-4 + 4
        assert (spent + now + rest < 60) == fits, slower


def test_evaluations_leave_the_time_to_the_steps(small, tmp_path, monkeypatch):
    """A token takes 0.1 s here: one of the wanted evaluations alone would take half the time."""
    now = 0.0

    def measure(model, config, tokens, text_bytes, limit=None):
        nonlocal now
        done = min(limit or len(tokens), len(tokens), 10)
        now += done * 0.1
        return Evaluation(1.0, 1.0, done)

    def step(*_):
        nonlocal now
        now += 0.05

    monkeypatch.setattr(plan, "training_step", step)
    monkeypatch.setattr(plan, "evaluate", measure)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now)
    config = prepare_machine(small.replace(minutes=20.0, evaluations=50, evaluation_tokens=256))
    dataset = prepare_data(config, Progress())
    planned = plan.plan_steps(config, dataset, 0.0)
    left = 20 * 60 - len(dataset.val) * 0.1
    assert 1 <= planned.evaluations < 50
    assert planned.evaluations * 25.6 <= max(25.6, 0.16 * left) and planned.steps * 0.05 > 0.7 * left


@pytest.mark.parametrize(("tokens_per_parameter", "heads"), [(1.1, 4), (0.9, 3), (0.6, 2), (0.001, 1)])
def test_a_slow_machine_gets_a_narrower_model(small, monkeypatch, tokens_per_parameter, heads):
    """On a clock on which every width gets as many steps, enough for `tokens_per_parameter` of the widest."""
    wide = small.replace(n_head=4, n_embd=64, minutes=1.0, fit_width=True)
    dataset = prepare_data(prepare_machine(wide), Progress())
    sizes = {n: build_model(wide.replace(n_head=n, n_embd=16 * n), dataset).num_parameters() for n in range(1, 5)}
    steps = tokens_per_parameter * sizes[4] / wide.tokens_per_step
    now = 0.0

    def step(*_):
        nonlocal now
        now += 60 / steps

    monkeypatch.setattr(plan, "_TOKENS_PER_PARAMETER", 1.0)
    monkeypatch.setattr(plan, "training_step", step)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now)
    got = plan._fit_width(wide, dataset, 60.0)
    assert (got.n_head, got.n_embd) == (heads, 16 * heads)
    assert heads == max((n for n, size in sizes.items() if tokens_per_parameter * sizes[4] >= size), default=1)
    assert got == wide.replace(n_head=got.n_head, n_embd=got.n_embd)


def test_a_fitted_width_is_said_and_recorded(small, hook, monkeypatch):
    monkeypatch.setattr(plan, "_TOKENS_PER_PARAMETER", math.inf)
    said = hook()
    result = train(small.replace(minutes=0.2, fit_width=True), said)
    assert "; 8 wide instead of 16, which learns more in that time on this machine" in "".join(said.lines)
    assert json.loads((result.out / "config.json").read_text())["config"]["n_embd"] == 8
    with pytest.raises(ValueError, match="--fit-width goes with --minutes"):
        small.replace(fit_width=True)


def test_precision_follows_the_machine_unless_given(small, monkeypatch):
    fast = has_fast_bf16("cpu")
    assert prepare_machine(small.replace(precision="auto")).precision == ("bf16" if fast else "fp32")
    assert prepare_machine(small.replace(precision="bf16")).precision == "bf16"
    for flags, expected in [("fpu avx512f", False), ("fpu avx512_bf16 sse", True), ("amx_bf16", True), ("", False)]:
        monkeypatch.setattr("pathlib.Path.read_text", lambda *_, f=flags: f"processor : 0\nflags\t\t: {f}\n")
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        assert has_fast_bf16("cpu") is expected, flags
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: "processor : 0\nFeatures\t: fp asimd bf16\n")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert has_fast_bf16("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(small):
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA GPU on this machine"):
        prepare_machine(small.replace(device="cuda"))
