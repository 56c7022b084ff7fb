"""The harness: what it refuses, what it measures, what it writes."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import time
from functools import partial

import pytest
import torch

import fastlm
from fastlm import _native
from fastlm.benchmarks import cases, command, main, measure_peak, report
from fastlm.benchmarks.cases import adam
from fastlm.benchmarks.cases._common import no_compiler
from fastlm.benchmarks.harness import (
    BenchmarkError,
    Built,
    Case,
    LoadMeter,
    Local,
    Row,
    Variant,
    as_json,
    describe_machine,
    measure,
    measure_limits,
    time_runs,
)
from fastlm.benchmarks.report import seconds
from fastlm.benchmarks.stock import StockGPT
from fastlm.models import GPT, GPTConfig


def taking(duration):
    """A variant whose every run takes exactly so long, on a busy machine too."""
    return Variant(lambda: None, seconds=lambda count: count * duration)


def test_ratio_and_share():
    case = Case("group", "case", lambda: Built({"torch": taking(0.004), "fastlm": taking(0.002)}), flops=1e6)
    rows = measure(case, {"system": Local(case)}, {"float32": 1e9, "bandwidth": 1e9}, rounds=5, seconds=0.01)
    stock, ours = rows
    assert (stock.variant, ours.variant) == ("torch", "fastlm")
    assert stock.ratio == 1
    assert ours.ratio == pytest.approx(2)
    assert ours.share == pytest.approx(0.5)  # 1 ms at the limit, 2 ms taken
    assert ours.quartiles == pytest.approx((0.002, 0.002))


def test_runs_are_timed():
    variant = Variant(lambda: time.sleep(0.01))
    assert time_runs(variant, 3, "cpu") >= 0.03


def test_processor_time_leaves_out_the_slices_of_others():
    variant = Variant(lambda: time.sleep(0.01), clock=time.thread_time)
    assert time_runs(variant, 10, "cpu") < 0.05


def test_a_wrong_result_is_refused():
    exact = torch.linspace(0, 1, 100, dtype=torch.float64)

    def built():
        right = Variant(lambda: None, lambda: {"y": exact.float()})
        wrong = Variant(lambda: None, lambda: {"y": exact.float() + 1e-4})
        return Built({"torch": right, "fastlm": wrong}, lambda: {"y": exact})

    with pytest.raises(BenchmarkError, match=r"fastlm is not timed, since its y is off by 0\.0001"):
        Local(Case("group", "case", built))


def test_a_result_that_is_not_a_number_is_refused():
    def built():
        y = Variant(lambda: None, lambda: {"y": torch.tensor([math.nan])})
        return Built(
            {"torch": Variant(lambda: None, lambda: {"y": torch.ones(1)}), "fastlm": y}, lambda: {"y": torch.ones(1)}
        )

    with pytest.raises(BenchmarkError, match="is off by nan"):
        Local(Case("group", "case", built))


def test_the_load_of_this_process_is_not_that_of_others():
    meter = LoadMeter()
    began = time.perf_counter()
    while time.perf_counter() - began < 0.3:
        pass
    busy, own = (now - then for now, then in zip(meter._read()[1:], meter._began[1:], strict=True))
    assert own > 0.05
    assert math.isnan(busy) or busy >= own - 0.05  # /proc counts in hundredths of a second


def test_the_load_of_others_is_what_is_left_of_the_cores_at_work(monkeypatch):
    """Seconds of the clock, of all cores at work, of our own."""
    readings = iter([(100.0, 50.0, 7.0), (110.0, 80.0, 12.0), (104.0, 50.5, 8.0), (104.0, math.nan, 8.0)])
    monkeypatch.setattr(LoadMeter, "_read", staticmethod(lambda: next(readings)))
    monkeypatch.setattr(os, "getloadavg", lambda: (torch.get_num_threads() + 1.5, 0.0, 0.0))
    meter = LoadMeter()
    assert meter.others() == pytest.approx((30 - 5) / 10)
    assert meter.others() == 0  # /proc counts in hundredths of a second, our own clock is finer
    assert meter.others() == pytest.approx(1.5)  # without /proc


def test_cases_count_their_work():
    """Against what the model counts, and by hand."""
    for case in cases.cases("train", "cpu", quick=True):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, block_size=128, vocab_size=256))
        assert case.items == 4 * 128
        assert case.flops == 3 * model.flops_per_token() * case.items  # the backward pass: two products for each one
    for case in cases.cases("attention", "cpu", quick=True):
        scores, size = 2 * 4 * 256 * 256, {"float32": 4, "bfloat16": 2}[case.dtype]
        forward = case.name.endswith("forward")
        products = 2 if forward else 2 + 5  # q k, p v; then q k once more, do v, and one for each of dv, dq, dk
        assert case.flops == products * scores * 64  # a multiplication and an addition each, under the mask half of it
        tensors = 4 if forward else 4 + 8  # q k v -> o; q k v o do -> dq dk dv
        assert case.bytes == tensors * 2 * 4 * 256 * 64 * size
    plain, clipping, many, eight_bit, masters, sgd = cases.cases("adam", "cpu", quick=True)
    weights = 1024 * 256 + 2 * (12 * 256 * 256 + 9 * 256)
    assert plain.bytes == weights * 4 * (4 + 3)  # weight, gradient, two moments -> all but the gradient
    assert clipping.bytes == plain.bytes + weights * 4
    assert many.bytes == 20 * 1000 * 28 and sgd.bytes == weights * 4 * (3 + 2)
    assert eight_bit.bytes == weights * (4 * (2 + 1) + (1 + 4 / 256) * (2 + 2))  # and a scale for 256 of each moment
    assert masters.bytes == weights * (2 * (1 + 1) + 4 * (3 + 3))  # gradient -> weight; master and moments


def test_limits_are_positive_and_a_bad_dtype_is_named():
    limits = measure_limits("cpu")
    assert set(limits) == {"float32", "bfloat16", "bandwidth"}
    assert min(limits["float32"], limits["bandwidth"]) > 1e8
    assert min(limits["bfloat16"], measure_peak(torch.bfloat16, threads=1)) > 1e7
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got int8"):
        measure_peak("int8")


@pytest.mark.skipif(_native.cpu is None, reason="fastlm._cpu was not built")
def test_probes_do_what_they_count():
    a, b = torch.full((1000,), 4.0), torch.full((1000,), 1.0)
    assert _native.cpu.run_update(a, b, 2) == 12 * 1000
    assert torch.equal(a, torch.full((1000,), 3.0))
    assert _native.cpu.run_read(a, 2) == 4 * 1000
    assert _native.cpu.run_products("float32", 10, 2) == 2 * _native.cpu.run_products("float32", 10, 1) > 0
    with pytest.raises(ValueError, match="contiguous float32"):
        _native.cpu.run_update(a.double(), b, 1)


@pytest.mark.parametrize("act", ["relu", "relu_squared", "gelu"])
def test_stock_model_is_the_same_function(act):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, act=act, bias=True)
    torch.manual_seed(0)
    ours, stock = GPT(config), StockGPT(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(std=0.3)
    stock.load_state_dict(ours.state_dict())
    idx = torch.randint(11, (3, 12))
    torch.testing.assert_close(ours(idx, idx.roll(-1))[1], stock(idx, idx.roll(-1))[1])


@pytest.mark.parametrize("group", [g for g in cases.GROUPS if g != "import_time"])
def test_quick_cases_are_right(group):
    """Each passes the gate: the variants do the same work."""
    for case in cases.cases(group, "cpu", quick=True):
        local = Local(case)
        assert {"torch", "fastlm"} <= set(local.names()[0])
        assert case.flops or case.bytes or group in ("dispatch", "small")


def test_states_are_measured_beside_their_time():
    """In bytes a parameter; the weights of one dimension, which are small, have fp32 states."""
    eight_bit, masters = cases.cases("adam", "cpu", quick=True)[3:5]
    remarks = {}
    for case in (eight_bit, masters):
        rows = measure(case, {"system": Local(case)}, {"bandwidth": 1e10}, rounds=1, seconds=1e-5)
        remarks[case] = {row.variant: row.remark for row in rows}
        assert all(row.remark in report._cells(row)[-1] for row in rows)
    sizes = [torch.Size(size).numel() for size in adam.shapes(2, 256, 1024)]
    packed = sum(2 * (n + n // 64 if n >= 4096 else 4 * n) for n in sizes) / sum(sizes)
    assert remarks[masters] == {"torch": "16.00 bytes a parameter", "fastlm": "12.00 bytes a parameter"}
    assert remarks[eight_bit].pop("fastlm") == f"{packed:.2f} bytes a parameter"
    assert set(remarks[eight_bit].values()) == {"8.00 bytes a parameter"}


COMPILED = {
    "relu": ("relu_squared", torch.float32, (8, 16), "cpu"),
    "bias_act": ("relu", torch.bfloat16, (8, 16), "cpu"),
    "attention": ((1, 2, 16, 8), torch.float32, "cpu"),
    "adam": ([(5, 3)], True, "cpu"),
    "train": (GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11), 2, torch.float32, "cpu"),
}


@pytest.mark.skipif(no_compiler(quick=False) is not None, reason="no torch.compile here")
@pytest.mark.parametrize("group", COMPILED)
def test_full_cases_have_torch_compile(group, monkeypatch):
    """With the backend that compiles nothing: how each is made, without a minute of C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    build = importlib.import_module(f"fastlm.benchmarks.cases.{group}").build
    local = Local(Case(group, "tiny", partial(build, *COMPILED[group], quick=False)))
    assert {"torch", "torch.compile", "fastlm"} <= set(local.names()[0])
    assert local.time("torch.compile", 2) > 0


