"""fastlm bench: chooses cases, measures them, prints and keeps the results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastlm.benchmarks import report
from fastlm.benchmarks.cases import GROUPS, cases
from fastlm.benchmarks.harness import (
    BenchmarkError,
    Case,
    Local,
    Remote,
    Row,
    as_json,
    describe_machine,
    measure,
    measure_limits,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastlm bench",
        description="Time fastlm's ops and training step beside torch's, as a share of what this machine can do.",
        epilog="Times are of the clock, but on the CPU those of dispatch are processor time.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(GROUPS)}; all if none is named")
    parser.add_argument("--match", default="", metavar="TEXT", help="cases whose name has TEXT in it, such as fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, if not given")
    parser.add_argument("--quick", action="store_true", help="few and small cases: whether all works, not how fast")
    parser.add_argument("--rounds", type=int, help="turns of each variant; 9 if not given, 3 when quick")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="directory for bench.json and bench.png")
    return parser


def run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in GROUPS]
    if unknown:
        parser.error(f"CASE must be one of {', '.join(GROUPS)}, got {unknown[0]}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU on this machine")
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    every = {group: cases(group, device, options.quick) for group in options.cases or GROUPS}
    chosen = {group: [found for found in some if options.match in found.name] for group, some in every.items()}
    if not any(chosen.values()):
        example = next(found.name for some in every.values() for found in some)
        parser.error(f"--match: no case has {options.match!r} in its name; one is {example!r}")
    try:  # while nothing is lost yet
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        parser.error(f"--out: cannot write to {options.out}: {error.strerror}")
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = options.rounds or (3 if options.quick else 9)
    seconds = 0.02 if options.quick else 0.1

    machine = describe_machine(device, shlex.join(["fastlm", "bench", *arguments]))
    limits = measure_limits(device)
    on = machine["device"] if device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    print(f"fastlm {machine['fastlm']} ({machine['commit'] or 'no checkout'}), torch {machine['torch']}; {on}")
    print(
        f"limits, measured now: float32 {limits['float32'] / 1e9:,.0f} GFLOP/s, "
        f"bfloat16 {limits['bfloat16'] / 1e9:,.0f} GFLOP/s, memory {limits['bandwidth'] / 1e9:,.1f} GB/s"
    )
    kept, picture = options.out / "bench.json", options.out / "bench.png"
    rows: list[Row] = []
    status = 0
    for group in chosen:
        in_group: list[Row] = []
        for found in chosen[group]:
            try:
                in_group += _measure(found, limits, rounds, seconds, options.quick)
            except BenchmarkError as error:
                print(f"fastlm bench: {error}", file=sys.stderr)
                status = 1
            with _whole(kept) as path:  # after each case: one may take very long
                path.write_text(json.dumps(as_json(rows + in_group, machine, limits), indent=1) + "\n")
        if in_group:
            report.print_table(group, in_group)
        rows += in_group

    with _whole(picture) as path:
        drawn = bool(rows) and report.draw(rows, machine, path)
    print(f"\n{kept}" + (f", {picture}" if drawn else "; no picture without matplotlib"))
    return status


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path` in one step. What fastlm.data has for this needs numpy."""
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        if beside.exists():
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _measure(found: Case, limits: dict[str, float], rounds: int, seconds: float, quick: bool) -> list[Row]:
    hosts: dict[str, Local | Remote] = {}
    try:
        if found.allocators and found.device == "cpu" and platform.libc_ver()[0] == "glibc":
            find = ("fastlm.benchmarks.cases:case", (found.group, found.name, found.device, quick))
            for allocator in ("system", "kept"):
                hosts[allocator] = Remote(found, allocator, find)
        else:
            hosts["system"] = Local(found)
        return measure(found, hosts, limits, rounds, seconds)
    except BenchmarkError:
        raise
    except RuntimeError as error:  # of torch, such as no memory: costs this case alone
        raise BenchmarkError(f"{found.group} {found.name}: {error}") from error
    finally:
        for host in hosts.values():
            host.close()
