"""The cases that a GPU is measured by, on the CPU and small: what they time, what they refuse, what they leave out."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import fastlm
from fastlm import _native
from fastlm.benchmarks import report
from fastlm.benchmarks.cases import _common, attention, attention_options
from fastlm.benchmarks.harness import BenchmarkError, Local, Row, measure

SHAPE = (1, 2, 70, 16)  # (B, H, T, D)
LIMITS = {"bfloat16": 1e11, "bandwidth": 1e10}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(attention, "GOALS", [goal._replace(shape=SHAPE) for goal in attention.GOALS[-3:]])
    monkeypatch.setattr(attention_options, "GOAL", (3, 4, 2, 50, 16))


def goals():
    return [*attention.goals("cpu"), *attention_options.goals("cpu")]


def test_goals_are_measured_and_what_is_not_here_is_missing_with_its_reason():
    for case in goals():
        host = Local(case)
        names, missing = host.names()
        rows = {row.variant: row for row in measure(case, {"system": host}, LIMITS, rounds=2, seconds=1e-4)}
        assert set(rows) == {*names, *missing} and not set(names) & set(missing)
        assert rows["fastlm"].target == case.target and 0 < rows["fastlm"].share < 1
        assert set(rows["fastlm"].ratios) == set(names) - {"fastlm"}
        if case.group == "attention":
            assert {"torch", "torch flash", "fastlm"} <= set(names)
            assert "No viable backend" in missing["torch cuDNN"]
            assert missing["fastlm sm90"] == "needs a GPU of compute capability 9.0"
            assert ("fastlm sm90 deterministic=False" in missing) == ("backward" in case.name)
    scores = 2 * 1 * 2 * 70 * 70 * 16
    assert [case.flops for case in goals()] == [scores, 2 * scores, 5 * scores / 2, 0]
    assert goals()[3].bytes == 2 * (2 * 3 * 2 * 50 * 16 + 2 * 3 * 4 * 16)


def test_only_a_gpu_has_goals():
    for group in (attention, attention_options):
        assert {case.name for case in group.goals("cpu")}.isdisjoint(case.name for case in group.cases("cpu", True))
        assert len(group.cases("cuda", True)) == len(group.cases("cpu", True)) + len(group.goals("cuda"))


@pytest.mark.parametrize("i", range(4))
def test_wrong_results_are_refused(monkeypatch, i):
    """One element among all is enough."""
    name = "attention_decode" if i == 3 else "attention"
    right = getattr(fastlm, name)

    def wrong(q, k, v, **options):
        v = v.view_as(v)
        o = right(q, k, v, **options)
        last = torch.zeros_like(o)
        last.view(-1)[-1] = 1
        if i != 2:
            return o + last
        v.register_hook(lambda dv: dv + last)  # of ours alone: the leaf is torch's too
        return o

    monkeypatch.setattr(fastlm, name, wrong)
    with pytest.raises(BenchmarkError, match=r"fastlm is not timed, since its (output|gradient 2) is off by"):
        Local(goals()[i])


def test_copies_outgrow_the_cache_and_take_turns(monkeypatch):
    inputs = [torch.randn(4, 8, requires_grad=True), torch.randn(8, 4).T]
    assert len(_common.copies_beyond_the_cache(inputs)) == 1
    monkeypatch.setattr(_common, "cache_bytes", lambda device: 600)
    copies = _common.copies_beyond_the_cache(inputs)
    assert len(copies) * 2 * 4 * 32 > 2 * 600 >= (len(copies) - 1) * 2 * 4 * 32
    assert len({x.data_ptr() for copy in copies for x in copy}) == 2 * len(copies)
    for a, b in copies:
        assert torch.equal(a, inputs[0]) and torch.equal(b, inputs[1])
        assert a.requires_grad and not b.requires_grad and b.stride() == inputs[1].stride()
    taken = []
    variant = _common.forward_in_turn(lambda a, b: taken.append(a.data_ptr()), copies)
    for _ in range(2 * len(copies)):
        variant.run()
    assert taken == 2 * [a.data_ptr() for a, _ in copies]
    backward = attention.backward_in_turn(lambda a, b: a * b, [[*copy, torch.ones(4, 8)] for copy in copies])
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward.run()


def test_goals_rotate(monkeypatch):
    monkeypatch.setattr(_common, "cache_bytes", lambda device: 20_000)
    for case in goals():
        rows = measure(case, {"system": Local(case)}, LIMITS, rounds=1, seconds=1e-4)
        assert all(row.missing or row.seconds > 0 for row in rows)


def test_the_family_of_kernels_is_set_around_the_runs_and_heard_from_the_module(monkeypatch):
    def forward(*_):
        return os.environ.get("FASTLM_CUDA_FAMILY", "sm80")

    module = SimpleNamespace(attention_forward=forward, attention_backward=lambda *_: "fp32")
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.delenv("FASTLM_CUDA_FAMILY", raising=False)
    run = lambda: module.attention_forward(1, 2)  # noqa: E731
    with attention.family("sm90"):
        assert attention.families_of(run) == {"sm90"}
    assert attention.families_of(run) == {"sm80"}
    assert attention.families_of(lambda: module.attention_backward(run())) == {"sm80", "fp32"}
    assert module.attention_forward is forward and "FASTLM_CUDA_FAMILY" not in os.environ
    monkeypatch.setenv("FASTLM_CUDA_FAMILY", "sm80")
    with attention.family("sm90"):
        pass
    assert os.environ["FASTLM_CUDA_FAMILY"] == "sm80"


@pytest.mark.parametrize("taken", ["sm90", "sm80"])
def test_hoppers_kernels_are_measured_where_the_module_takes_them(monkeypatch, taken):
    monkeypatch.setattr(attention, "need_capability_9", lambda device: None)
    monkeypatch.setattr(attention, "families_of", lambda run: (run(), {taken})[1])
    seen = set()
    right = fastlm.attention
    monkeypatch.setattr(
        fastlm, "attention", lambda *a, **k: (seen.add(os.environ.get("FASTLM_CUDA_FAMILY")), right(*a, **k))[1]
    )
    names, missing = Local(attention.goals("cpu")[0]).names()
    assert ("fastlm sm90" in names) == (taken == "sm90") and seen == {None, "sm90"}
    assert taken == "sm90" or missing["fastlm sm90"] == "fastlm._cuda took other kernels: sm80"


def test_kernels_that_are_not_proven_cost_nobody_else(monkeypatch):
    """Wrong ones are missing with their error, others are measured."""
    monkeypatch.setattr(attention, "need_capability_9", lambda device: None)
    monkeypatch.setattr(attention, "families_of", lambda run: (run(), {"sm90"})[1])
    right = fastlm.attention
    monkeypatch.setattr(
        fastlm, "attention", lambda *a, **k: right(*a, **k) * (2 if "FASTLM_CUDA_FAMILY" in os.environ else 1)
    )
    monkeypatch.delenv("FASTLM_CUDA_FAMILY", raising=False)
    names, missing = Local(attention.goals("cpu")[0]).names()
    assert {"torch", "fastlm"} <= set(names) and "fastlm sm90" not in names
    assert missing["fastlm sm90"].startswith("its output is off by")


def test_a_rate_in_a_unit_that_fits():
    row = partial(Row, "group", "case", "fastlm", "system", seconds=1e-3)
    assert report.rate(row(flops=5e11)) == "500 TFLOP/s"
    assert report.rate(row(flops=5e9)) == "5,000 GFLOP/s"
    cells = report._cells(row(quartiles=(1e-3, 1e-3), ratios={"torch": 1.2, "torch flash": 1.5, "torch cuDNN": 1.1}))
    assert cells[-1] == "±0 %, 1.50x torch flash, 1.10x torch cuDNN"
