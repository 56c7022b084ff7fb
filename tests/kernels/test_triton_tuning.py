"""The choice among configurations, with times that are made up; and that attention runs with what was chosen."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from test_attention_triton import ALL, gradients, options
from triton_testing import DEVICE, HALVES, assert_close, randn

from fastlm.kernels.triton import _tuning
from fastlm.kernels.triton import attention as kernels

LIST = [{"BT": 64, "num_warps": 8}, {"BT": 32, "num_warps": 4}, {"BT": 16, "num_warps": 2}]
KEY = ("fwd", "torch.float16", 64)


@pytest.fixture(autouse=True)
def gpu_of_nobody(monkeypatch):
    """A torch without CUDA cannot say whether it captures."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class Clock:
    """`Choices` whose calls take as long as `times` says by BT; an exception there is raised. Counts what it times."""

    def __init__(self, path, times):
        self.times, self.ran = times, []
        self.choices = _tuning.Choices(path, lambda call: call())

    def run(self, configuration):
        self.ran.append(configuration["BT"])
        found = self.times[configuration["BT"]]
        if isinstance(found, Exception):
            raise found
        return found

    def take(self, key=KEY, candidates=LIST):
        return self.choices.take(key, candidates, self.run)["BT"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "triton" / "gpu.json"


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({64: 3.0, 32: 2.0, 16: 2.5}, 32),
        ({64: 1.0, 32: 2.0, 16: 2.5}, 64),
        ({64: 2.05, 32: 2.0, 16: 2.5}, 64),  # within what two measurements differ by
        ({64: 2.1, 32: 2.0, 16: 1.99}, 16),
        ({64: 3.0, 32: RuntimeError("too much shared memory"), 16: 2.5}, 16),
        ({64: RuntimeError("too much shared memory"), 32: 2.0, 16: 1.99}, 16),
    ],
)
def test_the_fastest_that_works(file, times, best):
    clock = Clock(file, times)
    assert clock.take() == best
    assert clock.ran == [64, 32, 16]
    assert list(json.loads(file.read_text()).values()) == [c for c in LIST if c["BT"] == best]


def test_nothing_works(file):
    clock = Clock(file, {64: KeyError("first"), 32: ValueError("second"), 16: ValueError("third")})
    with pytest.raises(KeyError, match="first"):
        clock.take()
    assert not file.exists() and not clock.choices.taken


def test_no_memory_to_measure_with(file):
    clock = Clock(file, {64: 1.0, 32: torch.OutOfMemoryError("caches"), 16: 0.5})
    assert clock.take() == 64
    assert not file.exists()


def test_a_choice_stays(file):
    clock = Clock(file, {64: 3.0, 32: 2.0, 16: 2.5})
    assert clock.take() == 32
    clock.times = {64: 1.0, 32: 2.0, 16: 2.5}
    file.unlink()
    assert [clock.take() for _ in range(3)] == [32] * 3 and len(clock.ran) == 3
    assert clock.take((*KEY, "another")) == 64


def test_remembered_by_the_next_process(file):
    Clock(file, {64: 3.0, 32: 2.0, 16: 2.5}).take()
    clock = Clock(file, {})
    assert clock.take() == 32 and not clock.ran
    code = (
        "import pathlib, sys; from fastlm.kernels.triton._tuning import Choices\n"
        f"print(Choices(pathlib.Path(sys.argv[1]), None).take({KEY!r}, {LIST!r}, None))"
    )
    printed = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(LIST[1])


def test_two_that_write(file):
    """Each has looked into the file before the other wrote."""
    first, second = (Clock(file, {64: 3.0, 32: 2.0, 16: 2.5}) for _ in range(2))
    first.take(("a",))
    inner = Clock(file, {64: 1.0, 32: 2.0, 16: 2.5})
    second.choices._time = lambda call: (inner.take(("b",)), call())[1]
    second.take(("c",))
    assert {name: c["BT"] for name, c in json.loads(file.read_text()).items()} == {
        "('a',)": 32, "('b',)": 64, "('c',)": 32
    }  # fmt: skip
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("entry", [{"BT": 48, "num_warps": 8}, {"BT": 64}, [64], "64", None, {"BT": [], "x": {}}])
def test_what_is_not_in_the_list(file, entry):
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({repr(KEY): entry, "other": 1}))
    assert Clock(file, {64: 3.0, 32: 2.0, 16: 2.5}).take() == 32
    assert json.loads(file.read_text()) == {repr(KEY): LIST[1], "other": 1}


