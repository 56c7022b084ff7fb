"""How long `import fastlm` takes once torch is imported, beside `import torch` itself, in fresh interpreters."""

from __future__ import annotations

from functools import partial

from fastlm.benchmarks.harness import Built, Case, Variant, python

CODE = "import time; {before}; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"


def _import_seconds(name: str, count: int) -> float:
    before = "pass" if name == "torch" else "import torch"
    return sum(float(python(CODE.format(before=before, name=name))) for _ in range(count))


def build_import() -> Built:
    timers = {name: partial(_import_seconds, name) for name in ("torch", "fastlm")}
    return Built({name: Variant(timer, seconds=timer) for name, timer in timers.items()})


def cases(device: str, quick: bool) -> list[Case]:
    if quick and device == "cuda":  # no matter of the GPU, and the longest of a quick run
        return []
    return [Case("import_time", "import", build_import, allocators=False, compare=False, target="0.3 s")]
