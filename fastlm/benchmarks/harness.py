"""Timing variants of one piece of work so that their ratio can be trusted.

Before anything is timed, every variant's result is compared with float64; one that is wrong is refused. Variants then
take turns, round by round, so that a change of clock or load hits all of them, and the ratio is the median of the
rounds' own ratios. What else ran on the machine meanwhile is measured and reported.

On the CPU each case runs under two settings of the C library's allocator, in a process each, since the setting holds
for a whole process: as it is (`system`), and keeping freed memory as the trainer does (`kept`). Page faults cost stock
torch more than its arithmetic in the first, so a comparison that names only one of them would mislead.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlm
from fastlm import _native
from fastlm.benchmarks.limits import measure_bandwidth, measure_peak

# Beside a busy process timings quantise to the scheduler's 4 or 8 ms: this share of one core is already too much.
_LOADED = 0.1
_NOISY = 0.15  # interquartile range over median
# How much more than plain torch in the same dtype a result may be off, values and gradients; and the ulps of the
# largest value that anybody may be.
_FACTOR, _ULPS = 3.0, 16


class BenchmarkError(RuntimeError):
    """A benchmark that cannot be trusted or run. The message is for the user."""


@dataclass
class Variant:
    """One way to do the work of a case."""

    run: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]] | None = None  # what the gate compares; None: nothing to compare
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around runs and outputs
    clock: Callable[[], float] = time.perf_counter  # of the CPU
    seconds: Callable[[int], float] | None = None  # times so many runs itself, instead of `run`
    proven: bool = True  # what is not may be wrong without costing the case its other variants
    remark: Callable[[], str] | None = None  # said beside the time, once all is timed


@dataclass
class Built:
    """The variants of a case, with memory allocated and weights made."""

    variants: dict[str, Variant]
    exact: Callable[[], dict[str, Tensor]] | None = None  # float64 results
    missing: dict[str, str] = field(default_factory=dict)  # variant -> why it cannot run here


@dataclass(frozen=True)
class Case:
    """A piece of work, what it costs at least, and how to build its variants."""

    group: str
    name: str
    build: Callable[[], Built]
    dtype: str = "float32"  # of the products: which peak they are measured by
    flops: float = 0.0
    bytes: float = 0.0  # between memory and processor: each input once, each output once
    items: float = 0.0  # tokens in a step, where a rate says more than a time
    baseline: str = "torch"
    device: str = "cpu"
    allocators: bool = True  # whether the setting can matter
    compare: bool = True  # whether the variants do the same work
    target: str = ""  # what fastlm should take at most, on the machine of bench/LOG.md; on CUDA its rate on one H200


@dataclass
class Row:
    """One variant of one case, measured."""

    group: str
    case: str
    variant: str
    allocator: str
    seconds: float = math.nan  # median
    quartiles: tuple[float, float] = (math.nan, math.nan)
    ratio: float = math.nan  # times faster than the baseline under the same allocator
    ratio_quartiles: tuple[float, float] = (math.nan, math.nan)
    ratios: dict[str, float] = field(default_factory=dict)  # the same to each other variant
    share: float = math.nan  # of the machine's limit
    flops: float = 0.0
    bytes: float = 0.0
    items: float = 0.0
    memory: float = math.nan  # bytes that a run holds at most besides what was there before, on CUDA
    rounds: int = 0
    remark: str = ""
    target: str = ""
    noisy: bool = False
    loaded: bool = False
    missing: str = ""


# --- correctness ------------------------------------------------------------------------------------------------------
def check(case: Case, built: Built) -> None:
    """Raise BenchmarkError unless every variant's outputs are as close to float64 as the dtype allows."""
    if built.exact is None:
        return
    exact = built.exact()
    baseline = built.variants[case.baseline]
    stock = _outputs(baseline) if baseline.outputs is not None else {}
    for name, variant in list(built.variants.items()):
        if variant.outputs is None:
            continue
        got = stock if name == case.baseline else _outputs(variant)
        for key, want in exact.items():
            value, want = got[key].detach().double(), want.double().to(got[key].device)
            error = (value - want).abs().max().item()
            eps = torch.finfo(got[key].dtype if case.dtype == "float32" else torch.bfloat16).eps
            allowed = _ULPS * eps * want.abs().max().item()
            if key in stock:
                allowed += _FACTOR * (stock[key].detach().double() - want).abs().max().item()
            if not error <= allowed:  # NaN is an error too
                why = f"its {key} is off by {error:.3g}, {allowed:.3g} allowed"
                if variant.proven:
                    raise BenchmarkError(f"{case.group} {case.name}: {name} is not timed, since {why}")
                built.missing[name] = why
                del built.variants[name]
                break