@pytest.mark.parametrize("text", [b"", b'{"a": ', b"[1]", b"\xff\xfe", b"3", b"[" * 100_000])
def test_a_broken_file(file, text):
    file.parent.mkdir(parents=True)
    file.write_bytes(text)
    clock = Clock(file, {64: 3.0, 32: 2.0, 16: 2.5})
    with pytest.warns(RuntimeWarning, match="Triton configurations cannot be read in .*gpu.json: ") as warned:
        assert clock.take() == 32
    assert len(warned) == 1
    assert json.loads(file.read_text()) == {repr(KEY): LIST[1]}


def test_nowhere_to_write(file):
    file.parent.parent.write_text("a file where the directory should be")
    clock = Clock(file, {64: 3.0, 32: 2.0, 16: 2.5})
    with pytest.warns(RuntimeWarning, match="Triton configurations cannot be ") as warned:
        assert clock.take() == 32 and clock.take(("b",)) == 32
    assert len(warned) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("call", range(1, 10))
def test_a_full_disk(file, full_disk, call):
    clock = Clock(file, {64: 3.0, 32: 2.0, 16: 2.5})
    full_disk.fail_at = call
    assert clock.take() == 32
    assert file.exists() == (full_disk.count < call)
    assert not list(file.parent.glob("*.tmp"))


def test_no_file_at_all():
    assert Clock(None, {64: 3.0, 32: 2.0, 16: 2.5}).take() == 32


def test_nothing_is_measured_while_a_graph_is_captured(file, monkeypatch):
    """The default, which stays in this process; what was remembered before, where there is something."""
    Clock(file, {64: 3.0, 32: 2.0, 16: 2.5}).take(("remembered",))
    clock = Clock(file, {64: 3.0, 32: 2.0, 16: 2.5})
    assert clock.take(("earlier",)) == 32
    clock.ran.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert [clock.take((name,)) for name in ("remembered", "earlier", "new")] == [32, 32, 64]
    assert clock.take(("new",)) == 64
    assert not clock.ran and "('new',)" not in json.loads(file.read_text())


CUDA = torch.device("cuda:0")


@pytest.fixture
def clock(file, monkeypatch):
    """What `pick` takes on a GPU that is none."""
    clock = Clock(file, {64: 3.0, 32: 2.0, 16: 2.5})
    monkeypatch.setattr(_tuning, "INTERPRETED", False)
    monkeypatch.setattr(_tuning, "_choices_of", lambda index: clock.choices)
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    monkeypatch.delenv("FASTLM_TRITON_TUNE", raising=False)
    return clock


def test_pick(clock, monkeypatch):
    assert _tuning.pick(KEY, LIST[:1], clock.run, CUDA) == LIST[0]
    assert _tuning.pick(KEY, LIST, clock.run, torch.device("cpu")) == LIST[0]
    with monkeypatch.context() as patch:
        patch.setattr(_tuning, "INTERPRETED", True)
        assert _tuning.pick(KEY, LIST, clock.run, CUDA) == LIST[0]
    monkeypatch.setenv("FASTLM_TRITON_TUNE", "0")
    assert _tuning.pick(KEY, LIST, clock.run, CUDA) == LIST[0]
    assert not clock.ran
    monkeypatch.setenv("FASTLM_TRITON_TUNE", "1")
    assert [_tuning.pick(KEY, LIST, clock.run, CUDA) for _ in range(2)] == [LIST[1]] * 2
    assert clock.ran == [64, 32, 16]
    with monkeypatch.context() as patch:  # bits must not depend on what was measured
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert _tuning.pick(KEY, LIST, clock.run, CUDA) == LIST[0]
    monkeypatch.setenv("FASTLM_TRITON_TUNE", "0")
    assert _tuning.pick(KEY, LIST, clock.run, CUDA) == LIST[0]


