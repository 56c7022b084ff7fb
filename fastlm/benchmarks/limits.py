"""What this machine can do at most, measured: the rates that the benchmarks state every time as a share of.

A limit is the best of many short runs, since whatever disturbs a run can only slow it down. The clock moves with load
and heat, so limits are measured in the run that uses them and never kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastlm import _native

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RUNS = 8
_ARRAY_BYTES = 128 << 20  # far more than the last cache level
_RUN_SECONDS = 0.02


def measure_peak(
    dtype: str | torch.dtype = "float32", threads: int | None = None, device: str | torch.device = "cpu"
) -> float:
    """The most floating-point operations a second in products of `dtype` with sums in float32; takes about 0.2 s.

    On the CPU from multiply-adds in registers (dot products for bfloat16), with nothing loaded or stored. Where the
    compiled module or the instruction is missing, and on CUDA, from torch's fastest of a few square products.

    Args:
        dtype: float32 or bfloat16, as a name or a torch.dtype.
        threads: of the CPU; None for torch's setting.
        device: cpu or cuda.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"fastlm.benchmarks.measure_peak: dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    device = torch.device(device)
    threads = threads or torch.get_num_threads()
    if device.type == "cpu" and _native.cpu is not None and _native.cpu.run_products(name, 1, threads):
        rounds = 1000
        run = lambda: _native.cpu.run_products(name, rounds, threads)  # noqa: E731
        while min(_seconds(run) for _ in range(3)) < _RUN_SECONDS:
            rounds *= 2
        return _best_rate(run)
    return _matmul_peak(_DTYPES[name], device, threads)


def measure_bandwidth(threads: int | None = None, device: str | torch.device = "cpu") -> float:
    """The most bytes a second between memory and the processor, reads and writes counted; takes about 0.5 s.

    On the CPU the better of reading one array and of updating one with another; on CUDA a copy, each byte counted
    twice.
    """
    device = torch.device(device)
    n = _ARRAY_BYTES // 4
    if device.type == "cuda":
        n *= 8
    a, b = torch.zeros(n, device=device), torch.zeros(n, device=device)
    threads = threads or torch.get_num_threads()
    if device.type == "cuda":
        return _best_rate(lambda: (b.copy_(a), 8 * n)[1], device)
    if _native.cpu is None:
        return _with_threads(threads, lambda: _best_rate(lambda: (b.add_(a), 12 * n)[1]))
    return max(
        _best_rate(lambda: _native.cpu.run_read(a, threads)), _best_rate(lambda: _native.cpu.run_update(a, b, threads))
    )


def _matmul_peak(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    best = 0.0
    for n in (2048, 4096, 8192) if device.type == "cuda" else (256, 512, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        run = lambda: (torch.mm(a, b, out=out), 2 * n**3)[1]  # noqa: B023, E731
        best = max(best, _with_threads(threads, lambda: _best_rate(run, device)))  # noqa: B023
        if 2 * n**3 / best > _RUN_SECONDS:  # as in bfloat16 without its instruction; the next size takes 8 times this
            break
    return best


def _with_threads(threads: int, run: Callable[[], float]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def _seconds(run: Callable[[], int], device: torch.device | None = None) -> float:
    if device is not None and device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start_time = time.perf_counter()
    run()
    return time.perf_counter() - start_time


def _best_rate(run: Callable[[], int], device: torch.device | None = None) -> float:
    """`run` returns the work that it did."""
    work = run()
    return max(work / _seconds(run, device) for _ in range(_RUNS))