def _outputs(variant: Variant) -> dict[str, Tensor]:
    with variant.context():
        return variant.outputs()


# --- timing -----------------------------------------------------------------------------------------------------------
def time_runs(variant: Variant, count: int, device: str) -> float:
    """Seconds of `count` runs in a row, on CUDA by events."""
    if variant.seconds is not None:
        return variant.seconds(count)
    run = variant.run
    with variant.context():
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        clock = variant.clock
        began = clock()
        for _ in range(count):
            run()
        return clock() - began


def peak_memory(variant: Variant, device: str) -> float:
    """The most bytes that a run holds besides what is there already, as torch counts them; of a GPU."""
    if device != "cuda" or variant.seconds is not None:
        return math.nan
    with variant.context():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.run()
        return torch.cuda.max_memory_allocated() - before


def runs_for(variant: Variant, seconds: float, device: str) -> int:
    """Warm the variant up; how many runs take about so long."""
    time_runs(variant, 1, device)
    count = 1
    while (took := time_runs(variant, count, device)) < seconds / 4 and count < 1 << 20:
        count *= 4
    return max(1, round(count * seconds / took))


class Local:
    """A case in this process."""

    def __init__(self, case: Case):
        gc.collect()  # of the case before
        self.case = case
        self.built = case.build()
        check(case, self.built)

    def names(self) -> tuple[list[str], dict[str, str]]:
        return list(self.built.variants), self.built.missing

    def prepare(self, name: str, seconds: float) -> int:
        return runs_for(self.built.variants[name], seconds, self.case.device)

    def time(self, name: str, count: int) -> float:
        if self.case.device == "cpu":  # a GPU does not wait for it; the whole of a quick run there would
            gc.collect()
        gc.disable()
        try:
            return time_runs(self.built.variants[name], count, self.case.device)
        finally:
            gc.enable()

    def memory(self, name: str) -> float:
        return peak_memory(self.built.variants[name], self.case.device)

    def remark(self, name: str) -> str:
        remark = self.built.variants[name].remark
        return "" if remark is None else remark()

    def close(self) -> None:
        pass


class Remote:
    """A case in a process of its own, under an allocator setting."""

    def __init__(self, case: Case, allocator: str, find: tuple[str, tuple]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, allocator, torch.get_num_threads(), find)
        self._process = context.Process(target=_serve, args=arguments, daemon=False)
        self._process.start()
        theirs.close()
        self._names = self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise BenchmarkError(f"a benchmark process ended with exit code {self._process.exitcode}") from None
        if kind == "error":
            raise BenchmarkError(value)
        return value

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._receive()

    def names(self) -> tuple[list[str], dict[str, str]]:
        return self._names

    def prepare(self, name: str, seconds: float) -> int:
        return self._ask("prepare", name, seconds)

    def time(self, name: str, count: int) -> float:
        return self._ask("time", name, count)

    def memory(self, name: str) -> float:
        return self._ask("memory", name)

    def remark(self, name: str) -> str:
        return self._ask("remark", name)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()


def _serve(pipe: Any, allocator: str, threads: int, find: tuple[str, tuple]) -> None:
    """What a Remote's process does: build the case that `find` = (module:function, arguments) gives, then answer."""
    try:
        torch.set_num_threads(threads)
        if allocator == "kept":
            from fastlm.train.allocator import keep_freed_memory

            keep_freed_memory()
        module, _, function = find[0].partition(":")
        local = Local(getattr(importlib.import_module(module), function)(*find[1]))
        pipe.send(("ok", local.names()))
        while (question := pipe.recv()) is not None:
            pipe.send(("ok", getattr(local, question[0])(*question[1:])))
    except (BenchmarkError, ModuleNotFoundError) as error:  # the allocator's module comes with numpy's users
        pipe.send(("error", str(error)))
    except EOFError:  # the parent is gone
        pass
    except Exception:  # the parent reports it
        pipe.send(("error", traceback.format_exc()))


