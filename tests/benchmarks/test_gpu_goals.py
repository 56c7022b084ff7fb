"""The cases that show what memory-bound ops and layers are to reach on a GPU: on the CPU and small."""

import contextlib
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastlm
from fastlm.benchmarks import harness, report
from fastlm.benchmarks.cases import (
    _common,
    adam,
    bias_act,
    cross_entropy,
    embedding,
    glu,
    linear_act,
    norm,
    relu,
    rope,
    train,
)
from fastlm.benchmarks.harness import BenchmarkError, Built, Case, Local, Row, Variant, measure

MATRIX = (40, 24)
# Module -> what its goals take in place of their own sizes.
SMALL = {
    relu: [MATRIX], bias_act: [MATRIX], glu: [MATRIX], norm: [MATRIX], rope: [(2, 5, 3, 8)], embedding: [(50, 30, 8)],
    cross_entropy: [MATRIX, (30, 8, 20), "fp32"], linear_act: [(30, 8, 20), "fp32"], adam: [[(20, 8)] * 3],
}  # fmt: skip
LIMITS = {"float32": 1e12, "bfloat16": 1e12, "bandwidth": 1e12}


def goals(module) -> list[Case]:
    return module.goals("cpu", True, *SMALL[module])


@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__.rpartition(".")[2])
def test_goals_are_right_and_measured(module):
    for case in goals(module):
        host = Local(case)
        rows = {row.variant: row for row in measure(case, {"system": host}, LIMITS, rounds=1, seconds=1e-5)}
        ours = rows["fastlm"]
        assert ours.target == case.target != "" and ours.share > 0 and math.isnan(ours.memory)
        assert "torch.compile" not in rows or rows["torch.compile"].missing == "left out of quick runs"
        assert "Liger" not in rows or rows["Liger"].missing == "liger-kernel is not installed"
        for name in ("three products", "four products"):
            assert (name in case.target) == (name in rows)
            assert name not in rows or f"{ours.ratios[name]:.2f}x {name}" in report._cells(ours)[-1]


@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__.rpartition(".")[2])
def test_only_a_gpu_has_goals(module):
    for quick in (True, False):
        here, there = ({case.name for case in module.cases(device, quick)} for device in ("cpu", "cuda"))
        assert there - here == {case.name for case in module.goals("cuda", quick)}


def test_goals_are_as_large_as_they_say():
    """Each memory-bound tensor at least 256 MiB."""
    for module in (relu, bias_act, glu, norm):
        assert all(case.bytes >= 5 * 2**28 and "90 %" in case.target for case in module.goals("cuda", True))
    assert all(case.bytes >= 4 * 2**28 and "90 %" in case.target for case in rope.goals("cuda", True))
    logits, linear = cross_entropy.goals("cuda", True)
    assert logits.bytes == 3 * 2 * 16384 * 50304 and "85 %" in logits.target
    assert linear.flops == 3 * 2 * 16384 * 4096 * 131072 and "3.96 GB" in linear.target
    assert embedding.goals("cuda", True)[0].bytes >= 2 * 131072 * 4096
    assert [case.bytes for case in adam.goals("cuda", True)] == [28 * 300 * 5120 * 1024, 32 * 300 * 5120 * 1024]
    steps = [case for case in train.cases("cuda", False) if case.target]
    names = [f"12 layers of 768, vocabulary 50304, ({rows}, 1024) tokens, bf16" for rows in (16, 32)]
    assert [case.name for case in steps] == names  # the better one counts


def test_a_captured_run_is_recorded_once_and_replayed(monkeypatch):
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    run = train.captured(lambda: done.append("run"))
    for _ in range(6):
        run()
    assert done == ["run"] * 4 + ["replay"] * 3


def test_a_wrong_gradient_of_the_linear_loss_is_refused(monkeypatch):
    right = fastlm.linear_cross_entropy

    def wrong(x, weight, target):
        weight = weight.view_as(weight)
        weight.register_hook(lambda g: g * 1.01)
        return right(x, weight, target)

    monkeypatch.setattr(fastlm, "linear_cross_entropy", wrong)
    with pytest.raises(BenchmarkError, match="fastlm is not timed, since its gradient 1 is off by"):
        Local(goals(cross_entropy)[1])


def test_liger_where_it_is_installed(monkeypatch):
    class Loss:
        def __call__(self, weight, x, target):
            return torch.nn.functional.cross_entropy(x @ weight.t(), target)

    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    there = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Loss)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", there)
    case = goals(cross_entropy)[1]
    rows = {row.variant: row for row in measure(case, {"system": Local(case)}, LIMITS, rounds=1, seconds=1e-5)}
    assert (
        rows["Liger"].seconds > 0
        and f"{rows['fastlm'].ratios['Liger']:.2f}x Liger" in report._cells(rows["fastlm"])[-1]
    )


def test_bare_products():
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    built = Built({})
    _common.add_bare_products(built, x, weight, {"three": 1, "four": 2})
    for variant in built.variants.values():
        dx, dweight = variant.run()
        y = x @ weight.T
        torch.testing.assert_close([dx, dweight], [y @ weight, y.T @ x])


def test_products_that_an_older_torch_cannot_do_are_missing(monkeypatch):
    monkeypatch.setattr(_common, "hasattr", lambda *_: False, raising=False)
    built = Built({})
    _common.add_bare_products(built, torch.zeros(2, 2).half(), torch.zeros(2, 2).half(), {"three": 1})
    assert not built.variants and "torch 2.8" in built.missing["three"]


def test_many_values_are_drawn_where_they_stay():
    with pytest.raises(RuntimeError):  # where no generator is
        _common.leaf((4096, 4097), torch.float32, "meta", 0)
    assert _common.leaf((4096, 4096), torch.float32, "meta", 0).is_meta


def test_memory_is_what_a_run_holds_at_most(monkeypatch):
    """Besides what is there before; told beside the time."""
    held = iter([100, 5_000_000_100])
    for name, value in {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(held),
        "max_memory_allocated": lambda: next(held),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    ran = []
    assert harness.peak_memory(Variant(lambda: ran.append(1)), "cuda") == 5e9 and ran == [1]
    assert math.isnan(harness.peak_memory(Variant(lambda: None), "cpu"))
    row = Row("group", "case", "torch", "system", seconds=1e-3, quartiles=(1e-3, 1e-3), memory=5e9)
    assert report._cells(row)[-1] == "±0 %, 5.00 GB"