@pytest.fixture
def known_limits(monkeypatch):
    """Measuring them takes longer than all else, and has a test of its own."""
    limits = {"float32": 1e11, "bfloat16": 1e11, "bandwidth": 1e10}
    monkeypatch.setattr(command, "measure_limits", lambda device: limits)
    return limits


def test_command_writes_json_and_a_picture(tmp_path, capsys, known_limits):
    pytest.importorskip("matplotlib")
    assert main(["dispatch", "--quick", "--rounds", "2", "--out", str(tmp_path / "new")]) == 0
    kept = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert {"machine", "limits", "rows"} == set(kept)
    assert kept["machine"]["command"].startswith("fastlm bench dispatch --quick")
    assert kept["limits"] == known_limits
    assert all(row["seconds"] > 0 for row in kept["rows"])
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "fastlm.relu, no gradient wanted" in printed
    assert "(target 1.7 µs)" in printed


def test_command_runs_both_allocators(tmp_path, monkeypatch, known_limits):
    monkeypatch.setattr(command, "cases", lambda *which: cases.cases(*which)[:1])  # each is two processes
    assert main(["relu", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["allocator"] for row in rows} == {"system", "kept"}


def test_match_chooses_cases_and_each_is_kept_when_it_is_done(tmp_path, monkeypatch, known_limits):
    measured = []

    def measure(found, *_):
        if measured:  # the one before is in the file already
            rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
            assert [row["case"] for row in rows] == measured
        measured.append(found.name)
        return [Row(found.group, found.name, "torch", "system", 1.0)]

    monkeypatch.setattr(command, "_measure", measure)
    assert main(["attention", "--match", "fp32", "--out", str(tmp_path)]) == 0
    every = [found.name for found in cases.cases("attention", "cpu", False)]
    assert measured == [name for name in every if "fp32" in name] and len(measured) < len(every)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["norms"], "CASE must be one of .*dispatch.*, got norms"),
        (["--match", "fp8"], "--match: no case has 'fp8' in its name; one is "),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--out", __file__ + "/new"], "--out: cannot write to .*new: Not a directory"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_limits", lambda device: pytest.fail("measured first"))
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_result_that_could_not_be_finished_leaves_the_old_one(tmp_path):
    (tmp_path / "bench.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), command._whole(tmp_path / "bench.json") as path:
        path.write_text("ne")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("bench.json", "old")]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout_around(tmp_path, monkeypatch):
    monkeypatch.setattr(fastlm, "__file__", str(tmp_path / "installed" / "fastlm" / "__init__.py"))
    checkout, venv = tmp_path / "checkout", tmp_path / "checkout" / ".venv" / "bin"
    (checkout / "csrc").mkdir(parents=True), venv.mkdir(parents=True)
    (checkout / "csrc" / "cpu_module.cpp").touch()
    monkeypatch.chdir(venv)
    assert describe_machine("cpu", "")["commit"] is None  # no repository
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in (["init", "-q"], ["add", "csrc"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    assert describe_machine("cpu", "")["commit"] == head[:12]
    monkeypatch.chdir(tmp_path)
    assert describe_machine("cpu", "")["commit"] is None


def test_json_has_no_nan():
    case = Case("group", "case", lambda: Built({"torch": taking(0.1)}, missing={"fastlm": "gone"}), compare=False)
    rows = measure(case, {"system": Local(case)}, {}, rounds=1, seconds=0.001)
    assert "NaN" not in json.dumps(as_json(rows, {}, {}))
    assert rows[1].missing == "gone"


@pytest.mark.parametrize(("value", "text"), [(1.5, "1.5 s"), (0.25, "250 ms"), (2.5e-6, "2.5 µs"), (3e-8, "30 ns")])
def test_seconds_in_a_readable_unit(value, text):
    assert seconds(value) == text


def test_full_runs_ask_for_a_compiler():
    assert no_compiler(quick=True) == "left out of quick runs"
    assert no_compiler(quick=False) in (
        None, "torch.compile does not support this Python", "torch.compile needs a C++ compiler"
    )  # fmt: skip