def measure(
    case: Case, hosts: dict[str, Local | Remote], limits: dict[str, float], rounds: int, seconds: float
) -> list[Row]:
    """Time a case's variants in interleaved rounds.

    Args:
        case: what is timed.
        hosts: allocator -> where its variants run.
        limits: of this machine: float32 and bfloat16 in FLOP/s, bandwidth in bytes/s.
        rounds: how often each variant has its turn.
        seconds: how long a turn should take; one run at least.
    """
    turns = [(allocator, name) for allocator, host in hosts.items() for name in host.names()[0]]
    counts = {turn: hosts[turn[0]].prepare(turn[1], seconds) for turn in turns}
    times: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    load = LoadMeter()
    for i in range(rounds):
        for turn in turns if i % 2 == 0 else reversed(turns):  # nobody always comes after the same one
            times[turn].append(hosts[turn[0]].time(turn[1], counts[turn]) / counts[turn])
    loaded = load.others() > _LOADED
    least = max(case.flops / limits.get(case.dtype, math.inf), case.bytes / limits.get("bandwidth", math.inf))
    rows = []
    for allocator, host in hosts.items():
        names, missing = host.names()
        for name in names:
            taken = times[allocator, name]
            ratios = [b / t for b, t in zip(times[allocator, case.baseline], taken, strict=True)]
            middle, quartiles = _summary(taken)
            ratio, ratio_quartiles = _summary(ratios)
            row = Row(case.group, case.name, name, allocator, middle, quartiles)
            if case.compare:
                row.ratio, row.ratio_quartiles = ratio, ratio_quartiles
                others = {other: times[allocator, other] for other in names if other != name}
                row.ratios = {
                    other: statistics.median(b / t for b, t in zip(theirs, taken, strict=True))
                    for other, theirs in others.items()
                }
            row.target = case.target if name == "fastlm" else ""
            row.share = least / middle if least else math.nan
            row.flops, row.bytes, row.items, row.rounds = case.flops, case.bytes, case.items, rounds
            row.memory, row.remark = host.memory(name), host.remark(name)
            row.noisy = quartiles[1] - quartiles[0] > _NOISY * middle
            row.loaded = loaded
            rows.append(row)
        rows += [Row(case.group, case.name, name, allocator, missing=why) for name, why in missing.items()]
    return rows


def _summary(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    if len(values) < 2:
        return values[0], (values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (low, high)


class LoadMeter:
    """How many cores other programs kept busy since it was made."""

    def __init__(self) -> None:
        self._began = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: of the clock, of all cores at work, of this process and its children at work."""
        own = _own_seconds()
        try:
            fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        except OSError:
            return time.monotonic(), math.nan, own
        busy = sum(fields[:3]) + sum(fields[5:8])  # user, nice, system; not idle, iowait; irq, softirq, steal
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own

    def others(self) -> float:
        """Cores' worth of work that was not ours, by the load average where /proc is missing."""
        clock, busy, own = (now - then for now, then in zip(self._read(), self._began, strict=True))
        if math.isnan(busy):
            return max(0.0, os.getloadavg()[0] - torch.get_num_threads()) if hasattr(os, "getloadavg") else 0.0
        return max(0.0, busy - own) / max(clock, 1e-9)


def _own_seconds() -> float:
    """CPU time of this process and of its living children."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            # After the name in brackets: state is field 3, utime 14, stime 15.
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


# --- the machine ------------------------------------------------------------------------------------------------------
def measure_limits(device: str) -> dict[str, float]:
    """float32 and bfloat16 in FLOP/s, bandwidth in bytes/s."""
    limits = {dtype: measure_peak(dtype, device=device) for dtype in ("float32", "bfloat16")}
    return limits | {"bandwidth": measure_bandwidth(device=device)}


def describe_machine(device: str, command: str) -> dict[str, Any]:
    """What a reader needs to know to compare figures."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "fastlm": fastlm.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _native.cpu.active_isa() if _native.cpu is not None else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout that fastlm lies in or that the command runs in; None for an installed package elsewhere.

    `make bench` runs in the checkout's .venv, so that Python finds the installed package and not the sources.
    """
    for root in (Path(fastlm.__file__).parents[1], Path.cwd(), *Path.cwd().parents):
        if (root / "csrc" / "cpu_module.cpp").exists():
            with contextlib.suppress(OSError):
                command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    return done.stdout.strip()
    return None


def as_json(rows: Sequence[Row], machine: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """Everything measured, with None for what is not a number."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    listed = [{key: plain(value) for key, value in asdict(row).items()} for row in rows]
    return {"machine": machine, "limits": limits, "rows": listed}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