def test_where_choices_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "FASTLM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert _tuning._cache_directory() == tmp_path / ".cache" / "fastlm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _tuning._cache_directory() == tmp_path / "xdg" / "fastlm"
    monkeypatch.setenv("FASTLM_CACHE_DIR", str(tmp_path / "own"))
    assert _tuning._cache_directory() == tmp_path / "own"
    names = {
        _tuning._file_name(device, capability)
        for device, capability in (("NVIDIA H100/80GB", (9, 0)), ("NVIDIA H100/80GB", (9, 1)), ("NVIDIA A100", (8, 0)))
    }
    assert len(names) == 3 and not any("/" in name or " " in name for name in names)


def test_sizes_of_keys():
    assert [_tuning.bucket(n, 4096) for n in (0, 1, 2, 3, 1000, 1024, 1025, 4096, 10**9)] == [
        0, 1, 2, 4, 1024, 1024, 2048, 4096, 4096
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("D", [16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, HALVES[0]])
def test_attention_runs_with_what_was_picked(dtype, D, number, monkeypatch):
    """And is right with every configuration there is."""
    picked, launched = {}, []

    def pick(key, candidates, run, device):
        picked[key[0]] = candidates[number % len(candidates)]
        return picked[key[0]]

    def launch(kernel, *args, **constants):
        launched.append((kernel, constants))
        return kernels_launch(kernel, *args, **constants)

    kernels_launch = kernels.launch
    monkeypatch.setattr(kernels, "pick", pick)
    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "_TOO_SMALL_TO_TUNE", 0)
    q, k, v = randn(1, 2, 70, D, dtype=dtype), randn(1, 1, 131, D, dtype=dtype), randn(1, 1, 131, D, dtype=dtype)
    do, dlse, kwargs = randn(1, 2, 70, D, dtype=dtype), randn(1, 2, 70), {"causal": 1, "scale": D**-0.5}
    want = gradients(q, k, v, do, dlse, torch.float64, **kwargs)
    stock = gradients(q, k, v, do, dlse, dtype, **kwargs)
    o, lse = kernels.attention(q, k, v, *options(**kwargs))
    got = (o, lse, *kernels.attention_backward(do, dlse, q, k, v, o, lse, *options(**kwargs), ALL)[:3])
    for mine, exact, plain in zip(got, want, stock, strict=True):
        assert_close(mine, exact, stock=plain, factor=3, ulps=16)
    names = {
        "fwd": kernels.attention_fwd_kernel,
        "dkdv": kernels.attention_bwd_dkdv_kernel,
        "dq": kernels.attention_bwd_dq_kernel,
    }
    assert picked.keys() == names.keys()
    for kernel, configuration in picked.items():
        (constants,) = [constants for launched_kernel, constants in launched if launched_kernel is names[kernel]]
        assert constants.items() >= configuration.items()


def test_lists_are_short_and_begin_with_the_default():
    for kernel in ("fwd", "dkdv", "dq"):
        for capability in ((8, 0), (9, 0), (12, 0)):
            for D in (16, 32, 64, 128, 256):
                for dtype, terms in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
                    found = kernels.configurations(kernel, capability, dtype, D, terms)
                    assert 1 <= len(found) <= 4 and all(found.count(c) == 1 for c in found)


def test_small_problems_are_not_tuned(monkeypatch):
    lengths = []

    def pick(key, candidates, run, device):
        lengths.append(len(candidates))
        return candidates[0]

    monkeypatch.setattr(kernels, "pick", pick)
    for T in (256, 257):
        q = torch.zeros(1, 1, T, 16, dtype=torch.float16, device=DEVICE)
        kernels.attention(q, q, q, *options())
    kernels.attention(q[:0], q[:0], q[:0], *options())
    assert lengths[0] == lengths[2] == 1 < lengths[1]
